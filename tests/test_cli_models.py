"""`tiny-llm models`: the models that have a name, with their sizes and how to install them."""

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import Run, plain_cli
from tiny_llm_checkpoints import embedded
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.hub import PACKAGED

__all__ = ["plain_cli"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def add(cache: Path, repo: str, files: dict[str, int], ref: str = "main") -> None:
    """Add a repository to the cache; files: their sizes by name."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / ref).write_text(COMMIT)
    for name, size in files.items():
        file = folder / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\0" * size)


def listed(plain_cli: Run) -> dict[str, Any]:
    done = plain_cli("models", "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.usefixtures("cache")
def test_every_packaged_model_is_listed_with_its_size(plain_cli: Run) -> None:
    packaged = listed(plain_cli)["packaged"]
    assert [model["name"] for model in packaged] == list(PACKAGED)
    assert packaged[0]["installed"]
    assert packaged[0]["bytes"] == embedded_model_path().stat().st_size
    if packaged[1]["installed"]:
        assert packaged[1]["bytes"] == PACKAGED["gemma3-270m"]().stat().st_size
    assert "smollm2      93.8 MiB  SmolLM2-135M-Instruct, the default; installed\n" in plain_cli("models").out


@pytest.mark.usefixtures("cache")
def test_a_model_that_is_not_installed_is_listed_with_the_commands_of_its_error(
    plain_cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    assert [model["installed"] for model in listed(plain_cli)["packaged"]] == [False, False]
    lines = plain_cli("models").out.splitlines()[1:3]
    for line, name in zip(lines, PACKAGED, strict=True):
        advice = line.partition("not installed: ")[2].removesuffix(")").partition(" (")
        error = plain_cli("chat", "hi", "--model", name).err
        assert advice[0] in error
        assert advice[2] in error


def test_complete_models_in_the_cache_of_the_hub_are_listed(cache: Path, plain_cli: Run) -> None:
    add(cache, "owner/whole", {"config.json": 2, "model.safetensors": 20480, "tokenizer.json": 5})
    parts = {f"Q8_0/m-0000{number}-of-00002.gguf": 1000 * number for number in (1, 2)}
    add(cache, "owner/ggufs", {"a.gguf": 10, **parts})
    expected = {
        "owner/whole": 20480,
        "owner/ggufs/a.gguf": 10,
        "owner/ggufs/Q8_0/m-00001-of-00002.gguf": 3000,
    }
    assert {model["name"]: model["bytes"] for model in listed(plain_cli)["cached"]} == expected
    assert plain_cli("models").out.splitlines()[-1].split() == ["owner/whole", "20", "KiB"]


def test_models_in_the_cache_that_would_have_to_be_downloaded_are_not_listed(
    cache: Path, plain_cli: Run
) -> None:
    add(cache, "owner/tokenizer", {"config.json": 2, "tokenizer.json": 5})
    add(cache, "owner/part", {"config.json": 2, "model-00001-of-00002.safetensors": 5})
    add(cache, "owner/half", {"a-00001-of-00002.gguf": 5})
    add(cache, "owner/other-revision", {"a.gguf": 5}, ref="old")
    assert listed(plain_cli)["cached"] == []
    assert plain_cli("models").out.endswith("  none: --model OWNER/NAME downloads one\n")


def test_a_missing_cache_counts_as_empty(
    tmp_path: Path, plain_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    assert listed(plain_cli)["cached"] == []
