"""The commands that run suites: test, test-refsol, course-check. Each parses, calls, prints."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import open_course
from .check import check
from .errors import CourseError
from .testing import run_day, run_reference, run_started, saves, watch


def on_test(
    context: typer.Context,
    day: Annotated[
        str | None,
        typer.Argument(metavar="[DAY]", help="Such as 1.1; without it, all days that you started."),
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Today's modules alone, on the reference.")
    ] = False,
    watched: Annotated[bool, typer.Option("--watch", help="Test again after every save.")] = False,
    week: Annotated[int | None, typer.Option(help="With --day: another way to name a day.")] = None,
    day_number: Annotated[int | None, typer.Option("--day", help="With --week.")] = None,
) -> int:
    """Run a day's tests on your code; what stands behind the day goes to pytest.

    \b
    pdm run test 1.1
    pdm run test 1.1 -x           # stop at the first failure; -l shows the values of its variables
    pdm run test 1.1.2            # one task
    pdm run test --week 1 --day 1
    pdm run test

    The header says which modules are yours. Tracebacks leave the lines of the reference out; --full-trace
    shows them. When a day fails although its own code is right, the run finds which of your other modules is
    the reason.
    """
    house, syllabus = open_course()
    arguments = list(context.args)
    if day is not None and day.startswith("-"):
        arguments.insert(0, day)
        day = None
    arguments, isolated, watched = _own_options(arguments, isolated, watched)
    if week is not None or day_number is not None:
        if week is None or day_number is None:
            raise CourseError("--week and --day go together: pdm run test --week 1 --day 1")
        day = f"{week}.{day_number}"
    if day is None:
        return run_started(house, syllabus, arguments)
    if day.count(".") == 2:
        task = syllabus.exercise(day).id
        day, arguments = task.rpartition(".")[0], ["-k", f"test_task_{task.rpartition('.')[2]}_", *arguments]
    chosen = syllabus.to_start(day)
    if watched:
        return watch(house, syllabus, chosen, arguments, saves(house))
    return run_day(house, syllabus, chosen, arguments, isolated=isolated)


def on_test_refsol(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(metavar="[DAY|FILE]", help="Such as 1.1, or tests_refsol/test_week_1_day_1.py."),
    ] = None,
) -> int:
    """Run the course's tests on the reference; what stands behind goes to pytest.

    \b
    pdm run test-refsol
    pdm run test-refsol 1.1
    pdm run test-refsol tests_refsol/test_week_1_day_1.py -k softmax
    """
    house, syllabus = open_course()
    arguments = list(context.args)
    if what is not None and what.startswith("-"):
        arguments.insert(0, what)
        what = None
    if what is None:
        return run_reference(house, [house.suites], arguments)
    if Path(what.partition("::")[0]).exists():
        return run_reference(house, [], [*arguments, what])
    return run_reference(house, [house.suites / syllabus.to_start(what).suite], arguments)


def on_course_check(
    static_only: Annotated[
        bool, typer.Option("--static", help="Only what can be read from the files: seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list of problems.")] = False,
) -> int:
    """Prove that the course holds together: for maintainers, and for CI. A few minutes.

    Every blank exercise makes a test of its day fail, with its own message; every starter imports, is
    formatted and leaks no line of its solution; no test needs a later day, looks into private names or
    asserts block ids; the reference passes all.
    """
    house, syllabus = open_course()

    def report(what: str, done: int, total: int) -> None:
        if not as_json:
            print(f"[{done}/{total}] {what}" if total else what, flush=True)

    problems = check(house, syllabus, report, static_only=static_only)
    if as_json:
        print(json.dumps([problem._asdict() for problem in problems]))
    else:
        print("\n".join(map(str, problems)) or "the course holds together")
    return int(bool(problems))


def _own_options(arguments: list[str], isolated: bool, watched: bool) -> tuple[list[str], bool, bool]:
    """Options of ours that were written behind the day, where everything else is pytest's."""
    isolated |= "--isolated" in arguments
    watched |= "--watch" in arguments
    return [a for a in arguments if a not in ("--isolated", "--watch")], isolated, watched
