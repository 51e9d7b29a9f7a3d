"""`pdm run book`: its help, its errors, and the address of a day's chapter."""

import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm_course.repo import Repo
from tiny_llm_course.syllabus import read_syllabus

ROOT = Path(__file__).parents[1]


def book(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "book" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT)


def test_help_lists_the_commands() -> None:
    shown = book("-h")
    assert shown.returncode == 0
    assert all(f"\n  {name} " in shown.stdout for name in ("serve", "build", "results", "figures"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "9.9"), "there is no day 9.9"),
        (("serve", "3.1", "--port", "0"), "0 is not in the range"),
        (("cheese",), "No such command 'cheese'"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    ended = book(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_serving_a_chapter_that_is_not_written_is_an_error() -> None:
    days = read_syllabus(Repo.here().syllabus).days
    day = next((day.id for day in days if day.chapter is None), None)
    if day is None:
        pytest.skip("every day has a chapter")
    ended = book("serve", day)
    assert ended.returncode == 2
    assert f"the chapter of day {day} is not written yet" in ended.stderr


def test_an_unknown_result_is_an_error_that_lists_the_known_ones() -> None:
    ended = book("results", "cheese")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: results/runs.toml has no cheese (has: info, ")


def test_serving_a_part_prints_the_address_of_its_section() -> None:
    """mdBook is replaced, so nothing is served."""
    command = [sys.executable, str(ROOT / "book" / "run.py"), "serve", "3.2b", "--port", "3999"]
    code = (
        "import runpy, subprocess, sys;"
        "subprocess.call = lambda *_, **__: 0;"
        f"sys.argv = {command[1:]!r};"
        f"sys.path.insert(0, {str(ROOT / 'book')!r});"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "the book: http://127.0.0.1:3999/week-3/day-2.html#part-b (Ctrl-C stops)\n"
