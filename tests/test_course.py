"""The course's machine on a course of three small days: every command, and every rule shown to bite."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_llm_kernels
from tiny_llm_course import cpp
from tiny_llm_course import days as demonstrations
from tiny_llm_course import main as door
from tiny_llm_course.check import check
from tiny_llm_course.doctor import examine
from tiny_llm_course.errors import CourseError
from tiny_llm_course.house import House
from tiny_llm_course.outcome import Outcome, begin_here
from tiny_llm_course.overview import map_text, progress, progress_text
from tiny_llm_course.progress import Result, State, changed_files, remember, result, state
from tiny_llm_course.rules import static_problems
from tiny_llm_course.runs import overlay_of, own_sources
from tiny_llm_course.second_solutions import failing_solutions
from tiny_llm_course.source import SKIPPED, blanked, is_blank, signature, with_body_of
from tiny_llm_course.starter import set_aside, skip, start
from tiny_llm_course.syllabus import Syllabus, read_syllabus
from tiny_llm_course.testing import run_day, run_reference, run_started
from tiny_llm_course.views import after_reset, difference, hint, tasks

ROOT = Path(__file__).parents[1]
HINTS = 'hints = ["Which is larger, 2 or 3?", "The sum of 2 and 3 is 5.", "Take both, and add them up."]'

SYLLABUS = f"""
[[day]]
id = "1.1"
title = "Adding"
works = "sums"
modules = ["adding"]
[[day.exercise]]
name = "adding.add"
{HINTS}

[[day]]
id = "1.2"
title = "Counting"
works = "counters"
modules = ["counting", "doubling"]
remove = ["counting.Counter._next"]
[[day.exercise]]
name = "counting.Counter.count"
{HINTS}
[[day.exercise]]
name = "doubling.double"
{HINTS}

[[day]]
id = "1.3"
title = "Later"
works = "all of it"
"""

ADDING = '''"""Sums."""


def add(one: int, other: int) -> int:
    """The sum of both.

    >>> add(2, 3)
    5
    """
    return sum((one, other))


def given(x: int) -> int:
    """Nothing to do here."""
    return x
'''

COUNTING = '''"""Counters."""

from .adding import add


class Counter:
    """Counts up from 0."""

    def __init__(self) -> None:
        self.value = 0

    def count(self) -> int:
        """Add one and return the value.

        >>> counter = Counter()
        >>> [counter.count(), counter.count()]
        [1, 2]
        """
        # The first time it is 1.
        self.value = self._next()
        return self.value

    def _next(self) -> int:
        return add(self.value, 1)


def given(x: int) -> int:
    """Nothing to do here."""
    return x
'''

DOUBLING = '''"""Twice."""

from .adding import add


def double(x: int) -> int:
    """x and x.

    >>> double(4)
    8
    """
    return add(x, x)
'''

SUITE_1 = '''"""Day 1.1."""

from tiny_llm.adding import add


def test_task_1_two_and_three() -> None:
    """Oracle: by hand."""
    assert add(2, 3) == 5
'''

SUITE_2 = '''"""Day 1.2."""

from tiny_llm.counting import Counter
from tiny_llm.doubling import double


def test_task_1_counts() -> None:
    """Oracle: by hand."""
    counter = Counter()
    assert [counter.count(), counter.count()] == [1, 2]


def test_task_2_doubles() -> None:
    """Oracle: by hand."""
    assert double(4) == 8
'''

# An editable install finds `tiny_llm` by a finder of its own, wherever the path leads: not in this checkout.
SITE = """import sys

sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__module__.startswith("_editable")]
"""

SOLUTIONS = {
    "week_1_day_1/adding.py": "def add(one, other):\n    return one + other\n",
    "week_1_day_2/counting.py": (
        "class Counter:\n    def __init__(self):\n        self.value = 0\n\n"
        "    def count(self):\n        self.value += 1\n        return self.value\n"
    ),
    "week_1_day_2/doubling.py": "def double(x):\n    return 2 * x\n",
}

API = "__all__ = []\n\n\ndef __getattr__(name):\n    raise AttributeError(name)\n"


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A checkout with a course of its own, which lacks nothing."""
    files = {f"tests/second_solutions/{name}": source for name, source in SOLUTIONS.items()}
    files |= {
        "src/tiny_llm_course/syllabus.toml": SYLLABUS,
        "src/sitecustomize.py": SITE,
        "src/tiny_llm_ref/__init__.py": "",
        "src/tiny_llm_ref/api.py": API,
        "src/tiny_llm_ref/adding.py": ADDING,
        "src/tiny_llm_ref/counting.py": COUNTING,
        "src/tiny_llm_ref/doubling.py": DOUBLING,
        "src/tiny_llm/__init__.py": (ROOT / "src/tiny_llm/__init__.py").read_text("utf-8"),
        "tests_refsol/conftest.py": (ROOT / "tests_refsol/conftest.py").read_text("utf-8"),
        "tests_refsol/test_week_1_day_1.py": SUITE_1,
        "tests_refsol/test_week_1_day_2.py": SUITE_2,
        "pyproject.toml": '[project]\ndependencies = ["mlx==0"]\n\n[tool.ruff]\nline-length = 110\n',
    }
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8")
    return House(tmp_path, tmp_path / "src" / "tiny_llm")


def syllabus_of(house: House) -> Syllabus:
    return read_syllabus(house.syllabus)


def write(house: House, module: str, source: str) -> None:
    (house.overlay / f"{module}.py").write_text(source, "utf-8")


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


# ---- source ----


def test_a_blank_keeps_signature_docstring_and_everything_around_it() -> None:
    blank = blanked(COUNTING, {"Counter.count": "1.2.1 Counter.count: book"}, ["Counter._next"])
    assert is_blank(blank, "Counter.count")
    assert '"""Add one and return the value.\n' in blank
    assert 'raise NotImplementedError("1.2.1 Counter.count: book")' in blank
    assert "_next" not in blank
    assert "The first time" not in blank
    assert blank.endswith(COUNTING[COUNTING.index("\n\ndef given") :])
    assert blank.startswith(COUNTING[: COUNTING.index("        # The first")])


def test_stand_ins_are_taken_out_with_their_imports() -> None:
    source = '"""M."""\n\nimport a\n\nfrom .kernels import accelerated, use_compiled\n\n\n'
    source += '@accelerated(\n    compiled="x",\n    fused=use_compiled,\n)\n'
    source += 'def f(x: int) -> int:\n    """F."""\n    return x\n'
    blank = blanked(source, {"f": "1.1.1 f: book"})
    assert "accelerated" not in blank
    assert "from .kernels import use_compiled" in blank
    assert 'def f(x: int) -> int:\n    """F."""\n    raise NotImplementedError("1.1.1 f: book")' in blank


def test_a_body_is_put_where_a_blank_was() -> None:
    blank = blanked(COUNTING, {"Counter.count": "m"})
    filled = with_body_of(blank, COUNTING, "Counter.count")
    assert filled.replace(f"        {SKIPPED}\n", "") == COUNTING


def test_signatures_are_compared_as_written() -> None:
    assert signature(ADDING, "add") == "add(one: int, other: int) -> int"


# ---- syllabus ----


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "1.2"', 'id = "1.1"', "day 1.1 is there twice"),
        ('id = "1.2"', 'id = "12"', "'12' is no day"),
        ('title = "Adding"', "", "day 1.1 has no text 'title'"),
        ('title = "Adding"', 'titel = "Adding"', "day 1.1 has the unknown keys titel"),
        ('["counting", "doubling"]', '["adding", "counting", "doubling"]', "has no exercise in adding"),
        ('"adding.add"', '"doubling.add"', "exercise 1.1.1 is 'doubling.add'"),
        ('"doubling.double"', '"counting.Counter.count"', "has no exercise in doubling"),
        (', "Take both, and add them up."]', "]", "exercise 1.1.1 has 2 hints, expected 3"),
        ("[[day]]", "[[day", "syllabus.toml"),
    ],
)
def test_a_mistake_in_the_syllabus_is_named(house: House, old: str, new: str, message: str) -> None:
    text = house.syllabus.read_text("utf-8")
    house.syllabus.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(CourseError, match=message):
        syllabus_of(house)


def test_days_and_exercises_are_found_by_id_with_a_guess(house: House) -> None:
    syllabus = syllabus_of(house)
    assert syllabus.day("1.2").title == "Counting"
    assert syllabus.exercise("1.2.2").name == "double"
    message = "1.2.2 double: pdm run hint 1.2.2"
    assert syllabus.exercise("1.2.2").message == message
    with pytest.raises(CourseError, match=r"no day 1\.4: `pdm run map`"):
        syllabus.day("1.4")
    with pytest.raises(CourseError, match=r"'1' is no day such as 1\.1"):
        syllabus.day("1")
    for wrong in ("1.2.3", "1.2"):
        with pytest.raises(CourseError, match=rf"no exercise '{wrong}': day 1\.2 has 1\.2\.1 to 1\.2\.2"):
            syllabus.exercise(wrong)
    with pytest.raises(CourseError, match=r"day 1\.3 \(Later\) is to come"):
        syllabus.exercise("1.3.1")
    with pytest.raises(CourseError, match=r"day 1\.3 \(Later\) is to come"):
        syllabus.to_start("1.3")


# ---- start, reset, skip ----


def test_start_writes_the_days_modules_blank_and_nothing_else(house: House) -> None:
    day = syllabus_of(house).day("1.2")
    assert [file.name for file in start(house, day).files] == ["counting.py", "doubling.py"]
    assert [state(house, exercise) for exercise in day.exercises] == [State.BLANK, State.BLANK]
    assert "1.2.1  counting.py  Counter.count()" in tasks(house, day)
    assert "pdm run test 1.2" in tasks(house, day)


def test_start_never_overwrites_and_again_moves_aside(house: House) -> None:
    day = syllabus_of(house).day("1.2")
    start(house, day)
    write(house, "counting", "mine = 1\n")
    with pytest.raises(CourseError, match=r"day 1\.2 is started already .*--again"):
        start(house, day)
    (house.overlay / "doubling.py").unlink()
    assert [file.name for file in start(house, day).files] == ["doubling.py"]
    assert (house.overlay / "counting.py").read_text("utf-8") == "mine = 1\n"
    set_aside(house, day)
    start(house, day)
    assert (house.overlay / "counting.py.1.bak").read_text("utf-8") == "mine = 1\n"
    set_aside(house, day)
    assert (house.overlay / "counting.py.2.bak").exists()


def test_reset_moves_files_aside(house: House) -> None:
    day = syllabus_of(house).day("1.1")
    start(house, day)
    moved = set_aside(house, day)
    assert [file.name for file in moved] == ["adding.py.1.bak"]
    assert after_reset(day, moved) == "the reference's again: adding.py"
    assert state(house, day.exercises[0]) is State.NOT_STARTED


def test_skip_fills_blanks_alone(house: House) -> None:
    day = syllabus_of(house).day("1.2")
    start(house, day)
    write(house, "doubling", DOUBLING.replace("add(x, x)", "2 * x"))
    assert [exercise.id for exercise in skip(house, day, day.exercises)] == ["1.2.1"]
    assert [state(house, exercise) for exercise in day.exercises] == [State.SKIPPED, State.WRITTEN]
    assert (
        "        # skipped: the reference's code\n        # The first time"
        in (house.overlay / "counting.py").read_text()
    )
    assert skip(house, day, day.exercises) == []
    assert "        return add(self.value, 1)" in (house.overlay / "counting.py").read_text(), (
        "its helper is back"
    )
    assert run_day(house, syllabus_of(house), day, []) == 0


# ---- test ----


def test_a_day_that_is_not_started_says_how_to_start_it(house: House) -> None:
    syllabus = syllabus_of(house)
    with pytest.raises(CourseError, match=r"not started: pdm run start 1\.1"):
        run_day(house, syllabus, syllabus.day("1.1"), [])
    with pytest.raises(CourseError, match="no day is started"):
        run_started(house, syllabus, [])


def test_a_file_that_overrides_nothing_is_an_error_with_a_guess(house: House) -> None:
    syllabus = syllabus_of(house)
    start(house, syllabus.day("1.1"))
    write(house, "addin", "")
    with pytest.raises(CourseError, match=r"addin\.py overrides nothing; did you mean adding\.py\?"):
        run_day(house, syllabus, syllabus.day("1.1"), [])


def test_blanks_are_told_and_fail_with_their_own_message(
    house: House, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(house)
    start(house, syllabus.day("1.1"))
    assert run_day(house, syllabus, syllabus.day("1.1"), []) == 1
    out = capfd.readouterr().out
    assert "still blank: 1.1.1 add" in out
    assert "1 test waits for 1.1.1 add: pdm run hint 1.1.1" in out
    assert "FAILURES" not in out, "a blank is no mistake"
    assert out.endswith("first: 1.1.1 add (1 test waits): pdm run test 1.1.1 -x; pdm run hint 1.1.1\n")
    assert "yours: adding.py; the reference's: 3 modules" in out
    assert result(house, syllabus.day("1.1")) is Result.FAILING


def test_a_day_that_passes_says_what_comes_next_and_is_remembered(
    house: House, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING.replace("sum((one, other))", "one + other"))
    assert run_day(house, syllabus, syllabus.day("1.1"), []) == 0
    out = capfd.readouterr().out
    assert "day 1.1 passes: sums." in out
    assert "pdm run start 1.2" in out
    assert result(house, syllabus.day("1.1")) is Result.PASSING
    write(house, "adding", ADDING)
    assert result(house, syllabus.day("1.1")) is Result.STALE
    assert run_started(house, syllabus, []) == 0


def test_a_part_of_a_suite_is_not_remembered(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING)
    assert run_day(house, syllabus, syllabus.day("1.1"), ["-k", "two"]) == 0
    assert "what you chose passes; the whole day: pdm run test 1.1" in capfd.readouterr().out
    assert result(house, syllabus.day("1.1")) is Result.UNKNOWN
    assert run_day(house, syllabus, syllabus.day("1.1"), ["-q", "-x"]) == 0
    assert "day 1.1 passes" in capfd.readouterr().out
    assert result(house, syllabus.day("1.1")) is Result.PASSING


def test_a_day_is_not_tested_anew_over_a_file_that_it_does_not_reach(house: House) -> None:
    syllabus = syllabus_of(house)
    for module, source in (("adding", ADDING), ("doubling", DOUBLING), ("counting", COUNTING)):
        write(house, module, source)
    for day in syllabus.days[:2]:
        remember(house, day, passed=True)
    write(house, "doubling", f"{DOUBLING}# mine\n")
    assert [result(house, day) for day in syllabus.days[:2]] == [Result.PASSING, Result.STALE]
    write(house, "doubling", DOUBLING)
    write(house, "adding", f"{ADDING}# mine\n")
    assert [result(house, day) for day in syllabus.days[:2]] == [Result.STALE, Result.STALE]


def test_a_function_that_lost_its_name_is_told(house: House) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING.replace("def add", "def plus"))
    with pytest.raises(
        CourseError, match=r"adding\.py has no add \(exercise 1\.1\.1\): it must keep its name"
    ):
        run_day(house, syllabus, syllabus.day("1.1"), [])


def test_a_file_that_does_not_parse_is_told_with_its_line(house: House) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", "x = 1\ndef add(:\n")
    with pytest.raises(CourseError, match=r"adding\.py, line 2: "):
        run_day(house, syllabus, syllabus.day("1.1"), [])


def test_an_earlier_module_is_found_to_be_the_reason(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING.replace("sum((one, other))", "one - other"))
    write(house, "counting", COUNTING)
    write(house, "doubling", DOUBLING)
    day = syllabus.day("1.2")
    assert run_day(house, syllabus, day, []) == 1
    out = capfd.readouterr().out
    assert "today's code is right: on the reference for everything else, test_task_1_counts passes." in out
    assert "it fails with your adding.py (day 1.1): pdm run test 1.1" in out
    assert run_day(house, syllabus, day, [], isolated=True) == 0


def test_todays_own_mistake_is_not_blamed_on_others(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING)
    write(house, "counting", COUNTING)
    write(house, "doubling", DOUBLING.replace("add(x, x)", "x"))
    assert run_day(house, syllabus, syllabus.day("1.2"), []) == 1
    out = capfd.readouterr().out
    assert "the fault is in doubling.py, double: with the reference's, test_task_2_doubles passes" in out


def test_blanks_alone_are_nobodys_fault(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING)
    start(house, syllabus.day("1.2"))
    assert run_day(house, syllabus, syllabus.day("1.2"), []) == 1
    out = capfd.readouterr().out
    assert "looking for the fault" not in out
    assert out.endswith(
        "first: 1.2.1 Counter.count (1 test waits): pdm run test 1.2.1 -x; pdm run hint 1.2.1\n"
    )


@pytest.mark.parametrize("isolated", [False, True])
def test_a_mistake_comes_before_a_blank(
    house: House, isolated: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING)
    start(house, syllabus.day("1.2"))
    write(house, "doubling", DOUBLING.replace("add(x, x)", "x"))
    assert run_day(house, syllabus, syllabus.day("1.2"), [], isolated=isolated) == 1
    out = capfd.readouterr().out
    assert ("looking for the fault" in out) is not isolated
    assert out.endswith(
        "first: 1.2.2 double (1 of its tests fails): pdm run test 1.2.2 -x; pdm run hint 1.2.2\n"
    )


def test_the_first_task_is_the_lowest_with_a_mistake(house: House) -> None:
    day = syllabus_of(house).day("1.2")
    tests = [f"test_week_1_day_2.py::test_task_{task}_x[{n}]" for task in (10, 2) for n in range(3)]
    assert "first: 1.2.2 double (3 of its tests fail)" in str(
        begin_here(Outcome(1, (*tests, "x.py"), ("m",)), day)
    )
    other_day = Outcome(1, (), ("1.1.1 add: book", "1.1.1 add: book", "1.2.1 Counter.count: book"))
    assert "first: 1.1.1 add (2 tests wait)" in str(begin_here(other_day, day))
    assert begin_here(Outcome(2, ("test_week_1_day_2.py",)), day) is None


def test_a_traceback_shows_the_learners_lines_and_not_the_references(
    house: House, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(house)
    write(house, "counting", COUNTING)
    write(house, "doubling", DOUBLING.replace("add(x, x)", "add(x, None)"))
    day = syllabus.day("1.2")
    assert run_day(house, syllabus, day, []) == 1
    out = capfd.readouterr().out
    assert "assert double(4) == 8" in out
    assert "return add(x, None)" in out
    assert "return sum((one, other))" not in out
    assert "TypeError" in out
    assert run_day(house, syllabus, day, ["--full-trace"]) == 1
    assert "return sum((one, other))" in capfd.readouterr().out


def test_the_reference_is_tested_without_the_learners_files(house: House) -> None:
    write(house, "adding", "broken")
    assert run_reference(house, [house.suites], []) == 0


def test_an_overlay_of_some_modules_holds_copies_of_those(house: House) -> None:
    write(house, "adding", ADDING)
    write(house, "doubling", DOUBLING)
    write(house, "my_tools", "")
    with overlay_of(house, own_sources(house, ["doubling"])) as alone:
        assert sorted(file.name for file in alone.overlay.iterdir()) == ["doubling.py", "my_tools.py"]


# ---- views ----


def test_hints_come_in_three_steps(house: House) -> None:
    syllabus = syllabus_of(house)
    exercise = syllabus.exercise("1.1.1")
    assert "a question:\n  Which is larger, 2 or 3?" in hint(house, syllabus, exercise, 1)
    assert "pdm run hint 1.1.1 2" in hint(house, syllabus, exercise, 1)
    assert "a sketch:\n  Take both" in hint(house, syllabus, exercise, 3)
    assert "pdm run skip 1.1.1" in hint(house, syllabus, exercise, 3)
    with pytest.raises(CourseError, match=r"no hint 4 of 1\.1\.1: 1 is a question"):
        hint(house, syllabus, exercise, 4)


def test_the_difference_is_shown_after_passing_or_anyway(house: House) -> None:
    day = syllabus_of(house).day("1.1")
    with pytest.raises(CourseError, match="not started"):
        difference(house, day, anyway=True)
    write(house, "adding", ADDING.replace("sum((one, other))", "one + other"))
    with pytest.raises(CourseError, match=r"day 1\.1 not tested"):
        difference(house, day, anyway=False)
    assert "-    return one + other\n+    return sum((one, other))" in difference(house, day, anyway=True)
    remember(house, day, passed=True)
    assert difference(house, day, anyway=False) == difference(house, day, anyway=True)
    assert "@accelerated" not in difference(house, day, anyway=True)
    replace(house.reference / "adding.py", "def add(", "@accelerated(compiled=None)\ndef add(")
    assert difference(house, day, anyway=True).startswith(
        "@accelerated, _fused, _compiled in the reference: "
    )


def test_progress_is_read_from_the_files(house: House) -> None:
    syllabus = syllabus_of(house)
    write(house, "adding", ADDING.replace("sum((one, other))", "one + other"))
    start(house, syllabus.day("1.2"))
    write(house, "doubling", DOUBLING)
    remember(house, syllabus.day("1.1"), passed=True)
    first, second = progress(house, syllabus)
    assert (first["done"], first["exercises"]) == (True, {"1.1.1": "written"})
    assert second["exercises"] == {"1.2.1": "blank", "1.2.2": "written"}
    assert (second["done"], second["written"]) == (False, 1)
    text = progress_text(house, syllabus)
    assert "1.1  [x]   " in text
    assert "1.2  [.x]  " in text
    (house.overlay / "counting.py").unlink()
    assert "1.2  [-x]  " in progress_text(house, syllabus)
    assert "- its file is not there" in text
    assert "1 of 2 days pass." in text
    assert "next: pdm run test 1.2" in text


def test_a_day_that_was_left_out_is_named_beside_the_next(house: House) -> None:
    syllabus = syllabus_of(house)
    start(house, syllabus.day("1.2"))
    assert progress_text(house, syllabus).splitlines()[-1] == "next: pdm run test 1.2", "it came first"
    remember(house, syllabus.day("1.2"), passed=True)
    assert progress_text(house, syllabus).splitlines()[-1] == "next: pdm run start 1.1"
    later = SYLLABUS[SYLLABUS.index('[[day]]\nid = "1.2"') : SYLLABUS.index('[[day]]\nid = "1.3"')]
    later = later.replace("1.2", "1.4").replace("counting", "given").replace("doubling", "more")
    house.syllabus.write_text(house.syllabus.read_text("utf-8") + later, "utf-8")
    for name, source in (("given", COUNTING), ("more", DOUBLING)):
        (house.reference / f"{name}.py").write_text(source, "utf-8")
    assert progress_text(house, syllabus_of(house)).splitlines()[-1] == (
        "next: pdm run start 1.4; day 1.1 before it is left out: pdm run start 1.1"
    )


def test_a_broken_record_says_nothing(house: House) -> None:
    day = syllabus_of(house).day("1.1")
    write(house, "adding", ADDING)
    remember(house, day, passed=True)
    assert result(house, day) is Result.PASSING
    (house.records / "results.json").write_text("{", "utf-8")
    assert result(house, day) is Result.UNKNOWN


def test_the_map_shows_whose_modules_run(house: House) -> None:
    write(house, "doubling", DOUBLING)
    text = map_text(house, syllabus_of(house))
    assert "counting.py  [doubling.py]" in text
    assert "to come" in text


def test_the_letters_of_shapes_are_those_of_the_days_docstrings(house: House) -> None:
    day = syllabus_of(house).day("1.1")
    package = '"""Shapes are written in letters: B batch, L or T tokens, N\nblocks, D head size."""\n'
    (house.reference / "__init__.py").write_text(package, "utf-8")
    assert "shapes:" not in tasks(house, day)
    replace(house.reference / "adding.py", "The sum of both.", "N of both: [B, total_blocks, T // 2].")
    assert "shapes:  B batch, L or T tokens\n" in tasks(house, day)
    replace(house.reference / "adding.py", "Nothing to do here.", "Of a matrix [N, K], [..., N].")
    assert "shapes:  B batch, L or T tokens\n" in tasks(house, day)
    replace(house.reference / "adding.py", "Sums.", "Sums of [D].")
    assert "shapes:  B batch, L or T tokens, D head size\n" in tasks(house, day)


# ---- doctor ----


def test_the_doctor_finds_what_no_longer_fits_the_reference(house: House) -> None:
    write(house, "adding", "def add(one: int) -> int:\n    return one\n")
    findings = {(finding.what, finding.ok): finding for finding in examine(house, syllabus_of(house))}
    assert "0 is pinned" in findings["MLX", False].advice
    told = [str(finding) for finding in examine(house, syllabus_of(house)) if finding.what == "adding.py"]
    assert "has add(one: int) -> int\n   the reference has add(one: int, other: int) -> int" in told[0]
    assert "has no given" in told[1]
    write(house, "adding", ADDING)
    fitting = [finding.ok for finding in examine(house, syllabus_of(house)) if finding.what == "adding.py"]
    assert all(fitting)
    write(house, "adin", "")
    refused = [f for f in examine(house, syllabus_of(house)) if f.what == "your modules"]
    assert not refused[0].ok
    assert "adin.py overrides nothing; did you mean adding.py?" in refused[0].found


# ---- the check: every rule bites ----


def problems_of(house: House) -> list[str]:
    found = check(house, syllabus_of(house), lambda what, done, total: None)
    return [str(problem) for problem in found]


def test_a_sound_course_has_no_problems(house: House) -> None:
    told: list[tuple[str, int, int]] = []
    assert check(house, syllabus_of(house), lambda *said: told.append(said)) == []
    # two days as they begin, one without those after it, two on the reference, three exercises blank;
    # examples with and without kernels, second solutions
    assert told[-1][1] == told[-1][2] == 11
    assert len(told) == 12


def test_only_some_days_are_checked(house: House) -> None:
    told: list[str] = []
    day = syllabus_of(house).day("1.2")
    assert check(house, syllabus_of(house), lambda what, *_: told.append(what), only=[day]) == []
    assert not [what for what in told if what.startswith("1.1")]
    assert "1.2.2 double blank" in told


Change = Callable[[House], None]


def suite(house: House, day: int) -> Path:
    return house.suites / f"test_week_1_day_{day}.py"


def solution(house: House, module: str) -> Path:
    [file] = house.root.glob(f"tests/second_solutions/*/{module}.py")
    return file


def test_a_second_solution_may_have_only_the_exercises_and_new_helpers(house: House) -> None:
    """The starter has the rest: here `Counter.__init__`."""
    solution(house, "counting").write_text(
        "class Counter:\n"
        "    def count(self):\n        self.value = self.more()\n        return self.value\n\n"
        "    def more(self):\n        return self.value + 1\n",
        "utf-8",
    )
    assert failing_solutions(house, syllabus_of(house).days) == []


LONG = "y = x\n    z = y + y\n    x = 0\n    return z + x"
SUM_OF_PART = """
from common.numbers import FIVE
from tiny_llm.adding import add


def test_task_1_of_a_part() -> None:
    \"\"\"Oracle: by hand.\"\"\"
    assert add(2, 3) == FIVE
"""


def give_part(
    house: House, part: str = SUM_OF_PART, numbers: str = "FIVE = 5\n", imported: str = "*"
) -> None:
    """Let the suite of day 1.1 have a second file, and a number from what all suites share."""
    for name, text in {"week_1_day_1/sums.py": part, "common/numbers.py": numbers}.items():
        file = house.suites / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    if imported:
        replace(suite(house, 1), "import add\n", f"import add\nfrom week_1_day_1.sums import {imported}\n")


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
        "suites: week_9_day_1/: belongs to no day",
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
        "second solution: tests/second_solutions/week_1_day_2/halving.py: is no module of a day",
    ),
    "a second solution that is the reference's": (
        lambda h: [
            replace(h.reference / "doubling.py", "return add(x, x)", LONG),
            replace(solution(h, "doubling"), "return 2 * x", f'"""Mine."""\n    {LONG}'),
        ],
        "second solution: 1.2, doubling.py: double: the reference's code",
    ),
    "a part that looks into private parts": (
        lambda h: give_part(h, SUM_OF_PART.replace("== FIVE", "== FIVE._value")),
        "private: week_1_day_1/sums.py, line 8: ._value is private",
    ),
    "a part of another day": (
        lambda h: give_part(h, "from week_1_day_2 import sums\n"),
        "imports: week_1_day_1/sums.py, line 1: week_1_day_2 is not for a suite",
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
        "leak: 1.1, adding.py: a line of add is left: return sum((one, other))",
    ),
    "a helper that gives the solution away": (
        lambda h: replace(
            h.reference / "counting.py",
            "    return x\n",
            "    self = Counter()\n    return add(self.value, 1)\n",
        ),
        "leak: 1.2, counting.py: a line of Counter._next is left: return add(self.value, 1)",
    ),
    "a removed helper that another function of its module calls": (
        lambda h: replace(h.reference / "counting.py", "    return x\n", "    return Counter()._next()\n"),
        "starter: 1.2, counting.py: given calls Counter._next, which is removed",
    ),
    "a removed helper that another module calls": (
        lambda h: replace(
            h.reference / "doubling.py",
            "    return add(x, x)\n",
            "    from .counting import Counter\n\n    return Counter()._next() + 2 * x - 1\n",
        ),
        "starter: 1.2, counting.py: doubling.py calls Counter._next, which is removed",
    ),
    "a day without tests": (
        lambda h: suite(h, 2).unlink(),
        "suites: test_week_1_day_2.py: the day has no tests",
    ),
    "tests of no day": (
        lambda h: (h.suites / "test_week_9_day_1.py").touch(),
        "suites: test_week_9_day_1.py: belongs to no day",
    ),
    "a suite that imports the reference": (
        lambda h: replace(suite(h, 1), "from tiny_llm.adding", "from tiny_llm_ref.adding"),
        "imports: test_week_1_day_1.py, line 3: tiny_llm_ref.adding is not for a suite",
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
        "oracle: test_week_1_day_1.py: test_task_1_two_and_three names none",
    ),
    "a test without a task": (
        lambda h: replace(suite(h, 1), "test_task_1_two", "test_two"),
        "names: test_week_1_day_1.py: test_two_and_three does not say which task",
    ),
}


@pytest.mark.parametrize("what", STATIC)
def test_a_rule_that_is_read_bites(house: House, what: str) -> None:
    change, message = STATIC[what]
    change(house)
    assert any(message in str(problem) for problem in static_problems(house, syllabus_of(house)))


def test_a_suite_of_two_files_runs_whole_and_a_failure_shows_the_file(
    house: House, capfd: pytest.CaptureFixture[str]
) -> None:
    give_part(house)
    assert not static_problems(house, syllabus_of(house))
    assert run_reference(house, [suite(house, 1)], []) == 0
    assert "2 passed" in capfd.readouterr().out
    replace(house.suites / "week_1_day_1/sums.py", "== FIVE", "== 1 + FIVE")
    assert run_reference(house, [suite(house, 1)], []) == 1
    out = capfd.readouterr().out
    assert "tests_refsol/week_1_day_1/sums.py:8" in out
    assert "assert 5 == (1 + 5)" in out


@pytest.mark.parametrize("name", ["week_1_day_1/sums.py", "common/numbers.py"])
def test_a_day_is_tested_again_when_any_file_of_its_suite_changes(house: House, name: str) -> None:
    give_part(house)
    start(house, syllabus_of(house).day("1.1"))
    remember(house, syllabus_of(house).day("1.1"), passed=True)
    with (house.suites / name).open("a", encoding="utf-8") as file:
        file.write("\nSIX = 6\n")
    assert result(house, syllabus_of(house).day("1.1")) is Result.STALE
    assert changed_files(house, syllabus_of(house).day("1.1")) == [name]
    assert result(house, syllabus_of(house).day("1.2")) is Result.UNKNOWN


def test_counting_blocks_is_no_assertion_of_their_ids(house: House) -> None:
    replace(suite(house, 1), "add(2, 3) == 5", "add(2, 3) == 5 and len(add.blocks) == 2")
    assert not [p for p in static_problems(house, syllabus_of(house)) if p.rule == "block ids"]


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
        "blank: 1.2.2: fails without its message",
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


@pytest.mark.parametrize("what", [name for name in DYNAMIC if "imported" not in name])
def test_a_rule_that_is_run_bites(house: House, what: str) -> None:
    change, message = DYNAMIC[what]
    change(house)
    if "later day" in what:  # keep the two modules from calling each other in a circle
        replace(house.reference / "doubling.py", "add(x, x)", "2 * x")
        replace(house.reference / "doubling.py", "from .adding import add\n\n\n", "\n")
    assert any(message in problem for problem in problems_of(house))


def test_a_starter_that_cannot_be_imported_is_found(house: House) -> None:
    replace(house.reference / "adding.py", "def given", "FIVE = add(2, 3)\n\n\ndef given")
    assert any("starter: 1.1: cannot be imported" in problem for problem in problems_of(house))


def test_a_starter_that_is_not_formatted_is_found(house: House) -> None:
    replace(house.reference / "adding.py", "    return x\n", "    return  x\n")
    assert any("starter: 1.1: is not formatted" in problem for problem in problems_of(house))


# ---- kernels in C++ ----

KERNEL = """// A kernel.
#include "kernels.h"

namespace tiny_llm::TINY_LLM_ISA {

// ---- helpers ----

/// Doubles.
template <typename T>
static T helper(T x) {
  return x + x;

}

// ---- the rest ----

/// Given.
struct Kept {
  int x;
};

/// Twice.
int twice(const Kept& job, int64_t end) {
  if (end) {

    return helper(job.x);
  }
  return 0;
}

}  // namespace tiny_llm::TINY_LLM_ISA
"""


def test_a_kernel_is_blanked_part_by_part() -> None:
    blank = cpp.blanked(KERNEL, ["twice"], ["helper"], "2.4.4 twice.cpp")
    assert "helper" not in blank
    assert "// ---- helpers ----" not in blank
    assert '/// Twice.\nint twice(const Kept& job, int64_t end) {\n#error "2.4.4 twice.cpp"\n}\n\n}' in blank
    assert "/// Given.\nstruct Kept {\n  int x;\n};" in blank
    with pytest.raises(CourseError, match="there is no thrice"):
        cpp.blanked(KERNEL, ["thrice"], [], "m")


def test_every_kernel_of_the_course_begins_as_a_file_that_says_what_is_to_do(tmp_path: Path) -> None:
    here = House.here().with_overlay(tmp_path)
    syllabus = syllabus_of(here)
    days = [day for day in syllabus.days if day.kernels]
    assert [day.id for day in days] == ["2.4", "2.5"]
    for day in days:
        [option] = [line for line in tasks(here, day).splitlines() if line.startswith("option:")]
        assert option.startswith(f"option:  {day.id}.{len(day.exercises) + 1}, if you like: ")
        [file] = cpp.start_kernels(here, day)
        run = cpp.compiles(here, file.read_text("utf-8"))
        assert run.returncode
        assert day.kernels[0].message in run.stderr
        with pytest.raises(CourseError, match="is there already"):
            cpp.start_kernels(here, day)
    assert "[quantized_matmul.cpp, not built]" in map_text(here, syllabus)
    with pytest.raises(CourseError, match=r"quantized_matmul\.cpp is not in your library yet"):
        run_day(here, syllabus, days[0], [])
    with pytest.raises(CourseError, match=r"quantized_matmul\.cpp does not compile\nquantized_matmul\.cpp:"):
        cpp.build(here, syllabus)
    with pytest.raises(CourseError, match=r"day 1\.1 has no option in C\+\+"):
        cpp.start_kernels(here, syllabus.day("1.1"))
    assert len(set_aside(here, days[0])) == 1
    [flash] = cpp.own_kernels(here, syllabus)
    assert flash.name == "flash_attention"
    library = tmp_path / "_kernels.so"
    library.touch()
    assert cpp.build_of(here, flash) is cpp.Build.DONE
    os.utime(tmp_path / flash.file, ns=(0, library.stat().st_mtime_ns + 1))
    assert "[flash_attention.cpp, newer than your library]" in map_text(here, syllabus)
    findings = {finding.what: finding for finding in examine(here, syllabus)}
    assert not findings[flash.file].ok
    assert "pdm run build-kernels" in findings[flash.file].advice


def test_the_option_in_cpp_says_what_to_read_and_can_be_left(tmp_path: Path) -> None:
    begun = run(["start", "2.5", "--cpp"], tmp_path)
    for words in ("Attention in tiles", "not needed", "kernels.h: FlashJob", "vec.h", "namespace", "absorb"):
        assert words in begun.stdout, begun.stderr
    assert (tmp_path / "flash_attention.cpp").read_text("utf-8").startswith("// 2.5.3: write absorb and ")
    assert "pdm run diff 2.5 --anyway" in run(["hint", "2.5.3", "3"], tmp_path).stdout
    assert "the reference's flash_attention.cpp runs" in run(["skip", "2.5.3"], tmp_path).stdout
    assert [file.name for file in tmp_path.iterdir()] == ["flash_attention.cpp.1.bak"]
    assert run(["skip", "2.5.3"], tmp_path).stderr.startswith("error: not started: ")


PLAIN_MATMUL = """
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item % job.tiles(), first = item / job.tiles() * MatmulJob::ROW_BLOCK;
    const int64_t last = first + MatmulJob::ROW_BLOCK < job.M ? first + MatmulJob::ROW_BLOCK : job.M;
    const int64_t groups = job.K / GROUP, outputs = job.N - tile * TILE_OUTPUTS;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t o = 0; o < TILE_OUTPUTS && o < outputs; ++o) {
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) {
          const uint8_t* record = job.packed + (tile * groups + g) * record_bytes(job.bits, job.wide);
          const auto* narrow = reinterpret_cast<const uint16_t*>(record) + o;
          const auto* wide = reinterpret_cast<const float*>(record) + o;
          const float scale = job.wide ? wide[0] : load_first_as<Float16>(narrow, 1)[0];
          const float bias =
              job.wide ? wide[TILE_OUTPUTS] : load_first_as<Float16>(narrow + TILE_OUTPUTS, 1)[0];
          const uint8_t* quants = record + header_bytes(job.wide);
          int32_t products = 0;
          for (int k = 0; k < GROUP; ++k) {
            const int q = weight_quant(quants, job.bits, o, k);
            products += q * activation_quant(job, row, g, k);
          }
          const GroupScale& x = job.groups[place_of_group(row, g, groups)];
          sum += x.scale * (scale * static_cast<float>(products) + bias * x.sum);
        }
        job.out[row * job.N + tile * TILE_OUTPUTS + o] = sum;
      }
    }
  }"""


@pytest.mark.install
@pytest.mark.skipif(not tiny_llm_kernels.available(), reason="no C++ compiler")
def test_a_kernel_of_the_learners_runs_in_place_of_the_references(tmp_path: Path) -> None:
    """A plain solution is built into a library of its own, and passes its day (about a minute)."""
    assert run(["start", "2.4", "--cpp"], tmp_path).returncode == 0
    replace(
        tmp_path / "quantized_matmul.cpp",
        f'\n#error "{syllabus_of(House.here()).exercise("2.4.6").message}"',
        PLAIN_MATMUL,
    )
    built = run(["build-kernels"], tmp_path)
    assert "it runs in place of the reference's kernels" in built.stdout, built.stderr
    passing = run(["test", "2.4"], tmp_path)
    assert passing.returncode == 0, passing.stdout
    assert "compiled kernels: yours" in passing.stdout
    replace(tmp_path / "quantized_matmul.cpp", "products += q *", "products += 2 * q *")
    assert run(["test", "2.4"], tmp_path).returncode == 1  # not in the library yet
    assert run(["build-kernels"], tmp_path).returncode == 0
    failing = run(["test", "2.4"], tmp_path)
    assert failing.returncode == 1
    assert "first: 2.4.6 quantized_matmul" in failing.stdout


# ---- the commands, on the real course ----


def run(arguments: list[str], overlay: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tiny_llm_course", *arguments],
        env={**os.environ, "TINY_LLM_OVERLAY": str(overlay)},
        text=True,
        capture_output=True,
        check=False,
    )


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
            "your quantize.py is left out here: it unpacks every matrix in each pass; day 2.4 shows it",
            False,
        ),
        ("2.4", "this takes some seconds with your quantize.py: it unpacks every matrix in each pass", True),
    ],
)
def test_a_slow_module_runs_in_its_own_day_only(tmp_path: Path, tried: str, says: str, is_mine: bool) -> None:
    """The learner's other modules run in every day."""
    reference = House.here().reference
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


def test_days_without_a_slow_module_say_nothing_of_it(tmp_path: Path) -> None:
    ran = run(["try", "2.3"], tmp_path)
    assert "quantize.py" not in ran.stdout
    assert ran.stdout.splitlines()[1].startswith("a simulation"), ran.stderr


def test_the_real_course_can_be_read() -> None:
    here = House.here()
    assert static_problems(here, read_syllabus(here.syllabus)) == []


def test_the_message_of_every_blank_is_known_as_one() -> None:
    """Days have more than nine tasks: `3.4.10` is one of them."""
    from tiny_llm_course import provenance

    here = House.here()
    messages = [e.message for day in read_syllabus(here.syllabus).days for e in day.exercises]
    assert any(message.startswith("3.4.10 ") for message in messages)
    assert [message for message in messages if not provenance.OF_A_BLANK.match(message)] == []


def test_every_startable_day_has_something_to_try_and_to_compare() -> None:
    here = House.here()
    days = [day.id for day in read_syllabus(here.syllabus).days if not day.is_to_come]
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
    assert "wait for 1.1.1 softmax: pdm run hint 1.1.1" in failing.stdout
    tried = run(["try", "1.1"], tmp_path).stderr
    assert re.search(r"attention\.py, line \d+: 1\.1\.2 causal_mask: ", tried), tried
    assert run(["skip", "1.1"], tmp_path).returncode == 0
    passing = run(["test", "--week", "1", "--day", "1"], tmp_path)
    assert passing.returncode == 0, passing.stdout
    assert "yours: attention.py" in passing.stdout
    assert "day 1.1 has nothing to compare: both sides" in run(["compare", "1.1"], tmp_path).stdout
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
        (["hint", "1.1.9"], "there is no exercise '1.1.9': day 1.1 has 1.1.1 to 1.1.3"),
        (["diff", "1.1"], "not started"),
        (["reset", "1.1"], "nothing to reset"),
        (["restore", "1.1"], "nothing of day 1.1 was moved aside"),
        (["test", "attention.py"], "not started: pdm run start 1.1"),
        (["skip", "1.1.1"], "not started: pdm run start 1.1"),
        (["compare", "1.2"], "not started"),
        (["start"], "Missing argument 'DAY'"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TINY_LLM_OVERLAY", str(tmp_path))
    assert door.run(arguments) in (1, 2)
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_every_command_has_a_help_that_teaches(capsys: pytest.CaptureFixture[str]) -> None:
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
        assert door.run([command, "--help"]) == 0
        assert len(capsys.readouterr().out.split()) > 20
    scripts = (ROOT / "pyproject.toml").read_text("utf-8")
    for command in commands:
        assert f'{command} = "python -m tiny_llm_course {command}"' in scripts
