"""Days with parts: a single part is started, skipped, reset, shown and checked."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_llm_course import days as demonstrations
from tiny_llm_course.days import function_name, has_own
from tiny_llm_course.errors import CourseError
from tiny_llm_course.labs import labs_after
from tiny_llm_course.legend import legend
from tiny_llm_course.may_use import unit_may_use
from tiny_llm_course.overview import map_text, progress, progress_text
from tiny_llm_course.progress import State, first_unfinished, remember
from tiny_llm_course.repo import Repo
from tiny_llm_course.rules import static_problems
from tiny_llm_course.source import with_blank, with_function, without
from tiny_llm_course.starter import restore, set_aside, skip, start, starter
from tiny_llm_course.units import Part, exercise_range
from tiny_llm_course.views import after_reset, difference, moved_aside, restart_advice, start_report, tasks
from toy_course import ADDING, HINTS, problems_of, replace, repo, suite, syllabus_of, write
from toy_parts import COUNT, COUNTING, LEAP, course, own, part, solved, states

__all__ = ["course", "repo"]


# ---- the syllabus ----


def test_a_part_knows_its_day_its_exercises_and_their_modules(course: Repo) -> None:
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
def test_an_exercise_or_a_file_selects_the_smallest_unit_that_contains_it(
    course: Repo, wanted: str, unit: str
) -> None:
    assert syllabus_of(course).to_start(wanted).id == unit


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("1.2z", "day 1.2 has no part 'z': it has 1.2a to 1.2c"),
        ("1.2B", "day 1.2 has no part 'B': it has 1.2a to 1.2c"),
        ("1.2ab", "day 1.2 has no part 'ab': it has 1.2a to 1.2c"),
        ("1.1a", "day 1.1 has no part 'a': it has no parts"),
        ("7.7a", "there is no day 7.7: `pdm run map` lists all days"),
        ("1.3a", "day 1.3 has no part 'a': it has no parts"),
    ],
)
def test_an_unknown_part_is_reported(course: Repo, wanted: str, message: str) -> None:
    with pytest.raises(CourseError) as raised:
        syllabus_of(course).to_start(wanted)
    assert str(raised.value) == message


def test_the_next_part_follows_a_part_and_the_next_day_follows_the_last(course: Repo) -> None:
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
        ('id = "b"', 'id = "c"', r"day 1\.2 has a part 'c', expected 'b'"),
        ('id = "b"', "id = 2", r"day 1\.2 has a part 2, expected 'b'"),
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
def test_an_invalid_part_is_rejected_with_the_reason(course: Repo, old: str, new: str, message: str) -> None:
    replace(course.syllabus, old, new)
    with pytest.raises(CourseError, match=message):
        syllabus_of(course)


# ---- source ----


def test_removing_an_added_function_restores_the_original_source() -> None:
    for name, other in (("Counter._next", COUNTING), ("helper", "def helper(x):\n    return x\n")):
        begun = COUNTING if name == "helper" else without(COUNTING, name)
        assert without(with_function(begun, other, name), name) == begun


def test_blanking_a_function_changes_no_other_code() -> None:
    odd = COUNTING.replace("def given", "\n\n\n# mine   \ndef given").replace("return x\n", "return   x")
    blank = with_blank(odd, "Counter.leap", "1.2.2 Counter.leap: book")
    before, after = odd.split('        3\n        """\n')
    assert blank.startswith(f'{before}        3\n        """\n        raise NotImplementedError("1.2.2')
    assert blank.endswith(after.split("            self.count()\n        return self.value\n")[1])


# ---- start ----


def test_a_days_labs_are_offered_with_its_last_part(course: Repo) -> None:
    """Earlier parts lack code that a lab may run."""
    (course.root / "labs").mkdir()
    (course.root / "labs" / "lab_counts.py").write_text('"""1.2: What counting costs."""\n', "utf-8")
    syllabus = syllabus_of(course)
    offered = [labs_after(course, syllabus.unit(one)) for one in ("1.2a", "1.2b", "1.2c", "1.2")]
    assert offered == [[], [], ["counts"], ["counts"]]
    assert "pdm run lab" not in tasks(course, syllabus.unit("1.2b"))
    assert "pdm run lab counts" in tasks(course, syllabus.unit("1.2c"))


def test_a_parts_starter_has_earlier_parts_solved_and_later_ones_blank(course: Repo) -> None:
    """Otherwise the learner would see the code of a later part early."""
    done = start(course, part(course, "b"))
    assert [file.name for file in done.files] == ["counting.py", "doubling.py"]
    assert states(course) == [State.SKIPPED, State.BLANK, State.BLANK, State.BLANK]
    assert "    # skipped: the reference's code\n    def _next" in own(course), "its helper is there too"
    assert "_before" not in own(course), "a helper of a later exercise would reveal its solution"
    done = start(course, part(course, "c"))
    assert (done.files, done.blanked) == ([], [])
    done = start(course, part(course, "a"))
    assert (done.files, [one.id for one in done.blanked]) == ([], ["1.2.1"])
    assert states(course) == [State.BLANK] * 4


@pytest.mark.parametrize("removed", [("_add", "_before"), ("_before", "_add")])
def test_a_helper_that_only_a_helper_calls_is_removed_with_it(course: Repo, removed: tuple[str, str]) -> None:
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


def test_a_part_with_separate_files_writes_only_these(course: Repo) -> None:
    replace(course.syllabus, "exercises = [1]", "exercises = [1, 2]")
    replace(course.syllabus, "exercises = [2, 3]", "exercises = [3]")
    done = start(course, part(course, "b"))
    assert [file.name for file in done.files] == ["doubling.py"]
    assert own(course, "doubling") == starter(course, "doubling", syllabus_of(course).day("1.2"))


def test_starting_the_next_part_keeps_the_learners_work_byte_for_byte(course: Repo) -> None:
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


def test_start_keeps_the_learners_code_unless_told_to_start_again(course: Repo) -> None:
    start(course, syllabus_of(course).day("1.2"))
    mine = solved(own(course), "Counter.leap", LEAP)
    write(course, "counting", mine)
    assert start(course, part(course, "b")).changed_nothing
    skip(course, part(course, "b").day, part(course, "b").exercises)
    done = start(course, part(course, "b"))
    assert [one.id for one in done.blanked] == ["1.2.3"]
    assert start_report(course, part(course, "b"), done) == [
        "blanked in src/tiny_llm/doubling.py: 1.2.3 double",
        "kept as you have it: 1.2.2 Counter.leap",
    ]
    assert own(course) == mine


def test_changed_reference_code_counts_as_learner_code(course: Repo) -> None:
    start(course, part(course, "c"))
    replace(course.overlay / "counting.py", "range(steps)", "range(0, steps)")
    before = own(course)
    done = start(course, part(course, "b"))
    assert [one.id for one in done.blanked] == []
    assert own(course) == before
    assert "kept as you have it: 1.2.2 Counter.leap" in start_report(course, part(course, "b"), done)


def test_starting_a_part_again_keeps_a_copy_and_blanks_only_the_part(course: Repo) -> None:
    start(course, syllabus_of(course).day("1.2"))
    mine = solved(solved(own(course), "Counter.count", COUNT), "Counter.leap", LEAP)
    write(course, "counting", mine)
    write(course, "doubling", "def double(x):\n    return 2 * x\n")
    aside = set_aside(course, part(course, "b"))
    assert [file.name for file in aside] == ["counting.py.1.bak", "doubling.py.1.bak"]
    assert aside[0].read_text("utf-8") == mine
    again = "back to the reference: doubling.py, 1.2.2 in counting.py"
    assert after_reset(part(course, "b"), aside) == again
    assert [moved_aside(course, file) for file in aside] == [
        "copied counting.py to src/tiny_llm/.backups/counting.py.1.bak; counting.py keeps your work of other "
        "parts",
        "moved doubling.py to src/tiny_llm/.backups/doubling.py.1.bak",
    ]
    start(course, part(course, "b"))
    assert states(course) == [State.WRITTEN, State.BLANK, State.BLANK, State.BLANK]
    assert own(course) == with_blank(mine, "Counter.leap", part(course, "b").exercises[0].message)


def test_reset_of_a_part_uses_reference_code_and_restore_brings_back_the_learners_code(course: Repo) -> None:
    start(course, syllabus_of(course).day("1.2"))
    mine = solved(solved(own(course), "Counter.count", COUNT), "Counter.leap", LEAP)
    write(course, "counting", mine)
    set_aside(course, part(course, "b"))
    assert states(course) == [State.WRITTEN, State.SKIPPED, State.NOT_STARTED, State.BLANK]
    assert set_aside(course, part(course, "b")) == [], "none of its code is left"
    assert len(restore(course, part(course, "b"))) == 2
    assert own(course) == mine
    set_aside(course, part(course, "a"))
    set_aside(course, part(course, "c"))
    set_aside(course, part(course, "b"))
    assert states(course) == [State.NOT_STARTED] * 4, "a file without the learner's code is moved"


def test_a_renamed_function_stops_a_reset(course: Repo) -> None:
    start(course, syllabus_of(course).day("1.2"))
    write(course, "counting", solved(own(course), "Counter.count", COUNT))
    replace(course.overlay / "counting.py", "def leap", "def jump")
    before = own(course)
    with pytest.raises(CourseError, match=r"counting\.py does not define Counter\.leap \(exercise 1\.2\.2\)"):
        set_aside(course, part(course, "b"))
    assert own(course) == before
    assert not list(course.overlay.rglob("*.bak"))


def test_starting_a_day_after_its_part_blanks_the_rest(course: Repo) -> None:
    day = syllabus_of(course).day("1.2")
    start(course, part(course, "b"))
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    (course.overlay / "doubling.py").unlink()
    done = start(course, day)
    assert [file.name for file in done.files] == ["doubling.py"]
    assert [one.id for one in done.blanked] == ["1.2.1"]
    assert states(course) == [State.BLANK, State.WRITTEN, State.BLANK, State.BLANK]


def test_a_day_without_parts_keeps_skipped_exercises(course: Repo) -> None:
    day = syllabus_of(course).day("1.1")
    start(course, day)
    skip(course, day, day.exercises)
    with pytest.raises(CourseError, match="has already been started"):
        start(course, day)


def test_a_day_lists_its_parts_and_a_part_only_its_own_exercises(course: Repo) -> None:
    day = syllabus_of(course).day("1.2")
    whole, second = tasks(course, day).splitlines(), tasks(course, day.part("b")).splitlines()
    assert whole[:4] == [
        "1.2a  Upwards",
        "    1.2.1  counting.py  Counter.count()",
        "1.2b  Faster",
        "    1.2.2  counting.py  Counter.leap(steps)",
    ]
    assert "parts:   1.2a to 1.2c, each about an evening; pdm run start 1.2a lists only that part" in whole
    assert "test:    pdm run test 1.2a for one part, pdm run test 1.2 for all" in whole
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


def test_a_blank_part_is_listed_again(course: Repo) -> None:
    start(course, syllabus_of(course).day("1.2"))
    assert start_report(course, part(course, "a"), start(course, part(course, "a"))) == [
        "already started; all of it is still blank"
    ]


def test_a_partly_written_part_is_listed_with_states(course: Repo) -> None:
    start(course, syllabus_of(course).day("1.2"))
    solution = solved(own(course), "Counter.leap", LEAP)
    write(course, "counting", solution)
    done = start(course, part(course, "b"))
    assert own(course) == solution
    assert start_report(course, part(course, "b"), done) == [
        "part 1.2b has already been started: nothing was changed"
    ]
    shown = tasks(course, part(course, "b"))
    assert "1.2.2  counting.py  Counter.leap(steps): written\n" in shown
    assert "1.2.3  doubling.py  double(x): blank\n" in shown
    assert restart_advice(course, part(course, "b"), done) == [
        "restart: pdm run start 1.2b --again (keeps your files in .backups/)"
    ]
    assert restart_advice(course, part(course, "c"), start(course, part(course, "c"))) == [], "it is blank"


# ---- output ----


def test_a_hint_for_a_part_is_for_its_first_unfinished_exercise(course: Repo) -> None:
    syllabus = syllabus_of(course)
    assert first_unfinished(course, syllabus, "1.2b").id == "1.2.2"
    start(course, part(course, "b"))
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    assert first_unfinished(course, syllabus, "1.2b").id == "1.2.3"
    assert first_unfinished(course, syllabus, "1.2a").id == "1.2.1"
    assert first_unfinished(course, syllabus, "1.2.4").id == "1.2.4"
    with pytest.raises(CourseError, match=r"no exercise '1\.2b\.9': part 1\.2b has 1\.2\.2 to 1\.2\.3"):
        first_unfinished(course, syllabus, "1.2b.9")


def test_the_diff_of_a_part_leaves_out_other_parts(course: Repo) -> None:
    with pytest.raises(CourseError, match=r"not started: pdm run start 1\.2b"):
        difference(course, part(course, "b"), anyway=True)
    start(course, syllabus_of(course).day("1.2"))
    write(course, "counting", solved(own(course), "Counter.leap", LEAP))
    with pytest.raises(
        CourseError, match=r"part 1\.2b must pass its tests first \(not tested\): run `pdm run test 1\.2b`"
    ):
        difference(course, part(course, "b"), anyway=False)
    shown = difference(course, part(course, "b"), anyway=True)
    assert "-        self.value += steps" in shown
    assert "+            self.count()" in shown
    assert "_next" not in shown
    assert "_before" not in shown
    assert "+    def _before" in difference(course, part(course, "c"), anyway=True)
    assert "+    def _next" not in difference(course, part(course, "c"), anyway=True)


def test_progress_and_map_show_the_parts(course: Repo) -> None:
    syllabus = syllabus_of(course)
    assert "1.2b" not in progress_text(course, syllabus), "not before the day is started"
    assert "    1.2b  Faster                               1.2.2 to 1.2.3: not started" in map_text(
        course, syllabus
    )
    write(course, "adding", ADDING)
    remember(course, syllabus.day("1.1"), passed=True)
    start(course, part(course, "b"))
    lines = progress_text(course, syllabus).splitlines()
    assert lines[1].startswith("1.2     [s...]  3 blank, 1 skipped  ")
    assert lines[2:5] == [
        "  1.2a  [s]     not tested          Upwards",
        "  1.2b  [..]    blank               Faster",
        "  1.2c  [.]     blank               And back",
    ]
    assert lines[-1] == "next: pdm run test 1.2b"
    remember(course, part(course, "b"), passed=True)
    rows = progress(course, syllabus)[1]["parts"]
    assert [(row["part"], row["done"]) for row in rows] == [("1.2a", False), ("1.2b", True), ("1.2c", False)]
    assert progress_text(course, syllabus).splitlines()[-1] == "next: pdm run test 1.2c"
    assert "1.2c  And back                             1.2.4: blank" in map_text(course, syllabus)


def test_a_part_may_have_its_own_demonstration(
    course: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstrations, "__file__", str(tmp_path / "__init__.py"))
    assert not has_own(part(course, "b"), "show"), "a day may lack a file"
    (tmp_path / "week_1_day_2.py").write_text("def show():\n    pass\n\n\ndef show_b():\n    pass\n", "utf-8")
    names = [function_name(part(course, letter), "show") for letter in "abc"]
    assert names == ["show", "show_b", "show"]
    assert function_name(syllabus_of(course).day("1.2"), "work") == "work"


# ---- the check ----


def test_a_sound_course_with_parts_has_no_problems(course: Repo) -> None:
    assert problems_of(course) == []


Change = Callable[[Repo], None]

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


@pytest.mark.deep
@pytest.mark.parametrize("what", DYNAMIC)
def test_a_broken_rule_about_parts_is_found_by_running(course: Repo, what: str) -> None:
    change, message = DYNAMIC[what]
    change(course)
    if "only the tests of another" in what:
        replace(
            suite(course, 2),
            "assert Counter().leap(3) == 3",
            "assert Counter().leap(3) == 3\n    Counter().back()",
        )
    assert any(message in problem for problem in problems_of(course))


def test_a_test_that_no_part_runs_is_reported(course: Repo) -> None:
    replace(suite(course, 2), "test_task_4_", "test_task_5_")
    found = [str(problem) for problem in static_problems(course, syllabus_of(course))]
    assert "parts: test_week_1_day_2.py: test_task_5_goes_back is not about any exercise" in found
