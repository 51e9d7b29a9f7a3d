"""A blank exercise or a mistake in a learner's module: one line that says where, from every command."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_llm_course.mistake import mistake

ROOT = Path(__file__).parents[1]
BLANK = """
class LLM:
    def __init__(self, *_, **__):
        raise NotImplementedError("3.2.9 LLM: pdm run hint 3.2.9")
"""
SAYS = {
    "a blank": (BLANK, "still blank: 3.2.9 LLM: pdm run hint 3.2.9"),
    "a syntax error": ("def f(:\n", "llm.py, line 1: invalid syntax (pdm run test llm)"),
    "an error while it is imported": ("1 / 0\n", "llm.py, line 1: ZeroDivisionError: division by zero"),
    "an error of another kind": (
        BLANK.replace("NotImplementedError", "TypeError"),
        "llm.py, line 4: TypeError: 3.2.9 LLM: pdm run hint 3.2.9 (pdm run test llm)",
    ),
    "a blank that caused another error": (
        BLANK.replace("raise", "f()\n\ndef f():\n  try:\n    raise") + "  except Exception as error:\n"
        "    from tiny_llm import TinyLLMError\n    raise TinyLLMError('the engine has died') from error\n",
        "still blank: 3.2.9 LLM: pdm run hint 3.2.9",
    ),
}


def run(overlay: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with an overlay in that folder."""
    environment = {**os.environ, "TINY_LLM_OVERLAY": str(overlay)}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        input="hello\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("what", SAYS)
def test_generate_reports_a_learners_mistake_in_one_line(what: str, tmp_path: Path) -> None:
    source, message = SAYS[what]
    (tmp_path / "llm.py").write_text(source, "utf-8")
    done = run(tmp_path, "-m", "tiny_llm_cli", "generate", "hello")
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "command", [["chat"], ["serve", "--port", "0"], ["info"], ["bench", "latency"]], ids=" ".join
)
def test_every_command_reports_a_blank_in_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "llm.py").write_text(BLANK, "utf-8")
    done = run(tmp_path, "-m", "tiny_llm_cli", *command)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "tiny-llm: error: still blank: 3.2.9 LLM: pdm run hint 3.2.9"
    assert "Traceback" not in done.stderr


def test_a_demonstration_that_reaches_another_days_blank_says_what_to_do(tmp_path: Path) -> None:
    for day in ("1.3", "1.4"):
        assert run(tmp_path, "-m", "tiny_llm_course", "start", day).returncode == 0
    assert run(tmp_path, "-m", "tiny_llm_course", "skip", "1.3").returncode == 0
    done = run(tmp_path, "-m", "tiny_llm_course", "try", "1.3")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: the demonstration of day 1\.3 also needs 1\.4\.\d \w+ of (day|part) (1\.4\w*), "
        r"which is blank in your \w+\.py: write it, or run `pdm run skip \2`\n",
        done.stderr,
    ), done.stderr
    own = run(tmp_path, "-m", "tiny_llm_course", "try", "1.4")
    assert ", line " in own.stderr, "a blank of the day itself is where it stands"


def test_a_benchmark_reports_a_learners_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "paged_attention.py").write_text("def f(:\n", "utf-8")
    done = run(tmp_path, "benches/front.py", "bookkeeping")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("pdm run bench: error: ")
    assert line.endswith("paged_attention.py, line 1: invalid syntax (pdm run test paged_attention)")


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LLM_DEBUG", "1")
    (tmp_path / "llm.py").write_text(BLANK, "utf-8")
    assert "Traceback" in run(tmp_path, "-m", "tiny_llm_cli", "generate", "hello").stderr


def test_an_error_outside_of_the_learners_modules_is_not_their_mistake(tmp_path: Path) -> None:
    def raised(call: Callable[[], object]) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (any)
            call()
        return caught.value

    assert mistake(raised(lambda: 1 / 0), tmp_path) is None
    assert mistake(raised(lambda: compile("def f(:", "other.py", "exec")), tmp_path) is None
    code = compile("1 / 0", str(tmp_path / "__init__.py"), "exec")
    assert mistake(raised(lambda: exec(code)), tmp_path) is None
