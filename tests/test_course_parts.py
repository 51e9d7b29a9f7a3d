"""Days that are cut into parts: one part is started, tested, skipped and reset by itself.

The course is that of `toy_course`, with four exercises on day 1.2 in three parts; one module holds
exercises of all of them.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_llm_course import days as demonstrations
from tiny_llm_course import main as door
from tiny_llm_course.blame import find_blame
from tiny_llm_course.days import function_name, has_own
from tiny_llm_course.errors import CourseError
from tiny_llm_course.house import House
from tiny_llm_course.legend import legend
from tiny_llm_course.may_use import unit_may_use
from tiny_llm_course.outcome import Outcome, begin_here
from tiny_llm_course.overview import map_text, progress, progress_text
from tiny_llm_course.progress import Result, State, first_to_do, remember, result, state
from tiny_llm_course.rules import static_problems
from tiny_llm_course.runs import run_suites
from tiny_llm_course.source import with_blank, with_function, without
from tiny_llm_course.starter import restore, set_aside, skip, start, starter
from tiny_llm_course.syllabus import Syllabus, read_syllabus
from tiny_llm_course.testing import run_day, run_started
from tiny_llm_course.units import Cut, Part, exercise_range
from tiny_llm_course.views import after_reset, begun, difference, how_again, moved_aside, tasks
from toy_course import ADDING, HINTS, house, problems_of, replace, run, suite, syllabus_of, write

__all__ = ["house"]

PARTS = f"""
[[day.part]]
id = "a"
title = "Upwards"
works = "counters that go up"
exercises = [1]
[[day.part]]
id = "b"
title = "Faster"
exercises = [2, 3]
[[day.part]]
id = "c"
title = "And back"
works = "counters that go down"
exercises = [4]
[[day.exercise]]
name = "counting.Counter.count"
{HINTS}
[[day.exercise]]
name = "counting.Counter.leap"
{HINTS}
[[day.exercise]]
name = "doubling.double"
{HINTS}
[[day.exercise]]
name = "counting.Counter.back"
{HINTS}
"""

COUNTING = '''"""Counters."""

from .adding import add


class Counter:
    """Counts up from 0."""

    def __init__(self) -> None:
        self.value = 0

    def count(self) -> int:
        """Add one and return the value.

        >>> Counter().count()
        1
        """
        self.value = self._next()
        return self.value

    def leap(self, steps: int) -> int:
        """Count as often as `steps` says, and return the value.

        >>> Counter().leap(3)
        3
        """
        for _ in range(steps):
            self.count()
        return self.value

    def back(self) -> int:
        """Take one away and return the value.

        >>> Counter().back()
        -1
        """
        self.value = self._before()
        return self.value

    def _next(self) -> int:
        return add(self.value, 1)

    def _before(self) -> int:
        return add(self.value, -1)


def given(x: int) -> int:
    """Nothing to do here."""
    return x
'''

SUITE = '''"""Day 1.2."""

from tiny_llm.counting import Counter
from tiny_llm.doubling import double


def test_task_1_counts() -> None:
    """Oracle: by hand."""
    counter = Counter()
    assert [counter.count(), counter.count()] == [1, 2]


def test_task_2_leaps() -> None:
    """Oracle: by hand."""
    assert Counter().leap(3) == 3


def test_task_3_doubles() -> None:
    """Oracle: by hand."""
    assert double(4) == 8


def test_task_4_goes_back() -> None:
    """Oracle: by hand."""
    assert Counter().back() == -1
'''


def solved(source: str, name: str, body: str) -> str:
    """The source with a learner's own body in a function."""
    return with_blank(source, name, "mine").replace('        raise NotImplementedError("mine")', body)


COUNT, LEAP, BACK = (
    "        self.value += 1\n        return self.value",
    "        self.value += steps\n        return self.value",
    "        self.value -= 1\n        return self.value",
)


@pytest.fixture
def course(house: House) -> House:
    """The house of `toy_course`, its day 1.2 cut into parts."""
    text = house.syllabus.read_text("utf-8")
    first, rest = text.split('remove = ["counting.Counter._next"]')
    removed = 'remove = ["counting.Counter._next", "counting.Counter._before"]'
    later = rest[rest.index('[[day]]\nid = "1.3"') :]
    text = f"{first}{removed}{PARTS}\n{later}"
    house.syllabus.write_text(text, "utf-8")
    (house.reference / "counting.py").write_text(COUNTING, "utf-8")
    suite(house, 2).write_text(SUITE, "utf-8")
    second = COUNTING
    for name, body in (("count", COUNT), ("leap", LEAP), ("back", BACK)):
        second = solved(second, f"Counter.{name}", body)
    (house.root / "tests/second_solutions/week_1_day_2/counting.py").write_text(second, "utf-8")
    return house


def part(house: House, letter: str) -> Part:
    return syllabus_of(house).day("1.2").part(letter)


def own(house: House, module: str = "counting") -> str:
    return (house.overlay / f"{module}.py").read_text("utf-8")


def states(house: House) -> list[State]:
    return [state(house, exercise) for exercise in syllabus_of(house).day("1.2").exercises]


# ---- the syllabus ----


def test_a_part_knows_its_day_its_exercises_and_their_modules(course: House) -> None:
    syllabus = syllabus_of(course)
    day = syllabus.day("1.2")
    assert [one.id for one in day.parts] == ["1.2a", "1.2b", "1.2c"]
    second = syllabus.unit("1.2b")
    assert isinstance(second, Part)
    assert (second.day, second.title, second.works) == (day, "Faster", None)
    assert [exercise.id for exercise in second.exercises] == ["1.2.2", "1.2.3"]
    assert second.modules == ("counting", "doubling")
    assert [one.id for one in second.later] == ["1.2c"]
    assert syllabus.day("1.2b") == day
    assert syllabus.day("1.1").parts == ()
    assert exercise_range(second.exercises) == "1.2.2 to 1.2.3"
    assert exercise_range(day.parts[0].exercises) == "1.2.1"


@pytest.mark.parametrize(
    ("wanted", "unit"),
    [("1.2", "1.2"), ("1.2.3", "1.2b"), ("doubling.py", "1.2b"), ("counting", "1.2"), ("adding.py", "1.1")],
)
def test_an_exercise_or_a_file_means_the_smallest_unit_that_has_all_of_it(
    course: House, wanted: str, unit: str
) -> None:
    assert syllabus_of(course).to_start(wanted).id == unit


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("1.2z", "1.2z is no part of day 1.2: it has 1.2a to 1.2c"),
        ("1.2B", "1.2B is no part of day 1.2: it has 1.2a to 1.2c"),
        ("1.2ab", "1.2ab is no part of day 1.2: it has 1.2a to 1.2c"),
        ("1.1a", "1.1a is no part of day 1.1: it has no parts"),
        ("7.7a", "there is no day 7.7: `pdm run map` shows all"),
        ("1.3a", "1.3a is no part of day 1.3: it has no parts"),
    ],
)
def test_a_part_that_there_is_not_is_told(course: House, wanted: str, message: str) -> None:
    with pytest.raises(CourseError) as raised:
        syllabus_of(course).to_start(wanted)
    assert str(raised.value) == message


def test_the_next_of_a_part_is_the_next_part_and_then_the_next_day(course: House) -> None:
    replace(course.syllabus, 'title = "Later"', 'title = "Later"\nmodules = ["given"]')
    text = course.syllabus.read_text("utf-8")
    course.syllabus.write_text(f'{text}[[day.exercise]]\nname = "given.f"\n{HINTS}\n', "utf-8")
    syllabus = syllabus_of(course)
    order = ["1.1", "1.2", "1.3"]
    assert [one.id for day in order if (one := syllabus.after(syllabus.day(day)))] == ["1.2", "1.3"]
    following = [syllabus.after(one) for one in syllabus.day("1.2").parts]
    assert [one.id for one in following if one is not None] == ["1.2b", "1.2c", "1.3"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "b"', 'id = "c"', r"day 1\.2 has a part 'c' where 'b' was expected"),
        ('id = "b"', "id = 2", r"day 1\.2 has a part 2 where 'b' was expected"),
        ('title = "Faster"', "", r"day 1\.2: part b has no text 'title'"),
        ('title = "Faster"', 'title = "F"\nwork = "x"', r"day 1\.2: part b has the unknown keys work"),
        ('title = "Faster"', 'title = "F"\nworks = 1', r"day 1\.2: part b has works = 1, expected a text"),
        ("[2, 3]", "[]", r"part b has exercises = \[\], expected numbers of tasks such as \[1, 2\]"),
        ("[2, 3]", '["2", "3"]', r"part b has exercises = \['2', '3'\], expected numbers"),
        ("[2, 3]", "[true, 3]", r"part b has exercises = \[True, 3\], expected numbers"),
        ("[2, 3]", "2", r"part b has exercises = 2, expected numbers"),
        ("[2, 3]", "[2]", r"the parts of day 1\.2 have the exercises 1, 2, 4: expected 1 to 4, each once"),
        ("[2, 3]", "[3, 2]", r"have the exercises 1, 3, 2, 4: expected 1 to 4, each once, in order"),
        ("[2, 3]", "[2, 2, 3]", r"have the exercises 1, 2, 2, 3, 4: expected 1 to 4"),
        ("[2, 3]", "[2, 3, 9]", r"have the exercises 1, 2, 3, 9, 4: expected 1 to 4"),
    ],
)
def test_a_mistake_in_a_part_is_named(course: House, old: str, new: str, message: str) -> None:
    replace(course.syllabus, old, new)
    with pytest.raises(CourseError, match=message):
        syllabus_of(course)


# ---- source ----


def test_a_function_that_was_put_in_is_taken_out_without_a_trace() -> None:
    for name, other in (("Counter._next", COUNTING), ("helper", "def helper(x):\n    return x\n")):
        begun = COUNTING if name == "helper" else without(COUNTING, name)
        assert without(with_function(begun, other, name), name) == begun


def test_one_function_is_made_blank_and_nothing_else_changes() -> None:
    odd = COUNTING.replace("def given", "\n\n\n# mine   \ndef given").replace("return x\n", "return   x")
    blank = with_blank(odd, "Counter.leap", "1.2.2 Counter.leap: book")
    before, after = odd.split('        3\n        """\n')
    assert blank.startswith(f'{before}        3\n        """\n        raise NotImplementedError("1.2.2')
    assert blank.endswith(after.split("            self.count()\n        return self.value\n")[1])


# ---- start ----


def test_a_part_begins_behind_the_references_code_of_earlier_ones_and_before_blanks(course: House) -> None:
    """The code of a later part would be read before it is looked for."""
    done = start(course, part(course, "b"))
    assert [file.name for file in done.files] == ["counting.py", "doubling.py"]
    assert states(course) == [State.SKIPPED, State.BLANK, State.BLANK, State.BLANK]
    assert "    # skipped: the reference's code\n    def _next" in own(course), "what is called is there"
    assert "_before" not in own(course), "a helper of a later exercise would give it away"
    done = start(course, part(course, "c"))
    assert (done.files, done.blanked) == ([], [])
    done = start(course, part(course, "a"))
    assert (done.files, [one.id for one in done.blanked]) == ([], ["1.2.1"])
    assert states(course) == [State.BLANK] * 4


@pytest.mark.parametrize("removed", [("_add", "_before"), ("_before", "_add")])
def test_a_helper_that_only_a_helper_calls_goes_with_it(course: House, removed: tuple[str, str]) -> None:
    called = "return add(self.value, -1)"
    more = "return self._add(-1)\n\n    def _add(self, x: int) -> int:\n        return add(self.value, x)"
    replace(course.reference / "counting.py", called, more)
    names = ", ".join(f'"counting.Counter.{name}"' for name in removed)
    replace(course.syllabus, '"counting.Counter._before"', names)
    start(course, part(course, "b"))
    skip(course, part(course, "c").day, part(course, "c").exercises)
    before = own(course)
    assert "def _add" in before
    start(course, part(course, "c"))
    assert "_add" not in own(course)
    assert "_before" not in own(course)
    skip(course, part(course, "c").day, part(course, "c").exercises)
    assert own(course) == before


def test_a_part_in_files_of_its_own_writes_only_these(course: House) -> None:
    replace(course.syllabus, "exercises = [1]", "exercises = [1, 2]")
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [3]")
    done = start(course, part(course, "b"))
    assert [file.name for file in done.files] == ["doubling.py"]
    assert own(course, "doubling") == starter(course, "doubling", syllabus_of(course).day("1.2"))


def test_the_next_part_leaves_the_learners_work_as_it_is_byte_for_byte(course: House) -> None:
    start(course, part(course, "b"))
    skip(course, part(course, "c").day, part(course, "c").exercises)
    mine = solved(own(course), "Counter.leap", LEAP) + "\n\n\n\n# mine   \nTABLE = [1,2,\n  3]"
    write(course, "counting", mine)
    start(course, part(course, "c"))
    blank = 'raise NotImplementedError("1.2.4 Counter.back: pdm run hint 1.2.4")'
    helper = "\n    # skipped: the reference's code\n"
    helper += "    def _before(self) -> int:\n        return add(self.value, -1)\n"
    body = "# skipped: the reference's code\n        self.value = self._before()\n        return self.value"
    assert own(course) == mine.replace(body, blank).replace(helper, "")


def test_what_the_learner_has_written_stays_without_again(course: House) -> None:
    start(course, syllabus_of(course).day("1.2"))
    mine = solved(own(course), "Counter.leap", LEAP)
    write(course, "counting", mine)
    assert start(course, part(course, "b")).is_nothing
    skip(course, part(course, "b").day, part(course, "b").exercises)
    done = start(course, part(course, "b"))
    assert [one.id for one in done.blanked] == ["1.2.3"]
    assert begun(course, part(course, "b"), done) == [
        "blank again in src/tiny_llm/doubling.py: 1.2.3 double",
        "stays as it is: 1.2.2 Counter.leap",
    ]
    assert own(course) == mine


def test_the_references_code_that_the_learner_has_changed_is_the_learners(course: House) -> None:
    start(course, part(course, "c"))
    replace(course.overlay / "counting.py", "range(steps)", "range(0, steps)")
    before = own(course)
    done = start(course, part(course, "b"))
    assert [one.id for one in done.blanked] == []
    assert own(course) == before
    assert "stays as it is: 1.2.2 Counter.leap" in begun(course, part(course, "b"), done)


def test_again_sets_a_copy_aside_and_blanks_only_the_part(course: House) -> None:
    start(course, syllabus_of(course).day("1.2"))
    mine = solved(solved(own(course), "Counter.count", COUNT), "Counter.leap", LEAP)
    write(course, "counting", mine)
    write(course, "doubling", "def double(x):\n    return 2 * x\n")
    aside = set_aside(course, part(course, "b"))
    assert [file.name for file in aside] == ["counting.py.1.bak", "doubling.py.1.bak"]
    assert aside[0].read_text("utf-8") == mine
    again = "the reference's again: doubling.py, 1.2.2 in counting.py"
    assert after_reset(part(course, "b"), aside) == again
    assert [moved_aside(course, file) for file in aside] == [
        "copied aside: src/tiny_llm/counting.py.1.bak; counting.py keeps what is of other parts",
        "moved aside: src/tiny_llm/doubling.py.1.bak",
    ]
    start(course, part(course, "b"))
    assert states(course) == [State.WRITTEN, State.BLANK, State.BLANK, State.BLANK]
    assert own(course) == with_blank(mine, "Counter.leap", part(course, "b").exercises[0].message)


def test_reset_of_a_part_gives_the_references_code_and_restore_the_learners(course: House) -> None:
    start(course, syllabus_of(course).day("1.2"))
    mine = solved(solved(own(course), "Counter.count", COUNT), "Counter.leap", LEAP)
    write(course, "counting", mine)
    set_aside(course, part(course, "b"))
    assert states(course) == [State.WRITTEN, State.SKIPPED, State.NOT_STARTED, State.BLANK]
    assert set_aside(course, part(course, "b")) == [], "there is nothing of it any more"
    assert len(restore(course, part(course, "b"))) == 2
    assert own(course) == mine
    set_aside(course, part(course, "a"))
    set_aside(course, part(course, "c"))
    set_aside(course, part(course, "b"))
    assert states(course) == [State.NOT_STARTED] * 4, "a file without anything of the learner's goes"


def test_a_function_that_lost_its_name_stops_a_reset(course: House) -> None:
    start(course, syllabus_of(course).day("1.2"))
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    replace(course.overlay / "counting.py", "def leap", "def jump")
    before = own(course)
    with pytest.raises(CourseError, match=r"counting\.py has no Counter\.leap \(exercise 1\.2\.2\)"):
        set_aside(course, part(course, "b"))
    assert own(course) == before
    assert not list(course.overlay.glob("*.bak"))


def test_the_day_after_a_part_is_blank_as_a_whole(course: House) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, part(course, "b"))
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    (course.overlay / "doubling.py").unlink()
    done = start(course, day)
    assert [file.name for file in done.files] == ["doubling.py"]
    assert [one.id for one in done.blanked] == ["1.2.1"]
    assert states(course) == [State.BLANK, State.WRITTEN, State.BLANK, State.BLANK]


def test_a_day_without_parts_keeps_what_was_skipped(course: House) -> None:
    day = syllabus_of(course).day("1.1")
    start(course, day)
    skip(course, day, day.exercises)
    with pytest.raises(CourseError, match="started already"):
        start(course, day)


def test_the_day_says_where_its_parts_end_and_a_part_says_only_its_own(course: House) -> None:
    day = syllabus_of(course).day("1.2")
    whole, second = tasks(course, day).splitlines(), tasks(course, day.part("b")).splitlines()
    assert whole[:4] == [
        "1.2a  Upwards",
        "    1.2.1  counting.py  Counter.count()",
        "1.2b  Faster",
        "    1.2.2  counting.py  Counter.leap(steps)",
    ]
    assert "parts:   1.2a to 1.2c, about an evening each: pdm run start 1.2a shows only that one" in whole
    assert "test:    pdm run test 1.2a; pdm run test 1.2 tests all parts" in whole
    assert [line for line in second if "1.2." in line] == [
        "  1.2.2  counting.py  Counter.leap(steps)",
        "  1.2.3  doubling.py  double(x)",
        "hints:   pdm run hint 1.2.2",
    ]
    assert "test:    pdm run test 1.2b" in second
    assert [one.name for one in unit_may_use(course, day)] == ["add"]
    assert [one.name for one in unit_may_use(course, day.part("c"))] == ["add"], "through its helper"
    replace(course.reference / "counting.py", "add(self.value, -1)", "self.value - 1")
    assert unit_may_use(course, day.part("c")) == []
    assert legend(course, day.part("c")) == []


def test_a_part_that_is_there_and_blank_is_shown_once_more(course: House) -> None:
    start(course, syllabus_of(course).day("1.2"))
    assert begun(course, part(course, "a"), start(course, part(course, "a"))) == [
        "it is there already, blank"
    ]


def test_a_part_that_is_partly_written_is_shown_with_its_states(course: House) -> None:
    start(course, syllabus_of(course).day("1.2"))
    solution = solved(own(course), "Counter.leap", LEAP)
    write(course, "counting", solution)
    done = start(course, part(course, "b"))
    assert own(course) == solution
    assert begun(course, part(course, "b"), done) == ["part 1.2b is started already: nothing was changed"]
    shown = tasks(course, part(course, "b"))
    assert "1.2.2  counting.py  Counter.leap(steps): written\n" in shown
    assert "1.2.3  doubling.py  double(x): blank\n" in shown
    assert how_again(course, part(course, "b"), done) == [
        "anew:    pdm run start 1.2b --again (copies your files aside first)"
    ]
    assert how_again(course, part(course, "c"), start(course, part(course, "c"))) == [], "it is blank"


# ---- test ----


def test_a_part_passes_while_the_later_ones_are_blank(
    course: House, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(course)
    start(course, syllabus.day("1.2"))
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    assert run_day(course, syllabus, part(course, "a"), []) == 0
    out = capfd.readouterr().out
    assert "course: part 1.2a, Upwards" in out
    assert "1 passed, 3 deselected" in out
    assert "still blank" not in out, "only the part's own would be told"
    assert "part 1.2a passes: counters that go up.\n" in out
    assert "pdm run diff 1.2a" in out
    assert "pdm run start 1.2b     next: Faster\n" in out
    assert "pdm run try 1.2a" not in out, "the day's needs later parts"
    assert result(course, part(course, "a")) is Result.PASSING
    assert result(course, syllabus.day("1.2")) is Result.UNKNOWN


def test_a_part_in_the_middle_may_come_first(course: House, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert "what you chose passes; the whole part: pdm run test 1.2b" in capfd.readouterr().out
    assert run_day(course, syllabus, part(course, "b"), [], isolated=True) == 0


def test_the_day_passes_when_its_parts_do_and_later_work_makes_no_part_stale(course: House) -> None:
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


def test_the_parts_pass_when_the_day_does(course: House) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, day)
    skip(course, day, day.exercises)
    remember(course, day, passed=True)
    assert [result(course, one) for one in day.parts] == [Result.PASSING] * 3
    remember(course, day, passed=False)
    assert [result(course, one) for one in day.parts] == [Result.UNKNOWN] * 3


def test_a_run_of_the_day_says_which_parts_pass(course: House, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(course)
    day = syllabus.day("1.2")
    start(course, day)
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    assert run_day(course, syllabus, day, ["-x"]) == 1
    assert "parts that pass" not in capfd.readouterr().out, "it has not run all"
    assert run_day(course, syllabus, day, []) == 1
    assert "parts that pass: 1.2a\n" in capfd.readouterr().out
    assert [result(course, one) for one in day.parts] == [Result.PASSING, Result.FAILING, Result.FAILING]
    write(course, "doubling", "raise ValueError\n\n\ndef double(x):\n    return x\n")
    assert run_day(course, syllabus, day, []) != 0
    assert "parts that pass" not in capfd.readouterr().out, "the file cannot be imported"


def test_a_part_does_not_depend_on_a_file_of_later_parts_only(course: House) -> None:
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [2]")
    replace(course.syllabus, "exercises = [4]", "exercises = [3, 4]")
    day = syllabus_of(course).day("1.2")
    start(course, day)
    for one in day.parts:
        remember(course, one, passed=True)
    write(course, "doubling", "x = 1\n")
    assert [result(course, one) for one in day.parts] == [Result.PASSING, Result.PASSING, Result.STALE]


def test_the_tests_of_a_task_are_those_of_its_number(course: House) -> None:
    more = (
        '\n\ndef test_task_11_more() -> None:\n    """Oracle: by hand."""\n    assert Counter().back() == 1\n'
    )
    suite(course, 2).write_text(SUITE + more, "utf-8")
    chosen = run_suites(course, [suite(course, 2)], ["-q", "--tasks=1"], quiet=True)
    assert "1 passed, 4 deselected" in chosen.stdout
    both = run_suites(course, [suite(course, 2)], ["-q", "--tasks=1,11", "--tb=no"], quiet=True)
    assert "1 failed, 1 passed, 3 deselected" in both.stdout


def test_a_part_that_is_not_started_says_how_to_start_it(course: House) -> None:
    syllabus = syllabus_of(course)
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [2]")
    replace(course.syllabus, "exercises = [4]", "exercises = [3, 4]")
    with pytest.raises(CourseError, match=r"^not started: pdm run start 1\.2a \(writes counting\.py\)$"):
        run_day(course, syllabus, part(course, "a"), [])
    start(course, part(course, "a"))
    with pytest.raises(CourseError, match=r"day 1\.2 is started only in part: `pdm run test 1\.2a` and"):
        run_day(course, syllabus, syllabus_of(course).day("1.2"), [])


def test_without_a_day_the_parts_that_were_started_are_tested(
    course: House, capfd: pytest.CaptureFixture[str]
) -> None:
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [2]")
    replace(course.syllabus, "exercises = [4]", "exercises = [3, 4]")
    start(course, part(course, "a"))
    assert run_started(course, syllabus_of(course), []) == 1
    out = capfd.readouterr().out
    assert "course: part 1.2a" in out
    assert "course: part 1.2b" not in out, "it is blank, and the one before it comes first"
    assert "course: part 1.2c" not in out


def test_the_last_part_leads_to_the_day(course: House, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(course)
    start(course, part(course, "c"))
    write(course, "counting", solved(own(course), "Counter.back", BACK))
    assert run_day(course, syllabus, part(course, "c"), []) == 0
    assert "pdm run test 1.2       the whole day, of which not every part" in capfd.readouterr().out
    for one in syllabus.day("1.2").parts[:2]:
        remember(course, one, passed=True)
    write(course, "counting", own(course) + "\n\nmore = 1\n")
    remember(course, part(course, "c"), passed=True)
    assert run_day(course, syllabus, part(course, "c"), []) == 0
    out = capfd.readouterr().out
    assert "pdm run test 1.2       run the whole day once: files have changed since 1.2a" in out
    remember(course, part(course, "a"), passed=True)
    write(course, "doubling", "def double(x):\n    return 2 * x\n")
    remember(course, part(course, "b"), passed=True)
    assert run_day(course, syllabus, part(course, "c"), []) == 0
    assert "pdm run try 1.2        the whole day\n" in capfd.readouterr().out


# ---- whose fault ----


def failing(test: str) -> Outcome:
    return Outcome(1, (f"tests_refsol/test_week_1_day_2.py::{test}",))


def test_a_fault_of_another_part_in_another_file_is_found_there(
    course: House, capfd: pytest.CaptureFixture[str]
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
    assert "today's code is right: on the reference for everything else, test_task_3_doubles passes." in out
    assert "it fails with your counting.py (day 1.2): pdm run test 1.2" in out


def test_a_fault_of_another_part_in_the_same_file_is_found_too(course: House) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, day)
    wrong = solved(own(course), "Counter.count", "        return 7")
    calling = "        for _ in range(steps):\n            self.count()\n        return self.value"
    write(course, "counting", solved(wrong, "Counter.leap", calling))
    outcome = failing("test_task_2_leaps")
    found = find_blame(course, day.part("b"), outcome)
    assert found.exercise is not None
    assert found.exercise.id == "1.2.1"
    assert begin_here(outcome, day, found.exercise) == (
        "first: 1.2.1 Counter.count (1 of 1.2.2's tests fails): pdm run test 1.2.2 -x; pdm run hint 1.2.1"
    )


def test_a_learners_helper_may_have_the_name_of_one_of_the_references(course: House) -> None:
    """The reference's code called the learner's helper, so that the search blamed several exercises."""
    day = syllabus_of(course).day("1.2")
    start(course, day)
    wrong = solved(own(course), "Counter.count", COUNT)
    wrong = solved(wrong, "Counter.back", "        self.value = self._before(2)\n        return self.value")
    helper = "    def _before(self, steps: int) -> int:\n        return self.value - steps\n\n\ndef given"
    write(course, "counting", wrong.replace("\ndef given", helper))
    found = find_blame(course, day, failing("test_task_4_goes_back"))
    assert found.exercise is not None
    assert found.exercise.id == "1.2.4"


def test_what_is_skipped_calls_the_references_helper_and_not_the_learners(course: House) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, day)
    helper = "    def _before(self) -> int:\n        return 7\n\n\ndef given"
    write(course, "counting", own(course).replace("\ndef given", helper))
    skip(course, day, day.exercises)
    assert "self.value = self._before_of_reference()" in own(course)
    assert "        return add(self.value, -1)\n" in own(course)
    assert "    def _before(self) -> int:\n        return 7\n" in own(course)
    assert run_day(course, syllabus_of(course), day, []) == 0


# ---- what is shown ----


def test_a_hint_for_a_part_is_for_its_first_exercise_to_do(course: House) -> None:
    syllabus = syllabus_of(course)
    assert first_to_do(course, syllabus, "1.2b").id == "1.2.2"
    start(course, part(course, "b"))
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    assert first_to_do(course, syllabus, "1.2b").id == "1.2.3"
    assert first_to_do(course, syllabus, "1.2a").id == "1.2.1"
    assert first_to_do(course, syllabus, "1.2.4").id == "1.2.4"
    with pytest.raises(CourseError, match=r"no exercise '1\.2b\.9': part 1\.2b has 1\.2\.2 to 1\.2\.3"):
        first_to_do(course, syllabus, "1.2b.9")


def test_the_difference_of_a_part_leaves_the_others_out(course: House) -> None:
    with pytest.raises(CourseError, match=r"not started: pdm run start 1\.2b"):
        difference(course, part(course, "b"), anyway=True)
    start(course, syllabus_of(course).day("1.2"))
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    with pytest.raises(CourseError, match=r"part 1\.2b not tested: `pdm run test 1\.2b` first"):
        difference(course, part(course, "b"), anyway=False)
    shown = difference(course, part(course, "b"), anyway=True)
    assert "-        self.value += steps" in shown
    assert "+            self.count()" in shown
    assert "_next" not in shown
    assert "_before" not in shown
    assert "+    def _before" in difference(course, part(course, "c"), anyway=True)
    assert "+    def _next" not in difference(course, part(course, "c"), anyway=True)


def test_progress_and_map_show_the_parts(course: House) -> None:
    syllabus = syllabus_of(course)
    assert "1.2b" not in progress_text(course, syllabus), "not before the day is started"
    assert "    1.2b  Faster                               1.2.2 to 1.2.3: not started" in map_text(
        course, syllabus
    )
    write(course, "adding", ADDING)
    remember(course, syllabus.day("1.1"), passed=True)
    start(course, part(course, "b"))
    lines = progress_text(course, syllabus).splitlines()
    assert lines[1].startswith("1.2     [s...]  ")
    assert lines[2:5] == [
        "  1.2a  [s]     not tested  Upwards",
        "  1.2b  [..]    blank       Faster",
        "  1.2c  [.]     blank       And back",
    ]
    assert lines[-1] == "next: pdm run test 1.2b"
    remember(course, part(course, "b"), passed=True)
    rows = progress(course, syllabus)[1]["parts"]
    assert [(row["part"], row["done"]) for row in rows] == [("1.2a", False), ("1.2b", True), ("1.2c", False)]
    assert progress_text(course, syllabus).splitlines()[-1] == "next: pdm run test 1.2c"
    assert "1.2c  And back                             1.2.4: blank" in map_text(course, syllabus)


def test_a_part_may_have_something_of_its_own_to_show(
    course: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstrations, "__file__", str(tmp_path / "__init__.py"))
    assert not has_own(part(course, "b"), "show"), "a day may have no file yet"
    (tmp_path / "week_1_day_2.py").write_text("def show():\n    pass\n\n\ndef show_b():\n    pass\n", "utf-8")
    names = [function_name(part(course, letter), "show") for letter in "abc"]
    assert names == ["show", "show_b", "show"]
    assert function_name(syllabus_of(course).day("1.2"), "work") == "work"


# ---- the check ----


def test_a_sound_course_with_parts_has_no_problems(course: House) -> None:
    assert problems_of(course) == []


Change = Callable[[House], None]

DYNAMIC: dict[str, tuple[Change, str]] = {
    "a part that needs a later one": (
        lambda h: replace(h.reference / "counting.py", "            self.count()", "            self.back()"),
        "later part: 1.2b: fails while the parts after it are blank",
    ),
    "an exercise that only the tests of another part need": (
        lambda h: replace(suite(h, 2), "assert Counter().back() == -1", "assert Counter"),
        "blank: 1.2.4: part 1.2c passes although Counter.back is blank",
    ),
    "a part that cannot be imported": (
        lambda h: replace(h.reference / "counting.py", "def given", "ONE = Counter().leap(1)\n\n\ndef given"),
        "starter: 1.2b: cannot be imported",
    ),
}


@pytest.mark.parametrize("what", DYNAMIC)
def test_a_rule_about_parts_that_is_run_bites(course: House, what: str) -> None:
    change, message = DYNAMIC[what]
    change(course)
    if "only the tests of another" in what:
        replace(
            suite(course, 2),
            "assert Counter().leap(3) == 3",
            "assert Counter().leap(3) == 3\n    Counter().back()",
        )
    assert any(message in problem for problem in problems_of(course))


def test_a_test_that_no_part_runs_is_found(course: House) -> None:
    replace(suite(course, 2), "test_task_4_", "test_task_5_")
    found = [str(problem) for problem in static_problems(course, syllabus_of(course))]
    assert "parts: test_week_1_day_2.py: test_task_5_goes_back is about no exercise" in found


# ---- the commands, on the real course ----


@pytest.fixture
def real() -> Syllabus:
    here = House.here()
    return read_syllabus(here.syllabus)


def test_a_part_from_start_to_restore(tmp_path: Path) -> None:
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
    assert run(["start", "3.2b", "--again"], tmp_path).stdout.startswith("moved aside: ")
    assert "moved aside: " in run(["reset", "3.2b"], tmp_path).stdout
    assert "restored: " in run(["restore", "3.2b"], tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            ([command, "3.2z"], "3.2z is no part of day 3.2: it has 3.2a to 3.2e\n")
            for command in ("start", "test", "try", "hint", "diff", "compare", "skip", "reset", "restore")
        ),
        (["test", "3.2b"], "not started: pdm run start 3.2b (writes page_block.py)\n"),
        (["reset", "3.2b"], "part 3.2b is not started: there is nothing to reset\n"),
        (["restore", "3.2b"], "nothing of part 3.2b was moved aside\n"),
        (["skip", "3.2b"], "not started: pdm run start 3.2b\n"),
        (["compare", "3.2b"], "not started: pdm run start 3.2b\n"),
        (["start", "3.2b", "--cpp"], "part 3.2b has no option in C++\n"),
    ],
)
def test_a_mistake_about_a_part_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TINY_LLM_OVERLAY", str(tmp_path))
    assert door.run(arguments) == 1
    assert capsys.readouterr().err == f"error: {words}"


def test_every_help_says_what_a_part_is(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["start", "test", "test-refsol", "try", "hint", "diff", "compare", "progress", "map", "skip"]
    for command in [*commands, "reset", "restore", "doctor", "course-check"]:
        assert door.run([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "3.2b" in out, command
        assert "part" in out, command


def test_the_reference_passes_a_part_alone() -> None:
    command = [sys.executable, "-m", "tiny_llm_course", "test-refsol", "3.2d", "-q"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " deselected" in done.stdout


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_parts_of_any_cut_one_after_the_other_are_the_day_as_it_begins(
    real: Syllabus, order: str, tmp_path: Path
) -> None:
    """Helpers that one part has are taken out where the other part would have them as a solution."""
    for day in real.days:
        middle = (len(day.exercises) + 1) // 2
        halves = [pair for pair in (("a", day.exercises[:middle]), ("b", day.exercises[middle:])) if pair[1]]
        cut = dataclasses.replace(day, cuts=tuple(Cut(letter, letter, None, some) for letter, some in halves))
        house = House.here().with_overlay(tmp_path / day.id)
        house.overlay.mkdir()
        for letter in order if len(halves) > 1 else "a":
            start(house, cut.part(letter))
        for module in day.modules:
            assert own(house, module) == starter(house, module, day), f"{day.id}, {module}.py"


def test_what_a_days_file_has_for_parts_is_for_parts_that_there_are(real: Syllabus) -> None:
    for day in real.days:
        module = demonstrations.demonstration(day.id)
        names = {name for name in vars(module) if name.startswith(("show_", "work_"))}
        letters = {one.cut.letter for one in day.parts}
        assert {name.partition("_")[2] for name in names} <= letters
        assert all(getattr(module, name).__doc__ for name in names)


def test_the_parts_of_real_days_have_titles_of_their_own(real: Syllabus) -> None:
    for day in real.days:
        titles = [one.title for one in day.parts]
        assert len(set(titles)) == len(titles)
