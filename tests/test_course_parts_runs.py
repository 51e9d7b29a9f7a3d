"""Tests of single parts: their output, their recorded results, and the cause of a failure."""

import pytest

from tiny_llm_course.blame import find_blame
from tiny_llm_course.errors import CourseError
from tiny_llm_course.outcome import Outcome, first_to_fix
from tiny_llm_course.progress import Result, remember, result
from tiny_llm_course.repo import Repo
from tiny_llm_course.runs import run_suites
from tiny_llm_course.source import with_blank
from tiny_llm_course.starter import skip, start
from tiny_llm_course.testing import run_day, run_started
from toy_course import replace, repo, suite, syllabus_of, write
from toy_parts import BACK, COUNT, LEAP, SUITE, course, own, part, solved

__all__ = ["course", "repo"]


# ---- test ----


def test_a_part_passes_while_the_later_ones_are_blank(
    course: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(course)
    start(course, syllabus.day("1.2"))
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    assert run_day(course, syllabus, part(course, "a"), []) == 0
    out = capfd.readouterr().out
    assert "course: part 1.2a, Upwards" in out
    assert "1 passed, 3 deselected" in out
    assert "still blank" not in out, "only the part's own blanks would be listed"
    assert "part 1.2a passes. What works now: counters that go up.\n" in out
    assert "pdm run diff 1.2a" in out
    assert "pdm run start 1.2b     next: Faster\n" in out
    assert "pdm run try 1.2a" not in out, "the day's demonstration needs later parts"
    assert result(course, part(course, "a")) is Result.PASSING
    assert result(course, syllabus.day("1.2")) is Result.UNKNOWN


def test_a_middle_part_can_be_started_first(course: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(course)
    start(course, part(course, "b"))
    assert run_day(course, syllabus, part(course, "b"), []) == 1
    out = capfd.readouterr().out
    assert "still blank: 1.2.2 Counter.leap, 1.2.3 double\n" in out
    assert out.endswith(
        "first: 1.2.2 Counter.leap (1 test waits): pdm run test 1.2.2 -x; pdm run hint 1.2.2\n"
    )
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    skip(course, part(course, "b").day, part(course, "b").exercises)
    assert run_day(course, syllabus, part(course, "b"), ["-q"]) == 0
    assert "part 1.2b passes.\n" in capfd.readouterr().out
    assert run_day(course, syllabus, part(course, "b"), ["-k", "leaps"]) == 0
    assert "the selected tests pass; the whole part: pdm run test 1.2b" in capfd.readouterr().out
    assert run_day(course, syllabus, part(course, "b"), [], isolated=True) == 0


def test_a_day_passes_when_its_parts_pass_and_work_on_a_later_part_keeps_earlier_results(
    course: Repo,
) -> None:
    day = syllabus_of(course).day("1.2")
    first, second, third = day.parts
    start(course, first)
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    remember(course, first, passed=True)
    start(course, second)
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    write(course, "doubling", "def double(x):\n    return 2 * x\n")
    remember(course, second, passed=True)
    assert [result(course, one) for one in (first, second, day)] == [
        Result.PASSING,
        Result.PASSING,
        Result.UNKNOWN,
    ]
    text = own(course)
    write(course, "counting", with_blank(text, "Counter.back", "1.2.4 Counter.back: book"))
    write(course, "counting", solved(own(course), "Counter.back", BACK))
    assert result(course, first) is result(course, second) is Result.PASSING
    remember(course, third, passed=True)
    assert result(course, day) is Result.PASSING
    write(course, "counting", own(course).replace("self.value += 1", "self.value = self.value + 1"))
    assert [result(course, one) for one in (*day.parts, day)] == [Result.STALE] * 3 + [Result.UNKNOWN]


def test_all_parts_pass_when_the_day_passes(course: Repo) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, day)
    skip(course, day, day.exercises)
    remember(course, day, passed=True)
    assert [result(course, one) for one in day.parts] == [Result.PASSING] * 3
    remember(course, day, passed=False)
    assert [result(course, one) for one in day.parts] == [Result.UNKNOWN] * 3


def test_a_run_of_the_day_says_which_parts_pass(course: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(course)
    day = syllabus.day("1.2")
    start(course, day)
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    assert run_day(course, syllabus, day, ["-x"]) == 1
    assert "passing parts" not in capfd.readouterr().out, "only some tests ran"
    assert run_day(course, syllabus, day, []) == 1
    assert "passing parts: 1.2a\n" in capfd.readouterr().out
    assert [result(course, one) for one in day.parts] == [Result.PASSING, Result.FAILING, Result.FAILING]
    write(course, "doubling", "raise ValueError\n\n\ndef double(x):\n    return x\n")
    assert run_day(course, syllabus, day, []) != 0
    assert "passing parts" not in capfd.readouterr().out, "the file cannot be imported"


def test_a_part_does_not_depend_on_files_of_later_parts(course: Repo) -> None:
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [2]")
    replace(course.syllabus, "exercises = [4]", "exercises = [3, 4]")
    day = syllabus_of(course).day("1.2")
    start(course, day)
    for one in day.parts:
        remember(course, one, passed=True)
    write(course, "doubling", "x = 1\n")
    assert [result(course, one) for one in day.parts] == [Result.PASSING, Result.PASSING, Result.STALE]


def test_the_tests_of_a_task_are_those_of_its_number(course: Repo) -> None:
    more = (
        '\n\ndef test_task_11_more() -> None:\n    """Oracle: by hand."""\n    assert Counter().back() == 1\n'
    )
    suite(course, 2).write_text(SUITE + more, "utf-8")
    chosen = run_suites(course, [suite(course, 2)], ["-q", "--tasks=1"], quiet=True)
    assert "1 passed, 4 deselected" in chosen.stdout
    both = run_suites(course, [suite(course, 2)], ["-q", "--tasks=1,11", "--tb=no"], quiet=True)
    assert "1 failed, 1 passed, 3 deselected" in both.stdout


def test_a_part_that_is_not_started_says_how_to_start_it(course: Repo) -> None:
    syllabus = syllabus_of(course)
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [2]")
    replace(course.syllabus, "exercises = [4]", "exercises = [3, 4]")
    with pytest.raises(
        CourseError, match=r"^part 1\.2a is not started: pdm run start 1\.2a \(writes counting\.py\)$"
    ):
        run_day(course, syllabus, part(course, "a"), [])
    start(course, part(course, "a"))
    with pytest.raises(CourseError, match=r"only a part of day 1\.2 is started: `pdm run test 1\.2a` and"):
        run_day(course, syllabus, syllabus_of(course).day("1.2"), [])


def test_without_a_day_all_started_parts_are_tested(course: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [2]")
    replace(course.syllabus, "exercises = [4]", "exercises = [3, 4]")
    start(course, part(course, "a"))
    assert run_started(course, syllabus_of(course), []) == 1
    out = capfd.readouterr().out
    assert "course: part 1.2a" in out
    assert "course: part 1.2b" not in out, "it is blank, and the part before it comes first"
    assert "course: part 1.2c" not in out


def test_after_the_last_part_the_next_step_is_the_whole_day(
    course: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(course)
    start(course, part(course, "c"))
    write(course, "counting", solved(own(course), "Counter.back", BACK))
    assert run_day(course, syllabus, part(course, "c"), []) == 0
    assert "pdm run test 1.2       the whole day; some of its parts do not pass yet" in capfd.readouterr().out
    for one in syllabus.day("1.2").parts[:2]:
        remember(course, one, passed=True)
    write(course, "counting", own(course) + "\n\nmore = 1\n")
    remember(course, part(course, "c"), passed=True)
    assert run_day(course, syllabus, part(course, "c"), []) == 0
    out = capfd.readouterr().out
    assert "pdm run test 1.2       test the whole day once: files have changed since 1.2a" in out
    remember(course, part(course, "a"), passed=True)
    write(course, "doubling", "def double(x):\n    return 2 * x\n")
    remember(course, part(course, "b"), passed=True)
    assert run_day(course, syllabus, part(course, "c"), []) == 0
    assert "pdm run try 1.2        the whole day\n" in capfd.readouterr().out


# ---- the cause of a failure ----


def failing(test: str) -> Outcome:
    return Outcome(1, (f"tests_refsol/test_week_1_day_2.py::{test}",))


def test_a_fault_of_another_part_in_another_file_is_found(
    course: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    replace(course.reference / "doubling.py", "from .adding import add\n", "from .counting import Counter\n")
    replace(course.reference / "doubling.py", "add(x, x)", "Counter().leap(2 * x)")
    replace(course.syllabus, "exercises = [1]", "exercises = [1, 2]")
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [3]")
    syllabus = syllabus_of(course)
    start(course, syllabus.day("1.2"))
    wrong = solved(own(course), "Counter.leap", "        return 7")
    write(course, "counting", solved(wrong, "Counter.count", COUNT))
    write(course, "doubling", (course.reference / "doubling.py").read_text("utf-8"))
    assert run_day(course, syllabus, part(course, "b"), []) == 1
    out = capfd.readouterr().out
    assert (
        "today's code is correct: test_task_3_doubles passes when all other modules are the reference's."
        in out
    )
    assert "it fails together with your counting.py (day 1.2): pdm run test 1.2" in out


def test_a_fault_of_another_part_in_the_same_file_is_found(course: Repo) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, day)
    wrong = solved(own(course), "Counter.count", "        return 7")
    calling = "        for _ in range(steps):\n            self.count()\n        return self.value"
    write(course, "counting", solved(wrong, "Counter.leap", calling))
    outcome = failing("test_task_2_leaps")
    found = find_blame(course, syllabus_of(course), day.part("b"), outcome)
    assert found.exercise is not None
    assert found.exercise.id == "1.2.1"
    assert str(first_to_fix(outcome, day, found.exercise)) == (
        "first: 1.2.1 Counter.count (1 of 1.2.2's tests fails): pdm run test 1.2.2 -x; pdm run hint 1.2.1"
    )


def test_a_learners_helper_may_have_the_name_of_a_reference_helper(course: Repo) -> None:
    """The reference's code called the learner's helper, so that the search blamed several exercises."""
    day = syllabus_of(course).day("1.2")
    start(course, day)
    wrong = solved(own(course), "Counter.count", COUNT)
    wrong = solved(wrong, "Counter.back", "        self.value = self._before(2)\n        return self.value")
    helper = "    def _before(self, steps: int) -> int:\n        return self.value - steps\n\n\ndef given"
    write(course, "counting", wrong.replace("\ndef given", helper))
    found = find_blame(course, syllabus_of(course), day, failing("test_task_4_goes_back"))
    assert found.exercise is not None
    assert found.exercise.id == "1.2.4"


def test_skipped_code_calls_the_references_helper(course: Repo) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, day)
    helper = "    def _before(self) -> int:\n        return 7\n\n\ndef given"
    write(course, "counting", own(course).replace("\ndef given", helper))
    skip(course, day, day.exercises)
    assert "self.value = self._before_of_reference()" in own(course)
    assert "        return add(self.value, -1)\n" in own(course)
    assert "    def _before(self) -> int:\n        return 7\n" in own(course)
    assert run_day(course, syllabus_of(course), day, []) == 0
