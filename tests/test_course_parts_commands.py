"""Parts of the real days: the commands for one part, and starting parts in any order gives the same files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm_course import days as demonstrations
from tiny_llm_course import main as command_line
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import start, starter
from tiny_llm_course.syllabus import Syllabus, read_syllabus
from tiny_llm_course.units import PartEntry
from toy_course import run
from toy_parts import own


@pytest.fixture
def real() -> Syllabus:
    here = Repo.here()
    return read_syllabus(here.syllabus)


def test_a_part_can_be_started_tested_reset_and_restored(tmp_path: Path) -> None:
    """What a learner types for one part of a long day."""
    started = run(["start", "3.2b"], tmp_path)
    assert "part 3.2b: " in started.stdout, started.stderr
    assert [file.name for file in tmp_path.glob("*.py")] == ["page_block.py"]
    assert run(["skip", "3.2b"], tmp_path).returncode == 0
    passing = run(["test", "3.2b", "-q"], tmp_path)
    assert "part 3.2b passes" in passing.stdout, passing.stderr
    assert run(["test", "3.2.4", "-q"], tmp_path).stdout.count("the whole part: pdm run test 3.2b") == 1
    row = next(row for row in json.loads(run(["progress", "--json"], tmp_path).stdout) if row["day"] == "3.2")
    assert [part["done"] for part in row["parts"]] == [False, True, False, False, False]
    assert "page_block.py" in run(["diff", "3.2b"], tmp_path).stdout
    assert run(["start", "3.2b", "--again"], tmp_path).stdout.startswith("moved page_block.py to ")
    assert "moved page_block.py to " in run(["reset", "3.2b"], tmp_path).stdout
    assert "restored: " in run(["restore", "3.2b"], tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            ([command, "3.2z"], "day 3.2 has no part 'z': it has 3.2a to 3.2e\n")
            for command in ("start", "test", "try", "hint", "diff", "compare", "skip", "reset", "restore")
        ),
        (["test", "3.2b"], "part 3.2b is not started: pdm run start 3.2b (writes page_block.py)\n"),
        (["reset", "3.2b"], "part 3.2b is not started: there is nothing to reset\n"),
        (["restore", "3.2b"], "part 3.2b has no files that were moved aside\n"),
        (["skip", "3.2b"], "part 3.2b is not started: pdm run start 3.2b\n"),
        (["compare", "3.2b"], "part 3.2b is not started: pdm run start 3.2b\n"),
        (["start", "3.2b", "--cpp"], "part 3.2b has no kernel in C++\n"),
    ],
)
def test_a_wrong_command_about_a_part_prints_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TINY_LLM_OVERLAY", str(tmp_path))
    assert command_line.run(arguments) == 1
    assert capsys.readouterr().err == f"error: {words}"


def test_the_help_of_every_command_mentions_parts(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["start", "test", "test-refsol", "try", "hint", "diff", "compare", "progress", "map", "skip"]
    for command in [*commands, "reset", "restore", "doctor", "course-check"]:
        assert command_line.run([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "3.2b" in out, command
        assert "part" in out, command


def test_the_reference_passes_the_tests_of_one_part() -> None:
    command = [sys.executable, "-m", "tiny_llm_course", "test-refsol", "3.2d", "-q"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " deselected" in done.stdout


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_starting_all_parts_in_any_order_gives_the_days_starters(
    real: Syllabus, order: str, tmp_path: Path
) -> None:
    """Helpers that one part has are taken out where the other part would have them as a solution."""
    for day in real.days:
        middle = (len(day.exercises) + 1) // 2
        halves = [pair for pair in (("a", day.exercises[:middle]), ("b", day.exercises[middle:])) if pair[1]]
        divided = dataclasses.replace(
            day, entries=tuple(PartEntry(letter, letter, None, some) for letter, some in halves)
        )
        repo = Repo.here().with_overlay(tmp_path / day.id)
        repo.overlay.mkdir()
        for letter in order if len(halves) > 1 else "a":
            start(repo, divided.part(letter))
        for module in day.modules:
            assert own(repo, module) == starter(repo, module, day), f"{day.id}, {module}.py"


def test_demonstrations_have_no_functions_for_parts_that_do_not_exist(real: Syllabus) -> None:
    for day in real.days:
        module = demonstrations.demonstration(day.id)
        names = {name for name in vars(module) if name.startswith(("show_", "work_"))}
        letters = {one.entry.letter for one in day.parts}
        assert {name.partition("_")[2] for name in names} <= letters
        assert all(getattr(module, name).__doc__ for name in names)


def test_the_titles_of_parts_are_distinct(real: Syllabus) -> None:
    for day in real.days:
        titles = [one.title for one in day.parts]
        assert len(set(titles)) == len(titles)
