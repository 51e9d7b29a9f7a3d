"""`course-check`: a correct course has no problems, and a violation of each rule is reported."""

from collections.abc import Callable

import pytest

from tiny_llm_course.check import check
from tiny_llm_course.progress import Result, changed_files, remember, result
from tiny_llm_course.repo import Repo
from tiny_llm_course.rules import static_problems
from tiny_llm_course.second_solutions import failing_solutions
from tiny_llm_course.starter import start
from tiny_llm_course.testing import run_reference
from toy_course import problems_of, replace, repo, solution, suite, syllabus_of

__all__ = ["repo"]


def test_a_sound_course_has_no_problems(repo: Repo) -> None:
    told: list[tuple[str, int, int]] = []
    assert check(repo, syllabus_of(repo), lambda *said: told.append(said)) == []
    # two days' starters, one day with later days blank, two days on the reference, three blank exercises;
    # examples with and without kernels, second solutions
    assert told[-1][1] == told[-1][2] == 11
    assert len(told) == 12


def test_only_some_days_are_checked(repo: Repo) -> None:
    told: list[str] = []
    day = syllabus_of(repo).day("1.2")
    assert check(repo, syllabus_of(repo), lambda what, *_: told.append(what), only=[day]) == []
    assert not [what for what in told if what.startswith("1.1")]
    assert "1.2.2 double blank" in told


Change = Callable[[Repo], None]


def test_a_second_solution_may_have_only_the_exercises_and_new_helpers(repo: Repo) -> None:
    """The starter supplies the rest, here `Counter.__init__`."""
    solution(repo, "counting").write_text(
        "class Counter:\n"
        "    def count(self):\n        self.value = self.more()\n        return self.value\n\n"
        "    def more(self):\n        return self.value + 1\n",
        "utf-8",
    )
    assert failing_solutions(repo, syllabus_of(repo).days) == []


LONG = "y = x\n    z = y + y\n    x = 0\n    return z + x"
SUM_OF_PART = """
from common.numbers import FIVE
from tiny_llm.adding import add


def test_task_1_of_a_part() -> None:
    \"\"\"Oracle: by hand.\"\"\"
    assert add(2, 3) == FIVE
"""


def give_part(repo: Repo, part: str = SUM_OF_PART, numbers: str = "FIVE = 5\n", imported: str = "*") -> None:
    """Let the suite of day 1.1 have a second file, and a number from what all suites share."""
    for name, text in {"week_1_day_1/sums.py": part, "common/numbers.py": numbers}.items():
        file = repo.suites / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    if imported:
        replace(suite(repo, 1), "import add\n", f"import add\nfrom week_1_day_1.sums import {imported}\n")


STATIC: dict[str, tuple[Change, str]] = {
    "a part that the day does not import": (
        lambda h: give_part(h, imported=""),
        "suites: week_1_day_1/sums.py: test_week_1_day_1.py does not import it",
    ),
    "tests of one name in two files": (
        lambda h: give_part(h, SUM_OF_PART.replace("of_a_part", "two_and_three")),
        "suites: week_1_day_1/sums.py, line 6: test_task_1_two_and_three is also in test_week_1",
    ),
    "a folder of no day": (
        lambda h: (h.suites / "week_9_day_1").mkdir() or (h.suites / "week_9_day_1" / "sums.py").touch(),
        "suites: week_9_day_1/: does not belong to any day",
    ),
    "fixtures of one name in two files": (
        lambda h: give_part(
            h,
            SUM_OF_PART + "\n\n@pytest.fixture\ndef five():\n    return FIVE\n",
            "import pytest\n\nFIVE = 5\n\n\n@pytest.fixture\ndef five():\n    return 5\n",
        ),
        "five is also in week_1_day_1/sums.py",
    ),
    "an exercise without an example": (
        lambda h: replace(h.reference / "doubling.py", ">>> double(4)\n    8\n", ""),
        "examples: 1.2.2: double has no example",
    ),
    "a day without a second solution": (
        lambda h: solution(h, "doubling").unlink(),
        "second solution: 1.2: there is no tests/second_solutions/week_1_day_2/doubling.py",
    ),
    "a second solution of no day": (
        lambda h: solution(h, "doubling").rename(solution(h, "doubling").with_name("halving.py")),
        "second solution: tests/second_solutions/week_1_day_2/halving.py: is not a module of a day",
    ),
    "a second solution that is the reference's": (
        lambda h: [
            replace(h.reference / "doubling.py", "return add(x, x)", LONG),
            replace(solution(h, "doubling"), "return 2 * x", f'"""Mine."""\n    {LONG}'),
        ],
        "second solution: 1.2, doubling.py: double: the same code as the reference's",
    ),
    "a part that looks into private parts": (
        lambda h: give_part(h, SUM_OF_PART.replace("== FIVE", "== FIVE._value")),
        "private: week_1_day_1/sums.py, line 8: ._value is private",
    ),
    "a part of another day": (
        lambda h: give_part(h, "from week_1_day_2 import sums\n"),
        "imports: week_1_day_1/sums.py, line 1: a suite must not import week_1_day_2",
    ),
    "a shared file that imports a later day": (
        lambda h: give_part(h, numbers="from tiny_llm.doubling import double\n\nFIVE = 5\n"),
        "later day: common/numbers.py, line 1: doubling belongs to day 1.2",
    ),
    "an exercise that is not there": (
        lambda h: replace(h.syllabus, "doubling.double", "doubling.twice"),
        "names: 1.2, doubling.py: there is no function twice",
    ),
    "a removed helper that is not there": (
        lambda h: replace(h.syllabus, "Counter._next", "Counter._after"),
        "names: 1.2, counting.py: there is no function Counter._after",
    ),
    "a module that is not there": (
        lambda h: (h.reference / "adding.py").unlink(),
        "names: 1.1: there is no module adding",
    ),
    "a hint that says nothing": (
        lambda h: replace(h.syllabus, "The sum of 2 and 3 is 5.", "?"),
        "hints: 1.1.1: a hint is missing",
    ),
    "a line of the solution in the starter": (
        lambda h: replace(
            h.reference / "adding.py", "    return x\n", "    one = other = x\n    return sum((one, other))\n"
        ),
        "leak: 1.1, adding.py: the starter still has a line of add: return sum((one, other))",
    ),
    "a helper that gives the solution away": (
        lambda h: replace(
            h.reference / "counting.py",
            "    return x\n",
            "    self = Counter()\n    return add(self.value, 1)\n",
        ),
        "leak: 1.2, counting.py: the starter still has a line of Counter._next: return add(self.value, 1)",
    ),
    "a removed helper that another function of its module calls": (
        lambda h: replace(h.reference / "counting.py", "    return x\n", "    return Counter()._next()\n"),
        "starter: 1.2, counting.py: given calls Counter._next, which the starter does not contain",
    ),
    "a removed helper that another module calls": (
        lambda h: replace(
            h.reference / "doubling.py",
            "    return add(x, x)\n",
            "    from .counting import Counter\n\n    return Counter()._next() + 2 * x - 1\n",
        ),
        "starter: 1.2, counting.py: doubling.py calls Counter._next, which the starter does not contain",
    ),
    "a day without tests": (
        lambda h: suite(h, 2).unlink(),
        "suites: test_week_1_day_2.py: the day has no tests",
    ),
    "tests of no day": (
        lambda h: (h.suites / "test_week_9_day_1.py").touch(),
        "suites: test_week_9_day_1.py: does not belong to any day",
    ),
    "a suite that imports the reference": (
        lambda h: replace(suite(h, 1), "from tiny_llm.adding", "from tiny_llm_ref.adding"),
        "imports: test_week_1_day_1.py, line 3: a suite must not import tiny_llm_ref.adding",
    ),
    "a suite that imports a private name": (
        lambda h: replace(suite(h, 1), "import add\n", "import add, _add\n"),
        "private: test_week_1_day_1.py, line 3: tiny_llm.adding._add is private",
    ),
    "a suite that looks into private parts": (
        lambda h: replace(suite(h, 2), "counter = Counter()", "counter = Counter()\n    counter._value = 0"),
        "private: test_week_1_day_2.py, line 10: ._value is private",
    ),
    "a suite that imports a later day": (
        lambda h: replace(suite(h, 1), "import add\n", "import add\nfrom tiny_llm.doubling import double\n"),
        "later day: test_week_1_day_1.py, line 4: doubling belongs to day 1.2",
    ),
    "a suite that asserts which blocks were given out": (
        lambda h: replace(suite(h, 1), "add(2, 3) == 5", "add(2, 3) == 5 and add.blocks == [0, 1]"),
        "block ids: test_week_1_day_1.py, line 8: add.blocks == [0, 1]",
    ),
    "a test without an oracle": (
        lambda h: replace(suite(h, 1), "Oracle: by hand.", "It works."),
        "oracle: test_week_1_day_1.py: test_task_1_two_and_three does not name an oracle",
    ),
    "a test without a task": (
        lambda h: replace(suite(h, 1), "test_task_1_two", "test_two"),
        "names: test_week_1_day_1.py: test_two_and_three does not name its task",
    ),
}


@pytest.mark.parametrize("what", STATIC)
def test_a_broken_static_rule_is_reported(repo: Repo, what: str) -> None:
    change, message = STATIC[what]
    change(repo)
    assert any(message in str(problem) for problem in static_problems(repo, syllabus_of(repo)))


def test_all_files_of_a_suite_run_and_a_failure_shows_its_file(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    give_part(repo)
    assert not static_problems(repo, syllabus_of(repo))
    assert run_reference(repo, [suite(repo, 1)], []) == 0
    assert "2 passed" in capfd.readouterr().out
    replace(repo.suites / "week_1_day_1/sums.py", "== FIVE", "== 1 + FIVE")
    assert run_reference(repo, [suite(repo, 1)], []) == 1
    out = capfd.readouterr().out
    assert "tests_refsol/week_1_day_1/sums.py:8" in out
    assert "assert 5 == (1 + 5)" in out


@pytest.mark.parametrize("name", ["week_1_day_1/sums.py", "common/numbers.py"])
def test_a_day_is_tested_again_when_any_file_of_its_suite_changes(repo: Repo, name: str) -> None:
    give_part(repo)
    start(repo, syllabus_of(repo).day("1.1"))
    remember(repo, syllabus_of(repo).day("1.1"), passed=True)
    with (repo.suites / name).open("a", encoding="utf-8") as file:
        file.write("\nSIX = 6\n")
    assert result(repo, syllabus_of(repo).day("1.1")) is Result.STALE
    assert changed_files(repo, syllabus_of(repo).day("1.1")) == [name]
    assert result(repo, syllabus_of(repo).day("1.2")) is Result.UNKNOWN


def test_a_suite_may_count_block_ids(repo: Repo) -> None:
    replace(suite(repo, 1), "add(2, 3) == 5", "add(2, 3) == 5 and len(add.blocks) == 2")
    assert not [p for p in static_problems(repo, syllabus_of(repo)) if p.rule == "block ids"]


DYNAMIC: dict[str, tuple[Change, str]] = {
    "an example that gives something else": (
        lambda h: replace(h.reference / "counting.py", "[1, 2]", "[1, 3]"),
        'examples: 1.2.1: counting.Counter.count File "counting.py", line 16',
    ),
    "an example that cannot be run": (
        lambda h: replace(h.reference / "doubling.py", "import add\n", "import add\n\n1 / 0\n"),
        "examples: all days: cannot be run",
    ),
    "a second solution that fails": (
        lambda h: replace(solution(h, "doubling"), "2 * x", "3 * x"),
        "second solution: 1.2: fails tests_refsol/test_week_1_day_2.py::test_task_2_doubles",
    ),
    "a reference that fails": (
        lambda h: replace(suite(h, 1), "== 5", "== 6"),
        "reference: test_week_1_day_1.py: fails on the reference",
    ),
    "an exercise that no test needs": (
        lambda h: replace(suite(h, 2), "assert double(4) == 8", "assert double"),
        "blank: 1.2.2: test_week_1_day_2.py passes although double is blank",
    ),
    "a test that swallows the message": (
        lambda h: replace(
            suite(h, 2),
            "    assert double(4) == 8\n",
            "    try:\n        assert double(4) == 8\n    except NotImplementedError:\n        found = 0\n"
            "    else:\n        found = 8\n    assert found == 8\n",
        ),
        "blank: 1.2.2: fails, but without the exercise's message",
    ),
    "a starter that cannot be imported": (
        lambda h: replace(h.reference / "doubling.py", "\n\ndef double", "\nTWO = add(1, 1)\n\n\ndef double"),
        "later day",
    ),
    "a test that needs a later day": (
        lambda h: replace(
            h.reference / "adding.py",
            "    return sum((one, other))\n",
            "    from .doubling import double\n\n    return double(one) - one + other\n",
        ),
        "later day: 1.1: fails while the days after it are blank",
    ),
}


@pytest.mark.deep
@pytest.mark.parametrize("what", [name for name in DYNAMIC if "imported" not in name])
def test_a_broken_rule_is_found_by_running(repo: Repo, what: str) -> None:
    change, message = DYNAMIC[what]
    change(repo)
    if "later day" in what:  # otherwise the two modules would import each other
        replace(repo.reference / "doubling.py", "add(x, x)", "2 * x")
        replace(repo.reference / "doubling.py", "from .adding import add\n\n\n", "\n")
    assert any(message in problem for problem in problems_of(repo))


def test_a_starter_that_cannot_be_imported_is_found(repo: Repo) -> None:
    replace(repo.reference / "adding.py", "def given", "FIVE = add(2, 3)\n\n\ndef given")
    assert any("starter: 1.1: cannot be imported" in problem for problem in problems_of(repo))


def test_a_starter_that_is_not_formatted_is_found(repo: Repo) -> None:
    replace(repo.reference / "adding.py", "    return x\n", "    return  x\n")
    assert any("starter: 1.1: is not formatted" in problem for problem in problems_of(repo))
