"""`pdm run compare`: how it compares and times the two sides, and what it says without a comparison."""

from pathlib import Path

import pytest

from tiny_llm_course import compare as comparing
from tiny_llm_course.compare import Comparison, Measured, as_text, compare
from tiny_llm_course.errors import CourseError
from tiny_llm_course.repo import Repo
from tiny_llm_course.starter import skip, start
from tiny_llm_course.units import Day
from toy_course import syllabus_of

MESSAGE = "1.2.1 inverse_frequencies: book/src/week-1/day-2.md#task-1"
BLANK = f'    raise NotImplementedError("{MESSAGE}")'
SIDE = Measured(0.001, 0.001, 0.2, 2048)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """The real course with an empty overlay, and short measurements."""
    monkeypatch.setattr(comparing, "SECONDS", 0.1)
    return Repo.here().with_overlay(tmp_path)


def day(repo: Repo, number: str) -> Day:
    return syllabus_of(repo).day(number)


@pytest.mark.parametrize(
    ("differing", "largest", "says"),
    [
        (0, None, "results: all 4 numbers are equal"),
        (1, None, "results: 1 of 4 numbers differ"),
        (4, 1e-6, "results: largest difference 1e-06"),
        (None, None, "results: the shapes differ"),
    ],
)
def test_integers_are_counted_and_floats_are_measured(
    here: Repo, differing: int | None, largest: float | None, says: str
) -> None:
    """The distance of two token ids means nothing."""
    text = as_text(here, day(here, "1.2"), Comparison(SIDE, SIDE, differing, 4, largest))
    assert says in text
    assert "2.8e+04" not in text
    table = text.splitlines()[1:4]
    assert len({len(line) for line in table}) == 1, "the columns stand apart"


@pytest.mark.parametrize(("is_compiled", "ran"), [(True, "a compiled kernel"), (False, "MLX's own operator")])
def test_exercises_with_faster_reference_code_are_named(
    here: Repo, is_compiled: bool, ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "compiled_runs", lambda: is_compiled)
    start(here, day(here, "1.4"))
    lines = as_text(here, day(here, "1.4"), Comparison(SIDE, SIDE, None, 4, 0.0)).splitlines()
    assert any(line.startswith("only ") and "norm.py" in line and "rope.py" not in line for line in lines)
    says = "your Python code against"
    assert f"1.4.1 rms_norm: {says} {ran}" in lines
    assert (
        any("swiglu" in line and line.endswith(says + " a compiled kernel") for line in lines) == is_compiled
    )
    assert any(line.startswith("memory: ") and "without weights and inputs" in line for line in lines)


def test_runs_of_the_learners_code_and_of_the_reference_alternate(
    here: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    repeat = comparing._Side.repeat

    def noted(side: comparing._Side) -> None:
        asked.append(side._whose)
        repeat(side)

    monkeypatch.setattr(comparing._Side, "repeat", noted)
    monkeypatch.setattr(comparing, "SECONDS", float("inf"))  # on a busy machine one repetition takes longer
    monkeypatch.setattr(comparing, "MAX_REPETITIONS", 2)
    start(here, day(here, "2.6"))
    skip(here, day(here, "2.6"), day(here, "2.6").exercises)
    found = compare(here, day(here, "2.6"))
    assert (found.differing, found.largest_difference) == (0, None)
    assert asked == ["your day 2.6", "the reference"] * 2


def test_modules_of_other_days_do_not_run(here: Repo) -> None:
    """A quantize.py of the learner's would make every pass of the real model slow."""
    (here.overlay / "quantize.py").write_text("raise RuntimeError('of another day')\n", "utf-8")
    start(here, day(here, "2.6"))
    skip(here, day(here, "2.6"), day(here, "2.6").exercises)
    assert compare(here, day(here, "2.6")).differing == 0


def test_a_blank_or_a_mistake_is_reported_in_one_line_with_the_learners_file(here: Repo) -> None:
    one = day(here, "1.2")
    start(here, one)
    with pytest.raises(CourseError) as blank:
        compare(here, one)
    line = (here.overlay / "rope.py").read_text("utf-8").splitlines().index(BLANK) + 1
    assert f"rope.py, line {line}: still blank: {MESSAGE}" in str(blank.value)
    assert f"{here.overlay}/rope.py" in str(blank.value), "the learner's file, not its copy"
    assert "\n" not in str(blank.value)
    skip(here, one, one.exercises)
    source = (here.overlay / "rope.py").read_text("utf-8")
    (here.overlay / "rope.py").write_text(f"{source}\nprint('hello')\nno_such_name\n", "utf-8")
    with pytest.raises(CourseError, match="NameError: name 'no_such_name' is not defined") as mistake:
        compare(here, one)
    assert "\n" not in str(mistake.value)


def test_a_day_without_a_comparison_says_why(here: Repo) -> None:
    for number in ("1.1", "1.3", "1.7", "3.1", "3.4", "3.7"):
        with pytest.raises(CourseError, match=f"day {number} has no comparison: both sides "):
            compare(here, day(here, number))
