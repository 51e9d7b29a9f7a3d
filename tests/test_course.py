"""The course's tools on a course of three small days: start, test, hint, progress, map and doctor."""

import pytest

from tiny_llm_course.doctor import examine
from tiny_llm_course.errors import CourseError
from tiny_llm_course.outcome import Outcome, first_to_fix
from tiny_llm_course.overview import map_text, progress, progress_text
from tiny_llm_course.progress import Result, State, noted_first_to_fix, remember, result, state
from tiny_llm_course.repo import Repo
from tiny_llm_course.runs import overlay_of, own_sources
from tiny_llm_course.source import SKIPPED, blanked, is_blank, signature, with_body_of
from tiny_llm_course.starter import set_aside, skip, start
from tiny_llm_course.testing import run_day, run_reference, run_started
from tiny_llm_course.views import after_reset, difference, hint, tasks
from toy_course import ADDING, COUNTING, DOUBLING, SYLLABUS, replace, repo, syllabus_of, write

__all__ = ["repo"]


# ---- source ----


def test_a_blank_keeps_signature_docstring_and_surrounding_code() -> None:
    blank = blanked(COUNTING, {"Counter.count": "1.2.1 Counter.count: book"}, ["Counter._next"])
    assert is_blank(blank, "Counter.count")
    assert '"""Add one and return the value.\n' in blank
    assert 'raise NotImplementedError("1.2.1 Counter.count: book")' in blank
    assert "_next" not in blank
    assert "The first time" not in blank
    assert blank.endswith(COUNTING[COUNTING.index("\n\ndef given") :])
    assert blank.startswith(COUNTING[: COUNTING.index("        # The first")])


def test_blanking_removes_the_decorators_of_faster_code_and_their_imports() -> None:
    source = '"""M."""\n\nimport a\n\nfrom .kernels import accelerated, use_compiled\n\n\n'
    source += '@accelerated(\n    compiled="x",\n    fused=use_compiled,\n)\n'
    source += 'def f(x: int) -> int:\n    """F."""\n    return x\n'
    blank = blanked(source, {"f": "1.1.1 f: book"})
    assert "accelerated" not in blank
    assert "from .kernels import use_compiled" in blank
    assert 'def f(x: int) -> int:\n    """F."""\n    raise NotImplementedError("1.1.1 f: book")' in blank


def test_a_long_message_of_a_blank_is_formatted() -> None:
    message = "1.1.1 f: " + "chapter" * 12
    blank = blanked("def f() -> int:\n    return 1\n", {"f": message})
    assert blank.splitlines()[-3:] == ["    raise NotImplementedError(", f'        "{message}"', "    )"]
    assert is_blank(blank, "f")


def test_a_blank_can_be_filled_with_the_body_of_the_reference() -> None:
    blank = blanked(COUNTING, {"Counter.count": "m"})
    filled = with_body_of(blank, COUNTING, "Counter.count")
    assert filled.replace(f"        {SKIPPED}\n", "") == COUNTING


def test_signature_returns_parameters_as_written() -> None:
    assert signature(ADDING, "add") == "add(one: int, other: int) -> int"


# ---- syllabus ----


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "1.2"', 'id = "1.1"', "day 1.1 is listed twice"),
        ('id = "1.2"', 'id = "12"', "'12' is not a day"),
        ('title = "Adding"', "", "day 1.1 has no text 'title'"),
        ('title = "Adding"', 'titel = "Adding"', "day 1.1 has the unknown keys titel"),
        ('["counting", "doubling"]', '["adding", "counting", "doubling"]', "has no exercise in adding"),
        ('"adding.add"', '"doubling.add"', "exercise 1.1.1 is 'doubling.add'"),
        ('"doubling.double"', '"counting.Counter.count"', "has no exercise in doubling"),
        (', "Take both, and add them up."]', "]", "exercise 1.1.1 has 2 hints, expected 3"),
        ("[[day]]", "[[day", "syllabus.toml"),
    ],
)
def test_an_invalid_syllabus_is_rejected_with_the_reason(
    repo: Repo, old: str, new: str, message: str
) -> None:
    text = repo.syllabus.read_text("utf-8")
    repo.syllabus.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(CourseError, match=message):
        syllabus_of(repo)


def test_days_and_exercises_are_found_by_id(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    assert syllabus.day("1.2").title == "Counting"
    assert syllabus.exercise("1.2.2").name == "double"
    message = "1.2.2 double: pdm run hint 1.2.2"
    assert syllabus.exercise("1.2.2").message == message
    with pytest.raises(CourseError, match=r"no day 1\.4: `pdm run map`"):
        syllabus.day("1.4")
    with pytest.raises(CourseError, match=r"'1' is not a day such as 1\.1"):
        syllabus.day("1")
    for wrong in ("1.2.3", "1.2"):
        with pytest.raises(CourseError, match=rf"no exercise '{wrong}': day 1\.2 has 1\.2\.1 to 1\.2\.2"):
            syllabus.exercise(wrong)
    with pytest.raises(CourseError, match=r"day 1\.3 \(Later\) is planned"):
        syllabus.exercise("1.3.1")
    with pytest.raises(CourseError, match=r"day 1\.3 \(Later\) is planned"):
        syllabus.to_start("1.3")


# ---- start, reset, skip ----


def test_start_writes_only_the_days_modules_with_blank_exercises(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.2")
    assert [file.name for file in start(repo, day).files] == ["counting.py", "doubling.py"]
    assert [state(repo, exercise) for exercise in day.exercises] == [State.BLANK, State.BLANK]
    assert "1.2.1  counting.py  Counter.count()" in tasks(repo, day)
    assert "pdm run test 1.2" in tasks(repo, day)


def test_start_never_overwrites_files_but_moves_them_aside_if_told_to_start_again(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.2")
    start(repo, day)
    write(repo, "counting", "mine = 1\n")
    with pytest.raises(CourseError, match=r"day 1\.2 has already been started .*--again"):
        start(repo, day)
    (repo.overlay / "doubling.py").unlink()
    assert [file.name for file in start(repo, day).files] == ["doubling.py"]
    assert (repo.overlay / "counting.py").read_text("utf-8") == "mine = 1\n"
    set_aside(repo, day)
    start(repo, day)
    assert (repo.overlay / ".backups/counting.py.1.bak").read_text("utf-8") == "mine = 1\n"
    set_aside(repo, day)
    assert (repo.overlay / ".backups/counting.py.2.bak").exists()


def test_reset_moves_files_aside(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.1")
    start(repo, day)
    moved = set_aside(repo, day)
    assert [file.name for file in moved] == ["adding.py.1.bak"]
    assert after_reset(day, moved) == "back to the reference: adding.py"
    assert state(repo, day.exercises[0]) is State.NOT_STARTED


def test_skip_fills_only_blanks(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.2")
    start(repo, day)
    write(repo, "doubling", DOUBLING.replace("add(x, x)", "2 * x"))
    assert [exercise.id for exercise in skip(repo, day, day.exercises)] == ["1.2.1"]
    assert [state(repo, exercise) for exercise in day.exercises] == [State.SKIPPED, State.WRITTEN]
    assert (
        "        # skipped: the reference's code\n        # The first time"
        in (repo.overlay / "counting.py").read_text()
    )
    assert skip(repo, day, day.exercises) == []
    assert "        return add(self.value, 1)" in (repo.overlay / "counting.py").read_text(), (
        "its helper is back"
    )
    assert run_day(repo, syllabus_of(repo), day, []) == 0


# ---- test ----


def test_testing_a_day_that_is_not_started_says_how_to_start_it(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    with pytest.raises(CourseError, match=r"not started: pdm run start 1\.1"):
        run_day(repo, syllabus, syllabus.day("1.1"), [])
    with pytest.raises(CourseError, match="no day is started"):
        run_started(repo, syllabus, [])


def test_a_file_that_replaces_no_module_is_an_error_with_a_suggestion(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    start(repo, syllabus.day("1.1"))
    write(repo, "addin", "")
    with pytest.raises(
        CourseError, match=r"addin\.py does not replace any module of the engine; did you mean adding\.py\?"
    ):
        run_day(repo, syllabus, syllabus.day("1.1"), [])


def test_blanks_are_listed_and_fail_with_their_own_message(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    start(repo, syllabus.day("1.1"))
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == 1
    out = capfd.readouterr().out
    assert "still blank: 1.1.1 add" in out
    assert "1 test waits for 1.1.1 add: pdm run hint 1.1.1" in out
    assert "FAILURES" not in out, "a blank is not shown as a failure"
    assert out.endswith("first: 1.1.1 add (1 test waits): pdm run test 1.1.1 -x; pdm run hint 1.1.1\n")
    assert "yours: adding.py; from the reference: 3 modules" in out
    assert result(repo, syllabus.day("1.1")) is Result.FAILING


def test_a_passing_day_names_the_next_commands_and_is_recorded(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING.replace("sum((one, other))", "one + other"))
    assert run_day(repo, syllabus, syllabus.day("1.1"), []) == 0
    out = capfd.readouterr().out
    assert "day 1.1 passes. What works now: sums." in out
    assert "pdm run start 1.2" in out
    assert result(repo, syllabus.day("1.1")) is Result.PASSING
    write(repo, "adding", ADDING)
    assert result(repo, syllabus.day("1.1")) is Result.STALE
    assert run_started(repo, syllabus, []) == 0


def test_a_selection_of_tests_is_not_recorded(repo: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING)
    assert run_day(repo, syllabus, syllabus.day("1.1"), ["-k", "two"]) == 0
    assert "the selected tests pass; the whole day: pdm run test 1.1" in capfd.readouterr().out
    assert result(repo, syllabus.day("1.1")) is Result.UNKNOWN
    assert run_day(repo, syllabus, syllabus.day("1.1"), ["-q", "-x"]) == 0
    assert "day 1.1 passes" in capfd.readouterr().out
    assert result(repo, syllabus.day("1.1")) is Result.PASSING


def test_a_change_in_an_unrelated_file_keeps_a_days_result(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    for module, source in (("adding", ADDING), ("doubling", DOUBLING), ("counting", COUNTING)):
        write(repo, module, source)
    for day in syllabus.days[:2]:
        remember(repo, day, passed=True)
    write(repo, "doubling", f"{DOUBLING}# mine\n")
    assert [result(repo, day) for day in syllabus.days[:2]] == [Result.PASSING, Result.STALE]
    write(repo, "doubling", DOUBLING)
    write(repo, "adding", f"{ADDING}# mine\n")
    assert [result(repo, day) for day in syllabus.days[:2]] == [Result.STALE, Result.STALE]


def test_a_renamed_function_is_reported(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING.replace("def add", "def plus"))
    with pytest.raises(
        CourseError, match=r"adding\.py does not define add \(exercise 1\.1\.1\); do not rename it"
    ):
        run_day(repo, syllabus, syllabus.day("1.1"), [])


def test_a_syntax_error_is_reported_with_its_line(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", "x = 1\ndef add(:\n")
    with pytest.raises(CourseError, match=r"adding\.py, line 2, in 1\.1\.1 add: invalid syntax$"):
        run_day(repo, syllabus, syllabus.day("1.1"), [])


SUM = "        self.value = self._next()\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (f"{SUM}        break\n", "line 21, in 1.2.1 Counter.count: 'break' outside loop"),
        ("        self.value = (self._next()\n", "line 20, in 1.2.1 Counter.count: '(' was never closed"),
        ("        try:\n            pass\n", "line 22, in 1.2.1 Counter.count: expected 'except' or"),
        (f"{SUM}\nx = )\n", "line 22: unmatched ')'"),
    ],
)
def test_a_syntax_error_is_blamed_on_its_exercise_before_any_test_runs(
    repo: Repo, capfd: pytest.CaptureFixture[str], body: str, says: str
) -> None:
    """`ast.parse` accepts the first one. The last one is at the top level, in no exercise."""
    syllabus = syllabus_of(repo)
    write(repo, "counting", COUNTING.replace(SUM, body))
    write(repo, "doubling", DOUBLING)
    with pytest.raises(CourseError) as refused:
        run_day(repo, syllabus, syllabus.day("1.2"), [])
    assert f"counting.py, {says}" in str(refused.value)
    assert capfd.readouterr() == ("", "")
    noted = "1.2.1" if "1.2.1" in says else None
    assert noted_first_to_fix(repo) == noted


def test_a_syntax_error_in_another_days_module_is_named_with_its_exercise(repo: Repo) -> None:
    """The day's own code is correct; isolated, it does not need the other module."""
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING.replace("    return sum((one, other))", "    break"))
    write(repo, "counting", COUNTING)
    write(repo, "doubling", DOUBLING)
    with pytest.raises(CourseError, match=r"adding\.py, line 10, in 1\.1\.1 add: 'break' outside loop$"):
        run_day(repo, syllabus, syllabus.day("1.2"), [])
    assert run_day(repo, syllabus, syllabus.day("1.2"), [], isolated=True) == 0


def test_a_fault_in_a_module_of_an_earlier_day_is_found(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING.replace("sum((one, other))", "one - other"))
    write(repo, "counting", COUNTING)
    write(repo, "doubling", DOUBLING)
    day = syllabus.day("1.2")
    assert run_day(repo, syllabus, day, []) == 1
    out = capfd.readouterr().out
    assert (
        "today's code is correct: test_task_1_counts passes when all other modules are the reference's."
        in out
    )
    assert "it fails together with your adding.py (day 1.1): pdm run test 1.1" in out
    assert run_day(repo, syllabus, day, [], isolated=True) == 0


def test_a_fault_in_todays_code_is_not_blamed_on_other_modules(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING)
    write(repo, "counting", COUNTING)
    write(repo, "doubling", DOUBLING.replace("add(x, x)", "x"))
    assert run_day(repo, syllabus, syllabus.day("1.2"), []) == 1
    out = capfd.readouterr().out
    assert (
        "the cause is in doubling.py, double: test_task_2_doubles passes with the reference's version" in out
    )


def test_a_blank_does_not_start_a_search_for_a_cause(repo: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING)
    start(repo, syllabus.day("1.2"))
    assert run_day(repo, syllabus, syllabus.day("1.2"), []) == 1
    out = capfd.readouterr().out
    assert "searching for the cause" not in out
    assert out.endswith(
        "first: 1.2.1 Counter.count (1 test waits): pdm run test 1.2.1 -x; pdm run hint 1.2.1\n"
    )


@pytest.mark.parametrize("isolated", [False, True])
def test_failures_come_before_blanks(repo: Repo, isolated: bool, capfd: pytest.CaptureFixture[str]) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING)
    start(repo, syllabus.day("1.2"))
    write(repo, "doubling", DOUBLING.replace("add(x, x)", "x"))
    assert run_day(repo, syllabus, syllabus.day("1.2"), [], isolated=isolated) == 1
    out = capfd.readouterr().out
    assert ("searching for the cause" in out) is not isolated
    assert out.endswith(
        "first: 1.2.2 double (1 of its tests fails): pdm run test 1.2.2 -x; pdm run hint 1.2.2\n"
    )


def test_the_first_task_to_fix_is_the_lowest_that_fails(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.2")
    tests = [f"test_week_1_day_2.py::test_task_{task}_x[{n}]" for task in (10, 2) for n in range(3)]
    assert "first: 1.2.2 double (3 of its tests fail)" in str(
        first_to_fix(Outcome(1, (*tests, "x.py"), ("m",)), day)
    )
    other_day = Outcome(1, (), ("1.1.1 add: book", "1.1.1 add: book", "1.2.1 Counter.count: book"))
    assert "first: 1.1.1 add (2 tests wait)" in str(first_to_fix(other_day, day))
    assert first_to_fix(Outcome(2, ("test_week_1_day_2.py",)), day) is None


def test_a_traceback_shows_lines_of_the_learner_but_not_of_the_reference(
    repo: Repo, capfd: pytest.CaptureFixture[str]
) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "counting", COUNTING)
    write(repo, "doubling", DOUBLING.replace("add(x, x)", "add(x, None)"))
    day = syllabus.day("1.2")
    assert run_day(repo, syllabus, day, []) == 1
    out = capfd.readouterr().out
    assert "assert double(4) == 8" in out
    assert "return add(x, None)" in out
    assert "return sum((one, other))" not in out
    assert "TypeError" in out
    assert run_day(repo, syllabus, day, ["--full-trace"]) == 1
    assert "return sum((one, other))" in capfd.readouterr().out


def test_the_reference_is_tested_without_the_learners_files(repo: Repo) -> None:
    write(repo, "adding", "broken")
    assert run_reference(repo, [repo.suites], []) == 0


def test_a_temporary_overlay_contains_copies_of_the_given_modules(repo: Repo) -> None:
    write(repo, "adding", ADDING)
    write(repo, "doubling", DOUBLING)
    write(repo, "my_tools", "")
    with overlay_of(repo, own_sources(repo, ["doubling"])) as copied:
        assert sorted(file.name for file in copied.overlay.iterdir()) == ["doubling.py", "my_tools.py"]


# ---- views ----


def test_hints_come_in_three_steps(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    exercise = syllabus.exercise("1.1.1")
    assert "a question:\n  Which is larger, 2 or 3?" in hint(repo, syllabus, exercise, 1)
    assert "pdm run hint 1.1.1 2" in hint(repo, syllabus, exercise, 1)
    assert "a sketch:\n  Take both" in hint(repo, syllabus, exercise, 3)
    assert "pdm run skip 1.1.1" in hint(repo, syllabus, exercise, 3)
    with pytest.raises(CourseError, match=r"1\.1\.1 has no hint 4: 1 is a question"):
        hint(repo, syllabus, exercise, 4)


def test_a_long_hint_fits_the_terminal(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = "many words of a hint " * 30
    repo.syllabus.write_text(
        repo.syllabus.read_text("utf-8").replace("The sum of 2 and 3 is 5.", words), "utf-8"
    )
    syllabus = syllabus_of(repo)
    shown = hint(repo, syllabus, syllabus.exercise("1.1.1"), 2)
    assert max(map(len, shown.splitlines())) <= 60
    assert " ".join(shown.split()).count("many words of a hint") == 30


def test_the_difference_is_shown_after_passing_or_with_the_option_anyway(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.1")
    with pytest.raises(CourseError, match="not started"):
        difference(repo, day, anyway=True)
    write(repo, "adding", ADDING.replace("sum((one, other))", "one + other"))
    with pytest.raises(CourseError, match=r"day 1\.1 must pass its tests first \(not tested\)"):
        difference(repo, day, anyway=False)
    assert "-    return one + other\n+    return sum((one, other))" in difference(repo, day, anyway=True)
    remember(repo, day, passed=True)
    assert difference(repo, day, anyway=False) == difference(repo, day, anyway=True)
    assert "@accelerated" not in difference(repo, day, anyway=True)
    replace(repo.reference / "adding.py", "def add(", "@accelerated(compiled=None)\ndef add(")
    assert difference(repo, day, anyway=True).startswith(
        "@accelerated, _fused and _compiled in the reference "
    )


def test_progress_is_read_from_the_files(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    write(repo, "adding", ADDING.replace("sum((one, other))", "one + other"))
    start(repo, syllabus.day("1.2"))
    write(repo, "doubling", DOUBLING)
    remember(repo, syllabus.day("1.1"), passed=True)
    first, second = progress(repo, syllabus)
    assert (first["done"], first["exercises"]) == (True, {"1.1.1": "written"})
    assert second["exercises"] == {"1.2.1": "blank", "1.2.2": "written"}
    assert (second["done"], second["written"]) == (False, 1)
    text = progress_text(repo, syllabus)
    assert "1.1  [x]   " in text
    assert "1.2  [.x]  " in text
    (repo.overlay / "counting.py").unlink()
    assert "1.2  [-x]  " in progress_text(repo, syllabus)
    assert "- file missing" in text
    assert "1 of 2 days pass." in text
    assert "next: pdm run test 1.2" in text


def test_progress_shows_a_day_without_the_learners_code_as_blank_or_skipped(repo: Repo) -> None:
    """Its tests fail because of the blanks, which says nothing about the learner's code."""
    syllabus = syllabus_of(repo)
    day = syllabus.day("1.2")
    start(repo, day)
    remember(repo, day, passed=False)
    assert progress(repo, syllabus)[1]["tests"] == "blank"
    skip(repo, day, day.exercises[:1])
    remember(repo, day, passed=False)
    assert progress(repo, syllabus)[1]["tests"] == "1 blank, 1 skipped"
    assert "1.2  [s.]  1 blank, 1 skipped  " in progress_text(repo, syllabus)
    write(repo, "counting", COUNTING)
    remember(repo, day, passed=False)
    assert progress(repo, syllabus)[1]["tests"] == "fails"
    skip(repo, day, day.exercises)
    assert "changed since its tests ran" in progress(repo, syllabus)[1]["tests"]


def test_progress_names_a_day_that_was_left_out(repo: Repo) -> None:
    syllabus = syllabus_of(repo)
    start(repo, syllabus.day("1.2"))
    assert progress_text(repo, syllabus).splitlines()[-1] == "next: pdm run test 1.2", "it came first"
    remember(repo, syllabus.day("1.2"), passed=True)
    assert progress_text(repo, syllabus).splitlines()[-1] == "next: pdm run start 1.1"
    later = SYLLABUS[SYLLABUS.index('[[day]]\nid = "1.2"') : SYLLABUS.index('[[day]]\nid = "1.3"')]
    later = later.replace("1.2", "1.4").replace("counting", "given").replace("doubling", "more")
    repo.syllabus.write_text(repo.syllabus.read_text("utf-8") + later, "utf-8")
    for name, source in (("given", COUNTING), ("more", DOUBLING)):
        (repo.reference / f"{name}.py").write_text(source, "utf-8")
    assert progress_text(repo, syllabus_of(repo)).splitlines()[-1] == (
        "next: pdm run start 1.4 (you left out day 1.1: pdm run start 1.1)"
    )


def test_a_damaged_record_counts_as_missing(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.1")
    write(repo, "adding", ADDING)
    remember(repo, day, passed=True)
    assert result(repo, day) is Result.PASSING
    (repo.records / "results.json").write_text("{", "utf-8")
    assert result(repo, day) is Result.UNKNOWN


def test_the_map_marks_the_learners_modules(repo: Repo) -> None:
    write(repo, "doubling", DOUBLING)
    text = map_text(repo, syllabus_of(repo))
    assert "counting.py  [doubling.py]" in text
    assert "not available yet" in text


def test_the_legend_explains_the_letters_of_the_days_docstrings(repo: Repo) -> None:
    day = syllabus_of(repo).day("1.1")
    package = '"""Shapes are written in letters: B batch, L or T tokens, N\nblocks, D head size."""\n'
    (repo.reference / "__init__.py").write_text(package, "utf-8")
    assert "shapes:" not in tasks(repo, day)
    replace(repo.reference / "adding.py", "The sum of both.", "N of both: [B, total_blocks, T // 2].")
    assert "shapes:  B batch, L or T tokens\n" in tasks(repo, day)
    replace(repo.reference / "adding.py", "Nothing to do here.", "Of a matrix [N, K], [..., N].")
    assert "shapes:  B batch, L or T tokens\n" in tasks(repo, day)
    replace(repo.reference / "adding.py", "Sums.", "Sums of [D].")
    assert "shapes:  B batch, L or T tokens, D head size\n" in tasks(repo, day)


# ---- doctor ----


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("import nopackage\n", "ModuleNotFoundError: No module named 'nopackage'"),
        ("raise SystemExit(3)\n", "it ended Python with the code 3"),
        ("from .my_tools import x\n", "SyntaxError"),
    ],
)
def test_the_doctor_imports_the_learners_modules(repo: Repo, added: str, said: str) -> None:
    write(repo, "my_tools", "x = = 1\n")
    write(repo, "adding", ADDING + added)
    [found] = [finding for finding in examine(repo, syllabus_of(repo)) if finding.what == "adding.py"]
    assert not found.ok
    assert f"cannot be imported: {said}" in found.found


def test_the_doctor_finds_missing_functions_and_changed_signatures(repo: Repo) -> None:
    write(repo, "adding", "def add(one: int) -> int:\n    return one\n")
    findings = {(finding.what, finding.ok): finding for finding in examine(repo, syllabus_of(repo))}
    assert "0 is pinned" in findings["MLX", False].advice
    told = [str(finding) for finding in examine(repo, syllabus_of(repo)) if finding.what == "adding.py"]
    assert "has add(one: int) -> int\n   the reference has add(one: int, other: int) -> int" in told[0]
    assert "has no given" in told[1]
    write(repo, "adding", ADDING)
    fitting = [finding.ok for finding in examine(repo, syllabus_of(repo)) if finding.what == "adding.py"]
    assert all(fitting)
    write(repo, "adding", ADDING.replace(": int", "").replace(" -> int", ""))  # types may be left out
    assert "adding.py" not in {finding.what for finding in examine(repo, syllabus_of(repo))}
    write(repo, "adin", "")
    refused = [f for f in examine(repo, syllabus_of(repo)) if f.what == "your modules"]
    assert not refused[0].ok
    assert "adin.py does not replace any module of the engine; did you mean adding.py?" in refused[0].found
