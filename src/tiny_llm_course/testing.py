"""`pdm run test`: a day's suite on the learner's code, what it says, and what to do next."""

import re
from collections.abc import Sequence
from pathlib import Path

from .blame import BUDGET, Blame, find_blame, others
from .cpp import own_kernels, refuse_stale
from .errors import CourseError
from .house import House
from .outcome import Outcome, begin_here
from .progress import State, missing_modules, own_modules, remember, started_days, state
from .runs import TIME_LIMIT, overlay_of, own_sources, run_suite_of, run_suites
from .syllabus import Day, Exercise, Syllabus

ONLY_SHOWN = re.compile(
    r"-(v+|q+|x|l|s)|--tb=.*|--showlocals|--full-trace"
)  # pytest's; they leave no test out


def run_started(
    house: House, syllabus: Syllabus, arguments: Sequence[str], *, time_limit: float = TIME_LIMIT
) -> int:
    """Test every day that was started; 1 if one fails."""
    days = started_days(house, syllabus)
    if not days:
        raise CourseError(
            "no day is started: `pdm run start 1.1` begins with the first, `pdm run map` shows all"
        )
    return max(run_day(house, syllabus, day, arguments, time_limit=time_limit) for day in days)


def run_day(
    house: House,
    syllabus: Syllabus,
    day: Day,
    arguments: Sequence[str],
    *,
    isolated: bool = False,
    time_limit: float = TIME_LIMIT,
) -> int:
    """Run one day's suite, print what follows from it, and remember the outcome; pytest's exit code.

    isolated: only today's modules, on the reference for everything else. time_limit: seconds for each test.
    """
    own = own_modules(house)
    _refuse_not_started(house, day)
    refuse_stale(house, syllabus)
    _tell_blanks(house, day)
    about = f"day {day.id}, {day.title}"
    if isolated:
        today = own_sources(house, [module for module in own if module in day.modules])
        with overlay_of(house, today, kernels=bool(day.kernels)) as alone:
            outcome = run_suite_of(alone, day, arguments, f"{about}, isolated", time_limit)
            _tell_first(outcome, day)
            return outcome.code
    outcome = run_suite_of(house, day, arguments, about, time_limit)
    whole = all(ONLY_SHOWN.fullmatch(argument) for argument in arguments)
    if whole:  # part of a suite says nothing about the day
        remember(house, day, outcome.code == 0)
    if outcome.code == 0 and not whole:
        print(f"what you chose passes; the whole day: pdm run test {day.id}", flush=True)
    elif outcome.code == 0:
        _tell_next(house, syllabus, day)
    elif outcome.failed and not outcome.stopped:
        _tell_blame(house, syllabus, day, outcome)
    else:
        _tell_first(outcome, day)
    return outcome.code


def run_reference(house: House, suites: Sequence[Path], arguments: Sequence[str]) -> int:
    """Run suites on the plain reference; pytest's exit code."""
    with overlay_of(house, {}) as reference:
        return run_suites(reference, suites, arguments, about="the reference").returncode


def _refuse_not_started(house: House, day: Day) -> None:
    missing = missing_modules(house, day)
    if missing and not set(own_kernels(house, Syllabus((day,)))):
        files = " and ".join(f"{module}.py" for module in missing)
        raise CourseError(f"not started: pdm run start {day.id} (writes {files})")


def _tell_blanks(house: House, day: Day) -> None:
    states = {exercise: state(house, exercise) for exercise in day.exercises}
    if all(found is State.NOT_STARTED for found in states.values()):
        return  # the day's option in C++ alone
    for exercise, found in states.items():
        if found is State.MISSING:
            file = house.shown(house.overlay / f"{exercise.module}.py")
            raise CourseError(
                f"{file} has no {exercise.name} (exercise {exercise.id}): it must keep its name"
            )
    blank = [f"{exercise.id} {exercise.name}" for exercise, found in states.items() if found is State.BLANK]
    if blank:
        print(f"still blank: {', '.join(blank)}", flush=True)


def _tell_next(house: House, syllabus: Syllabus, day: Day) -> None:
    print(f"day {day.id} passes: {day.works}.")
    print(f"  pdm run try {day.id}       see it run")
    if day.no_compare is None:
        print(f"  pdm run compare {day.id}   beside the reference")
    print(f"  pdm run diff {day.id}      how the reference does it")
    after = syllabus.after(day)
    if after is not None:
        verb = "start" if missing_modules(house, after) else "test"
        print(f"  pdm run {verb} {after.id}     next: {after.title}", flush=True)


def _tell_first(outcome: Outcome, day: Day, at_fault: Exercise | None = None) -> None:
    line = begin_here(outcome, day, at_fault)
    if line is not None:
        print(line, flush=True)


def _tell_blame(house: House, syllabus: Syllabus, day: Day, outcome: Outcome) -> None:
    """Which exercise of today makes the tests fail, or which of the learner's other modules."""
    print("looking for the fault ...", flush=True)
    found = find_blame(house, day, outcome)
    if found.today:
        for line in _about_today(house, day, found):
            print(line)
        _tell_first(outcome, day, found.exercise)
    else:
        for line in _about_others(house, syllabus, day, found):
            print(line, flush=True)


def _about_today(house: House, day: Day, found: Blame) -> list[str]:
    if found.exercise is not None:
        one = found.exercise
        return [f"the fault is in {one.module}.py, {one.name}: with the reference's, {found.test} passes"]
    files = " or ".join(f"{module}.py" for module in day.modules)
    if not found.complete:
        return [f"the fault is in {files}; the search for the exercise ended after {BUDGET:g} s"]
    return [f"the fault is in {files}: in several exercises, or outside of them"]


def _about_others(house: House, syllabus: Syllabus, day: Day, found: Blame) -> list[str]:
    lines = [f"today's code is right: on the reference for everything else, {found.test} passes."]
    if found.module is not None:
        owner = syllabus.owner(found.module)
        again = f" (day {owner.id}): pdm run test {owner.id}" if owner is not None else ""
        return [*lines, f"it fails with your {found.module}.py{again}"]
    names = ", ".join(f"{module}.py" for module in others(house, day))
    if not found.complete:
        return [*lines, f"it fails with one of your {names}; the search ended after {BUDGET:g} s"]
    return [*lines, f"no other module of yours makes it fail by itself: several of {names} together do."]
