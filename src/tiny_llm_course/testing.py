"""`pdm run test`: runs the tests of a day or a part on the learner's code, and says what to do next."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .blame import Blame, find_blame, other_modules
from .cpp import own_kernels, refuse_stale
from .days import has_own
from .errors import CourseError
from .labs import labs_after
from .outcome import UNFINISHED, Outcome, first_to_fix, signal_report, task_of
from .progress import (
    Result,
    State,
    helper_files,
    is_started,
    is_untouched,
    missing_modules,
    note_first_to_fix,
    own_modules,
    reached,
    refuse_missing,
    remember,
    result,
    started_units,
    state,
)
from .repo import Repo
from .runs import TIME_LIMIT, overlay_of, own_sources, run_suite_of, run_suites
from .syllabus import Syllabus
from .syntax import function_at, syntax_error
from .units import Day, Exercise, Kernel, Part, Unit, exercise_range

ONLY_SHOWN = re.compile(
    r"-(v+|q+|x|l|s)|--tb=.*|--showlocals|--full-trace"
)  # pytest options that do not deselect any test


def run_started(
    repo: Repo, syllabus: Syllabus, arguments: Sequence[str], *, time_limit: float = TIME_LIMIT
) -> int:
    """Test every day and part that was started; returns the highest exit code."""
    units = started_units(repo, syllabus)
    if not units:
        raise CourseError(
            "no day is started: `pdm run start 1.1` starts the first, `pdm run map` lists all days"
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
    """Run the tests of a day or a part, print the advice, record the outcome, and return pytest's exit code.

    isolated: of the learner's modules, use only the unit's, and the reference for everything else.
    time_limit: seconds for each test.
    """
    own = own_modules(repo)
    _refuse_not_started(repo, unit)
    refuse_stale(repo, syllabus)
    note_first_to_fix(repo, None)
    _refuse_syntax_errors(repo, syllabus, unit, set(unit.modules) if isolated else set(own))
    _print_blanks(repo, unit)
    about = f"{unit.named}, {unit.title}"
    if isolated:
        today = own_sources(repo, [module for module in own if module in unit.modules])
        with overlay_of(repo, today, kernels=bool(unit.kernels)) as isolated_repo:
            outcome = run_suite_of(isolated_repo, unit, arguments, f"{about}, isolated", time_limit)
            _print_first_to_fix(repo, outcome, unit)
            return outcome.exit_code
    outcome = run_suite_of(repo, unit, arguments, about, time_limit)
    whole = all(ONLY_SHOWN.fullmatch(argument) for argument in arguments)
    if whole:  # a selection of tests proves nothing about the whole unit
        remember(repo, unit, outcome.code == 0)
        _remember_parts(repo, unit, outcome, arguments)
    if outcome.code == 0 and not whole:
        print(
            f"the selected tests pass; the whole {unit.named.partition(' ')[0]}: pdm run test {unit.id}",
            flush=True,
        )
    elif outcome.code == 0:
        _print_next_steps(repo, syllabus, unit)
    elif outcome.failed and not outcome.stopped:
        _print_blame(repo, syllabus, unit, outcome)
    else:
        if outcome.code == UNFINISHED:
            print(
                "the tests did not finish: code that they run ended the process, as os._exit does", flush=True
            )
        _print_first_to_fix(repo, outcome, unit)
    return outcome.exit_code


def run_reference(repo: Repo, suites: Sequence[Path], arguments: Sequence[str]) -> int:
    """Run suites on the reference only, and return pytest's exit code."""
    with overlay_of(repo, {}) as reference:
        return run_suites(reference, suites, arguments, about="the reference").returncode


def _refuse_not_started(repo: Repo, unit: Unit) -> None:
    missing = missing_modules(repo, unit)
    if not missing or set(own_kernels(repo, Syllabus((unit.day,)))):
        return
    files = " and ".join(f"{module}.py" for module in missing)
    started = [] if isinstance(unit, Part) else [one for one in unit.parts if not missing_modules(repo, one)]
    if started:
        parts = " and ".join(f"`pdm run test {part.id}`" for part in started)
        raise CourseError(
            f"only a part of {unit.named} is started: {parts}, or `pdm run start {unit.id}` (writes {files})"
        )
    raise CourseError(f"{unit.named} is not started: pdm run start {unit.id} (writes {files})")


def _refuse_syntax_errors(repo: Repo, syllabus: Syllabus, unit: Unit, modules: set[str]) -> None:
    """Raise `CourseError` if a file that the suite needs does not compile; it names the exercise.

    modules: the learner's modules that the run uses; helper files are checked too.
    """
    helpers = {file.stem for file in helper_files(repo)}
    for module in sorted((modules | helpers) & reached(repo, unit)):
        file = repo.overlay / f"{module}.py"
        if not file.exists() or (error := syntax_error(file)) is None:
            continue
        name = function_at(file.read_text(encoding="utf-8"), error)
        of_module = [one for day in syllabus.days for one in day.of_module(module)]
        exercise = next((one for one in of_module if one.name == name), None)
        if exercise is not None and exercise in unit.exercises:
            note_first_to_fix(repo, exercise.id)
        named = f"{exercise.id} {name}" if exercise is not None else name
        where = f"line {error.lineno}{f', in {named}' if named else ''}"
        raise CourseError(f"{repo.shown(file)}, {where}: {error.msg}")


def _print_blanks(repo: Repo, unit: Unit) -> None:
    states = {exercise: state(repo, exercise) for exercise in unit.exercises}
    if all(found is State.NOT_STARTED for found in states.values()):
        return  # only the day's kernel in C++ is started
    refuse_missing(repo, unit.exercises)
    blank = [f"{exercise.id} {exercise.name}" for exercise, found in states.items() if found is State.BLANK]
    if blank:
        print(f"still blank: {', '.join(blank)}", flush=True)


def _remember_parts(repo: Repo, unit: Unit, outcome: Outcome, arguments: Sequence[str]) -> None:
    """Record the outcome of each part after a run of the whole day that ran the tests of all parts."""
    is_whole = outcome.code == 0 or (
        outcome.code == 1
        and not outcome.stopped
        and "-x" not in arguments
        and all(map(task_of, outcome.failed))  # task 0: a file that cannot be imported
    )
    parts = unit.parts if isinstance(unit, Day) and is_whole else ()
    for part in parts:
        remember(repo, part, outcome.passes(part.exercises))
    if parts and outcome.code:
        passing = ", ".join(part.id for part in parts if outcome.passes(part.exercises))
        print(f"passing parts: {passing or 'none'}", flush=True)


def _print_next_steps(repo: Repo, syllabus: Syllabus, unit: Unit) -> None:
    print(_passes(repo, unit))
    for command, says in _next_commands(repo, syllabus, unit):
        print(f"  pdm run {command:13}  {says}", flush=True)


def _passes(repo: Repo, unit: Unit) -> str:
    """The line that says what passes: the unit, or only its kernel if its exercises are the reference's."""
    kernels = own_kernels(repo, Syllabus((unit.day,)))
    if kernels and set(missing_modules(repo, unit)) == set(unit.modules):
        own = ", ".join(f"{kernel.id} {kernel.file}" for kernel in kernels)
        verb = "passes" if len(kernels) == 1 else "pass"
        exercises = exercise_range(unit.exercises)
        return f"your {own} {verb}. {exercises} are the reference's: pdm run start {unit.id}"
    return f"{unit.named} passes. {f'What works now: {unit.works}.' if unit.works else ''}".rstrip()


def _next_commands(repo: Repo, syllabus: Syllabus, unit: Unit) -> Iterator[tuple[str, str]]:
    """The commands to run after a unit passes, each with what it is for."""
    if has_own(unit, "show"):
        yield f"try {unit.id}", "see it run"
    if unit.day.no_compare is None and has_own(unit, "work"):
        yield f"compare {unit.id}", "measure it against the reference"
    yield f"diff {unit.id}", "see how the reference does it"
    for lab in labs_after(repo, unit):
        yield f"lab {lab}", "an experiment: predict a number, then measure it"
    if isinstance(unit, Part) and not unit.later:
        passing = result(repo, unit.day) is Result.PASSING
        yield (
            (f"try {unit.day.id}", "the whole day")
            if passing
            else (f"test {unit.day.id}", _why_whole(repo, unit.day))
        )
    after = syllabus.after(unit)
    if after is not None:
        is_begun = is_started(repo, after) and not (isinstance(after, Part) and is_untouched(repo, after))
        yield f"{'test' if is_begun else 'start'} {after.id}", f"next: {after.title}"


def _why_whole(repo: Repo, day: Day) -> str:
    """Why to test the whole day after its last part: editing a file makes results of earlier parts stale."""
    of_part = {part.id: result(repo, part) for part in day.parts}
    stale = [part for part, found in of_part.items() if found is Result.STALE]
    if set(of_part.values()) <= {Result.PASSING, Result.STALE}:
        return f"test the whole day once: files have changed since {' and '.join(stale)} passed"
    return "the whole day; some of its parts do not pass yet"


def _print_first_to_fix(
    repo: Repo, outcome: Outcome, unit: Unit, at_fault: Exercise | Kernel | None = None
) -> None:
    if outcome.ended_by:
        print("\n".join(signal_report(outcome, unit.day)), flush=True)
        return
    first = first_to_fix(outcome, unit.day, at_fault)
    if first is not None:
        note_first_to_fix(repo, first.exercise_id)
        print(first, flush=True)


def _print_blame(repo: Repo, syllabus: Syllabus, unit: Unit, outcome: Outcome) -> None:
    """Say which exercise of the unit, or which other module of the learner's, makes the tests fail."""
    print("searching for the cause ...", flush=True)
    found = find_blame(repo, syllabus, unit, outcome)
    if found.sometimes:
        print(f"{found.test} fails only sometimes: the same code passed when it ran again")
        print("look for code that depends on threads, on timing or on randomness")
        _print_first_to_fix(repo, outcome, unit)
    elif found.kernels:
        files = " or ".join(repo.shown(repo.overlay / kernel.file) for kernel in found.kernels)
        print(f"the cause is in {files}: {found.test} passes with the reference's compiled kernels")
        at_fault = found.kernels[0] if len(found.kernels) == 1 else None
        _print_first_to_fix(repo, outcome, unit, at_fault)
    elif found.today:
        for line in _today_lines(unit, found):
            print(line)
        _print_first_to_fix(repo, outcome, unit, found.exercise)
    else:
        for line in _other_module_lines(repo, syllabus, unit, found):
            print(line, flush=True)


def _today_lines(unit: Unit, found: Blame) -> list[str]:
    if found.exercise is not None:
        one = found.exercise
        return [
            f"the cause is in {one.module}.py, {one.name}: {found.test} passes with the reference's version"
        ]
    files = " or ".join(f"{module}.py" for module in unit.modules)
    if found.stopped_after is not None:
        stopped = f"the search for the exercise stopped after {found.stopped_after:.0f} s"
        return [
            f"the cause is in {files}; {stopped}",
            "the next line names an exercise whose tests fail; the mistake may be in another one",
        ]
    return [f"the cause is in {files}: in several exercises, or outside of the exercises"]


def _other_module_lines(repo: Repo, syllabus: Syllabus, unit: Unit, found: Blame) -> list[str]:
    lines = [f"today's code is correct: {found.test} passes when all other modules are the reference's."]
    if found.module is not None:
        owner = syllabus.owner(found.module)
        again = f" ({owner.named}): pdm run test {owner.id}" if owner is not None else ""
        return [*lines, f"it fails together with your {found.module}.py{again}"]
    names = ", ".join(f"{module}.py" for module in other_modules(repo, unit))
    if found.stopped_after is not None:
        stopped = f"the search stopped after {found.stopped_after:.0f} s"
        return [*lines, f"it fails together with one of your {names}; {stopped}"]
    return [*lines, f"no single other module makes it fail; several of {names} together do."]
