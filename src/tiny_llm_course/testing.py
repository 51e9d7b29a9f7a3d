"""`pdm run test`: a day's suite on the learner's code, what it says, and what to do next."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from .cpp import own_kernels, refuse_stale
from .errors import CourseError
from .house import House
from .outcome import Outcome, begin_here
from .progress import State, missing_modules, own_modules, remember, started_days, state
from .runs import culprits, overlay_of, passes_alone, run_suite_of, run_suites
from .syllabus import Day, Syllabus

WATCH_SECONDS = 0.3
ONLY_SHOWN = re.compile(r"-(v+|q+|x|l)|--tb=.*|--showlocals")  # pytest's options that leave no test out


def run_started(house: House, syllabus: Syllabus, arguments: Sequence[str]) -> int:
    """Test every day that was started; 1 if one fails."""
    days = started_days(house, syllabus)
    if not days:
        raise CourseError(
            "no day is started: `pdm run start 1.1` begins with the first, `pdm run map` shows all"
        )
    return max(run_day(house, syllabus, day, arguments) for day in days)


def run_day(
    house: House, syllabus: Syllabus, day: Day, arguments: Sequence[str], *, isolated: bool = False
) -> int:
    """Run one day's suite, print what follows from it, and remember the outcome; pytest's exit code.

    isolated: today's modules alone, on the reference for everything else.
    """
    own = own_modules(house)
    _refuse_not_started(house, day)
    refuse_stale(house, syllabus)
    _tell_blanks(house, day)
    about = f"day {day.id}, {day.title}"
    if isolated:
        today = [module for module in own if module in day.modules]
        with overlay_of(house, today, kernels=bool(day.kernels)) as alone:
            outcome = run_suite_of(alone, day, arguments, f"{about}, isolated")
            _tell_first(outcome, day)
            return outcome.code
    outcome = run_suite_of(house, day, arguments, about)
    whole = all(ONLY_SHOWN.fullmatch(argument) for argument in arguments)
    if whole:  # part of a suite says nothing about the day
        remember(house, day, outcome.code == 0)
    if outcome.code == 0 and not whole:
        print(f"what you chose passes; the whole day: pdm run test {day.id}", flush=True)
    elif outcome.code == 0:
        _tell_next(house, syllabus, day)
    elif not (outcome.failed and set(own) - set(day.modules)) or _is_todays_fault(house, syllabus, day):
        _tell_first(outcome, day)
    return outcome.code


def run_reference(house: House, suites: Sequence[Path], arguments: Sequence[str]) -> int:
    """Run suites on the plain reference; pytest's exit code."""
    with TemporaryDirectory(prefix="tiny-llm-reference-") as empty:
        reference = house.with_overlay(Path(empty))
        return run_suites(reference, suites, arguments, about="the reference").returncode


def watch(house: House, syllabus: Syllabus, day: Day, arguments: Sequence[str], saves: Iterator[None]) -> int:
    """Test, and test again after every save, until `saves` ends; the last exit code."""
    code = _test_patiently(house, syllabus, day, arguments)
    for _ in saves:
        code = _test_patiently(house, syllabus, day, arguments)
    return code


def saves(house: House) -> Iterator[None]:
    """One item for each time that a file of the overlay was saved; ends never (Ctrl-C does it)."""
    before = _times(house)
    while True:
        time.sleep(WATCH_SECONDS)
        now = _times(house)
        if now != before:
            before = now
            yield


def _test_patiently(house: House, syllabus: Syllabus, day: Day, arguments: Sequence[str]) -> int:
    """A half-written file is no reason to stop watching."""
    try:
        code = run_day(house, syllabus, day, arguments)
    except CourseError as error:
        print(f"error: {error}")
        code = 1
    print(f"watching {house.shown(house.overlay)}: save a file to test again, Ctrl-C to stop", flush=True)
    return code


def _times(house: House) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in house.overlay.glob("*.py")}


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
    print(f"  pdm run compare {day.id}   beside the reference")
    print(f"  pdm run diff {day.id}      how the reference does it")
    after = syllabus.after(day)
    if after is not None:
        verb = "start" if missing_modules(house, after) else "test"
        print(f"  pdm run {verb} {after.id}     next: {after.title}", flush=True)


def _tell_first(outcome: Outcome, day: Day) -> None:
    line = begin_here(outcome, day)
    if line is not None:
        print(line, flush=True)


def _is_todays_fault(house: House, syllabus: Syllabus, day: Day) -> bool:
    """False where today's modules pass without the learner's others; says which of them it is."""
    print("looking where the fault is ...", flush=True)
    if not passes_alone(house, day):
        files = " or ".join(f"{module}.py" for module in day.modules)
        print(f"the fault is in {files}: alone on the reference, day {day.id} fails too.", flush=True)
        return True
    print(f"today's code is right: alone on the reference, day {day.id} passes.")
    found = culprits(house, day)
    for module in found:
        owner = syllabus.owner(module)
        again = f": pdm run test {owner.id}" if owner is not None else ""
        print(f"it fails with your {module}.py{f' (day {owner.id})' if owner else ''}{again}")
    if not found:
        print("no other module of yours makes it fail by itself: several of them together do.", flush=True)
    return False
