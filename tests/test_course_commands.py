"""The commands on the real course: what a learner types, and what the commands print."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm_course import days as demonstrations
from tiny_llm_course import main as command_line
from tiny_llm_course.repo import Repo
from tiny_llm_course.rules import static_problems
from tiny_llm_course.syllabus import read_syllabus
from toy_course import ROOT, run

WHICH_FILES = """
import sys
from importlib import import_module
from inspect import unwrap
from tiny_llm_course import show_commands
file_of = lambda function: unwrap(function).__code__.co_filename
show_commands.function_of = lambda *_: lambda: [
    file_of(import_module("tiny_llm.linear").quantized_matmul), file_of(import_module("tiny_llm.rope").rope)
]
show_commands.on_try(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("tried", "says", "is_mine"),
    [
        (
            "2.7",
            "your quantize.py is not used here, because it unpacks every matrix in each forward pass; "
            "day 2.4 uses it",
            False,
        ),
        (
            "2.4",
            "this takes some seconds with your quantize.py, because it unpacks every matrix in each forward "
            "pass",
            True,
        ),
    ],
)
def test_a_slow_module_runs_only_in_its_own_days_demonstration(
    tmp_path: Path, tried: str, says: str, is_mine: bool
) -> None:
    """The learner's other modules run in every day."""
    reference = Repo.here().reference
    for name in ("quantize.py", "rope.py"):
        (tmp_path / name).write_text((reference / name).read_text("utf-8"), "utf-8")
    ran = subprocess.run(
        [sys.executable, "-c", WHICH_FILES, tried],
        env={**os.environ, "TINY_LLM_OVERLAY": str(tmp_path)},
        text=True,
        capture_output=True,
        check=False,
    )
    quantize = (tmp_path if is_mine else reference) / "quantize.py"
    assert ran.stdout.splitlines()[1:] == [says, str(quantize), str(tmp_path / "rope.py")], ran.stderr


def test_a_demonstration_mentions_slow_modules_only_if_there_are_any(tmp_path: Path) -> None:
    ran = run(["try", "2.3"], tmp_path)
    assert "quantize.py" not in ran.stdout
    assert ran.stdout.splitlines()[1].startswith("a simulation"), ran.stderr


def test_a_demonstration_says_which_modules_are_the_learners(tmp_path: Path) -> None:
    shutil.copy(Repo.here().reference / "sliding_window.py", tmp_path)
    ran = run(["try", "3.5"], tmp_path)
    first = "day 3.5, Sliding windows: your sliding_window.py; the reference's windowed_prefix.py"
    assert ran.stdout.splitlines()[0] == first, ran.stderr


def test_the_real_course_can_be_read() -> None:
    here = Repo.here()
    assert static_problems(here, read_syllabus(here.syllabus)) == []


def test_the_message_of_every_blank_is_recognised() -> None:
    """Days have more than nine tasks: `3.4.10` is one of them."""
    from tiny_llm_course import provenance

    here = Repo.here()
    messages = [e.message for day in read_syllabus(here.syllabus).days for e in day.exercises]
    assert any(message.startswith("3.4.10 ") for message in messages)
    assert [message for message in messages if not provenance.OF_A_BLANK.match(message)] == []


def test_every_available_day_can_be_tried_and_compared() -> None:
    here = Repo.here()
    days = [day.id for day in read_syllabus(here.syllabus).days if not day.is_planned]
    files = {file.name for file in Path(demonstrations.__path__[0]).glob("week_*.py")}
    assert files == {f"week_{day[0]}_day_{day[2]}.py" for day in days}
    modules = [demonstrations.demonstration(day) for day in days]
    assert all(module.show.__doc__ for module in modules)
    measured = [module.work.__doc__ for module in modules if hasattr(module, "work")]
    assert all(measured)
    assert len(measured) == sum(day.no_compare is None for day in read_syllabus(here.syllabus).days)


def test_a_first_day_from_start_to_diff(tmp_path: Path) -> None:
    """What a learner types on the first day, on the real engine."""
    started = run(["start", "1.1"], tmp_path)
    assert "wrote " in started.stdout, started.stderr
    assert run(["start", "1.1"], tmp_path).returncode == 1
    failing = run(["test", "1.1"], tmp_path)
    assert failing.returncode == 1
    assert "wait for 1.1.1 softmax: book/src/week-1/day-1.md#task-1" in failing.stdout
    tried = run(["try", "1.1"], tmp_path).stderr
    assert re.search(r"attention\.py, line \d+: still blank: 1\.1\.2 causal_mask: ", tried), tried
    assert run(["skip", "1.1"], tmp_path).returncode == 0
    passing = run(["test", "--week", "1", "--day", "1"], tmp_path)
    assert passing.returncode == 0, passing.stdout
    assert "yours: attention.py" in passing.stdout
    assert "day 1.1 has no comparison: both sides" in run(["compare", "1.1"], tmp_path).stdout
    assert "| " not in run(["try", "1.2"], tmp_path).stderr
    rows = json.loads(run(["progress", "--json"], tmp_path).stdout)
    assert rows[0]["exercises"] == dict.fromkeys(["1.1.1", "1.1.2", "1.1.3"], "skipped")
    assert run(["reset", "1.1"], tmp_path).returncode == 0
    assert [file.name for file in tmp_path.glob("*.py")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start", "7.7"], "there is no day 7.7"),
        (["test", "1.1"], "not started: pdm run start 1.1"),
        (["test", "--week", "1"], "--week and --day go together"),
        (["test", "1.1", "--time-limit", "-1"], "--time-limit must be at least 0, not -1"),
        (["test-refsol", "nofile.py"], "there is no file nofile.py"),
        (["start", "nofile.py"], "'nofile.py' is not a day such as 1.1 or a file of a day"),
        (["hint", "1.1.9"], "there is no exercise '1.1.9': day 1.1 has 1.1.1 to 1.1.3"),
        (["diff", "1.1"], "not started"),
        (["reset", "1.1"], "nothing to reset"),
        (["restore", "1.1"], "day 1.1 has no files that were moved aside"),
        (["test", "attention.py"], "not started: pdm run start 1.1"),
        (["skip", "1.1.1"], "not started: pdm run start 1.1"),
        (["compare", "1.2"], "not started"),
        (["start"], "Missing argument 'DAY'"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_a_wrong_command_prints_one_line_and_returns_an_exit_code(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TINY_LLM_OVERLAY", str(tmp_path))
    assert command_line.run(arguments) in (1, 2)
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        "start",
        "test",
        "test-refsol",
        "try",
        "hint",
        "diff",
        "compare",
        "progress",
        "map",
        "reset",
        "restore",
        "skip",
    ]
    commands += ["doctor", "build-kernels", "course-check"]
    for command in commands:
        assert command_line.run([command, "--help"]) == 0
        assert len(capsys.readouterr().out.split()) > 20
    scripts = (ROOT / "pyproject.toml").read_text("utf-8")
    for command in commands:
        assert f'{command} = {{ cmd = "python -m tiny_llm_course {command}", help = "' in scripts
