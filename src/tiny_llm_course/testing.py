"""`pdm run test`: the tests of a day or a part on the learner's code, what it says, and what to do next."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .blame import BUDGET, Blame, find_blame, other_modules
from .cpp import own_kernels, refuse_stale
from .days import has_own
from .errors import CourseError
from .outcome import Outcome, first_to_fix, signal_report, task_of
from .progress import (
    Result,
    State,
    is_started,
    is_untouched,
    missing_modules,
    own_modules,
    refuse_missing,
    remember,
    result,
    started_units,
    state,
)
from .repo import Repo
from .runs import TIME_LIMIT, overlay_of, own_sources, run_suite_of, run_suites
from .syllabus import Syllabus
from .units import Day, Exercise, Part, Unit

ONLY_SHOWN = re.compile(
    r"-(v+|q+|x|l|s)|--tb=.*|--showlocals|--full-trace"
)  # pytest's; they leave no test out


def run_started(
    repo: Repo, syllabus: Syllabus, arguments: Sequence[str], *, time_limit: float = TIME_LIMIT
) -> int:
    """Test every day that was started, or what was started of it; 1 if one fails."""
    units = started_units(repo, syllabus)
    if not units:
        raise CourseError(
            "no day is started: `pdm run start 1.1` begins with the first, `pdm run map` shows all"
        )
    return max(run_day(repo, syllabus, unit, arguments, time_limit=time_limit) for unit in units)


def run_day(
    repo: Repo,
    syllabus: Syllabus,
    unit: Unit,
    arguments: Sequence[str],
    *,
    isolated: bool = False,
    time_limit: float = TIME_LIMIT,
) -> int:
    """Run the tests of a day or a part, print what follows, and remember the outcome; pytest's exit code.

    isolated: only the unit's modules, on the reference for everything else. time_limit: seconds for each
    test.
    """
    own = own_modules(repo)
    _refuse_not_started(repo, unit)
    refuse_stale(repo, syllabus)
    _print_blanks(repo, unit)
    about = f"{unit.named}, {unit.title}"
    if isolated:
        today = own_sources(repo, [module for module in own if module in unit.modules])
        with overlay_of(repo, today, kernels=bool(unit.kernels)) as alone:
            outcome = run_suite_of(alone, unit, arguments, f"{about}, isolated", time_limit)
            _print_first_to_fix(outcome, unit)
            return outcome.exit_code
    outcome = run_suite_of(repo, unit, arguments, about, time_limit)
    whole = all(ONLY_SHOWN.fullmatch(argument) for argument in arguments)
    if whole:  # part of the tests says nothing about all
        remember(repo, unit, outcome.code == 0)
        _remember_parts(repo, unit, outcome, arguments)
    if outcome.code == 0 and not whole:
        print(
            f"what you chose passes; the whole {unit.named.partition(' ')[0]}: pdm run test {unit.id}",
            flush=True,
        )
    elif outcome.code == 0:
        _print_next_steps(repo, syllabus, unit)
    elif outcome.failed and not outcome.stopped:
        _print_blame(repo, syllabus, unit, outcome)
    else:
        _print_first_to_fix(outcome, unit)
    return outcome.exit_code


def run_reference(repo: Repo, suites: Sequence[Path], arguments: Sequence[str]) -> int:
    """Run suites on the plain reference; pytest's exit code."""
    with overlay_of(repo, {}) as reference:
        return run_suites(reference, suites, arguments, about="the reference").returncode


def _refuse_not_started(repo: Repo, unit: Unit) -> None:
    missing = missing_modules(repo, unit)
    if not missing or set(own_kernels(repo, Syllabus((unit.day,)))):
        return
    files = " and ".join(f"{module}.py" for module in missing)
    begun = [] if isinstance(unit, Part) else [one for one in unit.parts if not missing_modules(repo, one)]
    if begun:
        parts = " and ".join(f"`pdm run test {part.id}`" for part in begun)
        raise CourseError(
            f"{unit.named} is started only in part: {parts}, or pdm run start {unit.id} (writes {files})"
        )
    raise CourseError(f"not started: pdm run start {unit.id} (writes {files})")


def _print_blanks(repo: Repo, unit: Unit) -> None:
    states = {exercise: state(repo, exercise) for exercise in unit.exercises}
    if all(found is State.NOT_STARTED for found in states.values()):
        return  # the day's option in C++ alone
    refuse_missing(repo, unit.exercises)
    blank = [f"{exercise.id} {exercise.name}" for exercise, found in states.items() if found is State.BLANK]
    if blank:
        print(f"still blank: {', '.join(blank)}", flush=True)


def _remember_parts(repo: Repo, unit: Unit, outcome: Outcome, arguments: Sequence[str]) -> None:
    """What a run of the whole day says about its parts, where it has run all of their tests."""
    is_whole = outcome.code == 0 or (
        outcome.code == 1
        and not outcome.stopped
        and "-x" not in arguments
        and all(map(task_of, outcome.failed))  # a file that cannot be imported has no task
    )
    parts = unit.parts if isinstance(unit, Day) and is_whole else ()
    for part in parts:
        remember(repo, part, outcome.passes(part.exercises))
    if parts and outcome.code:
        passing = ", ".join(part.id for part in parts if outcome.passes(part.exercises))
        print(f"parts that pass: {passing or 'none'}", flush=True)


def _print_next_steps(repo: Repo, syllabus: Syllabus, unit: Unit) -> None:
    print(f"{unit.named} passes{f': {unit.works}' if unit.works else ''}.")
    for command, says in _next_commands(repo, syllabus, unit):
        print(f"  pdm run {command:13}  {says}", flush=True)


def _next_commands(repo: Repo, syllabus: Syllabus, unit: Unit) -> Iterator[tuple[str, str]]:
    """What can be done after a unit that passes, and why."""
    if has_own(unit, "show"):
        yield f"try {unit.id}", "see it run"
    if unit.day.no_compare is None and has_own(unit, "work"):
        yield f"compare {unit.id}", "beside the reference"
    yield f"diff {unit.id}", "how the reference does it"
    if isinstance(unit, Part) and not unit.later:
        passing = result(repo, unit.day) is Result.PASSING
        yield (
            (f"try {unit.day.id}", "the whole day")
            if passing
            else (f"test {unit.day.id}", _why_whole(repo, unit.day))
        )
    after = syllabus.after(unit)
    if after is not None:
        begun = is_started(repo, after) and not (isinstance(after, Part) and is_untouched(repo, after))
        yield f"{'test' if begun else 'start'} {after.id}", f"next: {after.title}"


def _why_whole(repo: Repo, day: Day) -> str:
    """Why to test the whole day after its last part: a later part in the same file makes a result stale."""
    of_part = {part.id: result(repo, part) for part in day.parts}
    stale = [part for part, found in of_part.items() if found is Result.STALE]
    if set(of_part.values()) <= {Result.PASSING, Result.STALE}:
        return f"run the whole day once: files have changed since {' and '.join(stale)} ran"
    return "the whole day, of which not every part passes yet"


def _print_first_to_fix(outcome: Outcome, unit: Unit, at_fault: Exercise | None = None) -> None:
    if outcome.ended_by:
        print("\n".join(signal_report(outcome, unit.day)), flush=True)
        return
    line = first_to_fix(outcome, unit.day, at_fault)
    if line is not None:
        print(line, flush=True)


def _print_blame(repo: Repo, syllabus: Syllabus, unit: Unit, outcome: Outcome) -> None:
    """Which exercise of the unit makes the tests fail, or which of the learner's other modules."""
    print("looking for the fault ...", flush=True)
    found = find_blame(repo, unit, outcome)
    if found.sometimes:
        print(f"{found.test} fails only sometimes: the same code has passed now, run again")
        print("look for what depends on threads, on time or on chance")
        _print_first_to_fix(outcome, unit)
    elif found.today:
        for line in _today_lines(unit, found):
            print(line)
        _print_first_to_fix(outcome, unit, found.exercise)
    else:
        for line in _other_module_lines(repo, syllabus, unit, found):
            print(line, flush=True)


def _today_lines(unit: Unit, found: Blame) -> list[str]:
    if found.exercise is not None:
        one = found.exercise
        return [f"the fault is in {one.module}.py, {one.name}: with the reference's, {found.test} passes"]
    files = " or ".join(f"{module}.py" for module in unit.modules)
    if not found.complete:
        return [f"the fault is in {files}; the search for the exercise ended after {BUDGET:g} s"]
    return [f"the fault is in {files}: in several exercises, or outside of them"]


def _other_module_lines(repo: Repo, syllabus: Syllabus, unit: Unit, found: Blame) -> list[str]:
    lines = [f"today's code is right: on the reference for everything else, {found.test} passes."]
    if found.module is not None:
        owner = syllabus.owner(found.module)
        again = f" ({owner.named}): pdm run test {owner.id}" if owner is not None else ""
        return [*lines, f"it fails with your {found.module}.py{again}"]
    names = ", ".join(f"{module}.py" for module in other_modules(repo, unit))
    if not found.complete:
        return [*lines, f"it fails with one of your {names}; the search ended after {BUDGET:g} s"]
    return [*lines, f"no other module of yours makes it fail by itself: several of {names} together do."]
