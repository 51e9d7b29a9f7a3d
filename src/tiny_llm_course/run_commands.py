"""The commands that run suites: test, test-refsol, course-check. Each parses, calls, prints."""

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .arguments import open_course
from .errors import CourseError
from .runs import TIME_LIMIT, tests_of
from .testing import run_day, run_reference, run_started
from .watch import saves, watch


def on_test(
    context: typer.Context,
    day: Annotated[
        str | None,
        typer.Argument(
            metavar="[DAY]", help="Such as 1.1 or the part 3.2b; without it, all that you started."
        ),
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Only the modules of this day or part, on the reference.")
    ] = False,
    watched: Annotated[
        bool, typer.Option("--watch", help="Test again after every save; a save ends a run under way.")
    ] = False,
    time_limit: Annotated[
        float, typer.Option(min=0, help="Longest time of one test in seconds; 0 for no limit.")
    ] = TIME_LIMIT,
    week: Annotated[int | None, typer.Option(help="With --day: another way to name a day.")] = None,
    day_number: Annotated[int | None, typer.Option("--day", help="With --week.")] = None,
) -> int:
    """Run a day's tests on your code; options after the day that are not ours go to pytest.

    \b
    pdm run test 1.1
    pdm run test 1.1 -x           # stop at the first failure and show it whole; -l adds its variables
    pdm run test 1.1 -s           # show what your code prints, also where tests pass
    pdm run test 1.1 --tb=short   # show every failure
    pdm run test 1.1.2            # one task
    pdm run test 3.2b             # one part; a day passes when all of its parts do
    pdm run test 1.1 --watch      # keep this running while you write
    pdm run test --week 1 --day 1
    pdm run test

    Of many failures the first of the first failing exercise is shown, last; the others are named. Then the
    run looks for the fault: which exercise it is in, or which of your modules of other days.

    \b
    breakpoint() in your code stops there, in Python's debugger: p NAME prints a value, n goes on by a line,
    c until the next stop, q ends. The time limit waits meanwhile.

    Ctrl-C ends the run and says where it stood. The header says which modules are yours. Tracebacks leave the
    lines of the reference out; --full-trace shows them.
    """
    repo, syllabus = open_course()
    arguments = list(context.args)
    if day is not None and day.startswith("-"):
        arguments.insert(0, day)
        day = None
    own, arguments = _own_options().parse_known_args(arguments)
    isolated, watched = isolated or own.isolated, watched or own.watch
    time_limit = own.time_limit if own.time_limit is not None else time_limit
    if week is not None or day_number is not None:
        if week is None or day_number is None:
            raise CourseError("--week and --day go together: pdm run test --week 1 --day 1")
        day = f"{week}.{day_number}"
    if day is None:
        return run_started(repo, syllabus, arguments, time_limit=time_limit)
    if day.count(".") == 2:
        arguments = [f"--tasks={syllabus.exercise(day).id.rpartition('.')[2]}", *arguments]
    chosen = syllabus.to_start(day)
    if watched:
        again = [sys.executable, "-m", "tiny_llm_course", "test", *(["--isolated"] if isolated else [])]
        return watch(repo, [*again, f"--time-limit={time_limit}", chosen.id, *arguments], saves(repo))
    return run_day(repo, syllabus, chosen, arguments, isolated=isolated, time_limit=time_limit)


def on_test_refsol(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[DAY|FILE]", help="Such as 1.1, the part 3.2b, or tests_refsol/test_week_1_day_1.py."
        ),
    ] = None,
) -> int:
    """Run the course's tests on the reference; what stands behind goes to pytest.

    \b
    pdm run test-refsol
    pdm run test-refsol 1.1
    pdm run test-refsol 3.2b      # one part
    pdm run test-refsol tests_refsol/test_week_1_day_1.py -k softmax
    """
    repo, syllabus = open_course()
    arguments = list(context.args)
    if what is not None and what.startswith("-"):
        arguments.insert(0, what)
        what = None
    if what is None:
        return run_reference(repo, [repo.suites], arguments)
    if Path(what.partition("::")[0]).exists():
        return run_reference(repo, [], [*arguments, what])
    unit = syllabus.to_start(what)
    return run_reference(repo, [repo.suites / unit.suite], [*tests_of(unit), *arguments])


def on_course_check(
    days: Annotated[
        list[str] | None, typer.Argument(metavar="[DAY...]", help="Run only these days, such as 3.2.")
    ] = None,
    static_only: Annotated[
        bool,
        typer.Option("--static", help="Only what can be read from the files, and examples: seconds."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list of problems.")] = False,
) -> int:
    """Prove that the course holds together: for maintainers, and for CI. A few minutes.

    Every blank exercise makes a test of its day fail, with its own message; every starter imports, is
    formatted and leaks no line of its solution; no test needs a later day, looks into private names or
    asserts block ids; each part, such as 3.2b, passes while later parts are blank; every exercise has an
    example that holds; the reference and the second solutions pass all.
    """
    from .check import check

    repo, syllabus = open_course()

    def report(what: str, done: int, total: int) -> None:
        if not as_json:
            print(f"[{done}/{total}] {what}" if total else what, flush=True)

    only = [syllabus.to_start(day).day for day in days or ()]
    problems = check(repo, syllabus, report, static_only=static_only, only=only)
    if as_json:
        print(json.dumps([problem._asdict() for problem in problems]))
    else:
        print("\n".join(map(str, problems)) or "the course holds together")
    return int(bool(problems))


def _own_options() -> argparse.ArgumentParser:
    """Options of ours that were written behind the day, where everything else is pytest's."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--isolated", action="store_true")
    own.add_argument("--watch", action="store_true")
    own.add_argument("--time-limit", type=float)
    return own
