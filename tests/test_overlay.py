"""The rules of the overlay: which file a module of `tiny_llm` comes from. Each test runs in its own
process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "src" / "tiny_llm_ref"

DOUBLED_NORM = """
import mlx.core as mx

def rms_norm(x, weight, eps):
    return 2 * x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * weight
"""

# A block whose attention and feed-forward return their input, so that only the norm has an effect.
BLOCK = """
import mlx.core as mx
from tiny_llm import block, norm

ones = mx.ones((4,))
layer = block.TransformerBlock(lambda x, context: x, lambda x: x, ones, ones, 0.0)
answer = {
    "files": [block.__file__, norm.__file__],
    "names": [block.__name__, norm.__name__],
    "out": layer(mx.full((1, 1, 4), 3.0), None).flatten().tolist(),
}
"""


def run(code: str, overlay: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter with this folder as its overlay."""
    environment = os.environ | {"TINY_LLM_OVERLAY": str(overlay), "TINY_LLM_KERNELS": "off"}
    command = [sys.executable, "-W", "ignore:no compiled kernels", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def ask(code: str, overlay: Path) -> dict[str, object]:
    """The value that `code` assigns to its variable `answer`."""
    done = run(f"{code}\nimport json\nprint(json.dumps(answer))", overlay)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def refusal(overlay: Path) -> str:
    """The last line of the error that importing `tiny_llm` raises."""
    done = run("import tiny_llm", overlay)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    folder = tmp_path / "overlay"
    folder.mkdir()
    return folder


def test_with_an_empty_overlay_every_module_comes_from_the_reference(overlay: Path) -> None:
    code = """
import sys, tiny_llm
values = [getattr(tiny_llm, name) for name in tiny_llm.__all__]
answer = {name: m.__file__ for name, m in sys.modules.items() if name.startswith("tiny_llm.")}
answer["homes"] = sorted({value.__module__.partition(".")[0] for value in values})
answer["reference"] = "tiny_llm_ref" in sys.modules
"""
    files = ask(code, overlay)
    assert files.pop("homes") == ["tiny_llm", "tiny_llm_checkpoints"]
    assert files.pop("reference") is False, "the reference was imported a second time, under its own name"
    assert files["tiny_llm.llm"] == str(REFERENCE / "llm.py")
    for name, file in files.items():
        assert file == str(REFERENCE / f"{name.removeprefix('tiny_llm.')}.py")


def test_a_module_in_the_overlay_wins_and_the_reference_uses_it(overlay: Path) -> None:
    plain = ask(BLOCK, overlay)
    assert plain["files"] == [str(REFERENCE / "block.py"), str(REFERENCE / "norm.py")]
    assert plain["out"] == pytest.approx([5.0] * 4), "3, plus 1, plus 1"

    (overlay / "norm.py").write_text(DOUBLED_NORM)
    mine = ask(BLOCK, overlay)
    assert mine["files"] == [str(REFERENCE / "block.py"), str(overlay / "norm.py")]
    assert mine["names"] == ["tiny_llm.block", "tiny_llm.norm"]
    assert mine["out"] == pytest.approx([7.0] * 4), "3, plus 2, plus 2"


def test_a_public_name_comes_from_the_learners_module(overlay: Path) -> None:
    (overlay / "chunked_prefill.py").write_text("def share_budget(wants, budget):\n    return 'mine'\n")
    code = "import tiny_llm\nanswer = {'said': tiny_llm.share_budget([], 0)}"
    assert ask(code, overlay) == {"said": "mine"}


# Replaces the compiled kernels by one that only returns "compiled".
FAKE_KERNELS = """
import sys, types
import mlx.core as mx
mx.set_default_device(mx.cpu)
fake = types.ModuleType("tiny_llm_kernels")
fake.available = lambda: True
fake.why_unavailable = lambda: None
fake.rms_norm = lambda *args: "compiled"
sys.modules["tiny_llm_kernels"] = fake
from tiny_llm.kernels import is_reference
from tiny_llm.norm import rms_norm
said = rms_norm(mx.ones((1, 4)), mx.ones((4,)), 0.0)
answer = {"said": said if isinstance(said, str) else "readable", "reference": is_reference(rms_norm)}
"""


def test_a_compiled_kernel_replaces_only_the_reference(overlay: Path) -> None:
    assert ask(FAKE_KERNELS, overlay) == {"said": "compiled", "reference": True}

    # Even if the learner kept the decorator of the reference's file.
    decorator = "from .kernels import accelerated\nfast = lambda *args: 'fast'\n"
    function = DOUBLED_NORM.replace("def", "@accelerated(compiled=fast, fused=fast)\ndef")
    (overlay / "norm.py").write_text(decorator + function)
    assert ask(FAKE_KERNELS, overlay) == {"said": "readable", "reference": False}


def test_a_missing_overlay_folder_is_rejected(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert refusal(missing) == f"ImportError: TINY_LLM_OVERLAY names {missing}, which is not a folder"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("kvpool.py", "kvpool.py does not replace any module of the engine; did you mean kv_pool.py?"),
        ("Norm.py", "Norm.py does not replace any module of the engine; did you mean norm.py?"),
        ("zzz.py", "zzz.py does not replace any module of the engine"),
    ],
)
def test_a_file_that_replaces_no_module_is_rejected_with_a_suggestion(
    overlay: Path, file: str, said: str
) -> None:
    (overlay / file).touch()
    assert refusal(overlay) == f"ImportError: {said} (in {overlay}; name your own helper files my_*.py)"


def test_other_files_in_the_overlay_are_ignored(overlay: Path) -> None:
    for name in ("__init__.py", "notes.md", "quantized_matmul.cpp"):
        (overlay / name).touch()
    (overlay / "__pycache__").mkdir()
    assert run("import tiny_llm", overlay).returncode == 0
