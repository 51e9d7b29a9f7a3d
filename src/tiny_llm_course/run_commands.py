"""The commands that run tests: test, test-refsol, course-check.

They parse arguments, call other modules and print.
"""

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
from .views import NextHint
from .watch import Key, saves, watch


def on_test(
    context: typer.Context,
    day: Annotated[
        str | None,
        typer.Argument(
            metavar="[DAY]",
            help="A day (1.1), a part (3.2b), an exercise (1.1.2) or a file; default: all that you started.",
        ),
    ] = None,
    isolated: Annotated[
        bool,
        typer.Option("--isolated", help="Use only your modules of this day; all others are the reference's."),
    ] = False,
    watched: Annotated[
        bool, typer.Option("--watch", help="Run again after every save; a save stops the current run.")
    ] = False,
    time_limit: Annotated[
        float, typer.Option(help="Limit for one test; 0 for no limit.", metavar="SECONDS")
    ] = TIME_LIMIT,
    week: Annotated[
        int | None, typer.Option(help="The week; --week 1 --day 2 means DAY 1.2.", metavar="N")
    ] = None,
    day_number: Annotated[
        int | None, typer.Option("--day", help="The day of that week; needs --week.", metavar="N")
    ] = None,
) -> int:
    """Run a day's tests on your code.

    \b
    pdm run test 1.1
    pdm run test 1.1 -x           # stop at the first failure and show all of it; -l adds local variables
    pdm run test 1.1 -s           # show what your code prints, also in tests that pass
    pdm run test 1.1 --tb=short   # show every failure
    pdm run test 1.1.2            # one exercise
    pdm run test 3.2b             # one part; a day passes when all of its parts pass
    pdm run test 1.1 --watch      # run again after every save; between runs, h shows a hint, q quits
    pdm run test --week 1 --day 1
    pdm run test                  # everything that you have started

    Other options after the day, such as -k, go to pytest.

    If tests fail, the output ends with the first failure of the first failing exercise; other failures are
    listed by name. The command then searches for the cause: it names the exercise, or the module of another
    day, that makes the test fail.

    \b
    breakpoint() in your code opens Python's debugger, even without -s:
    p NAME prints a value, n runs the next line, c continues, q quits. The time limit is paused meanwhile.

    Ctrl-C stops the run and shows the line that was running. Tracebacks leave out the reference's code;
    --full-trace shows it.
    """
    repo, syllabus = open_course()
    arguments = list(context.args)
    if day is not None and day.startswith("-"):
        arguments.insert(0, day)
        day = None
    own, arguments = _own_options().parse_known_args(arguments)
    isolated, watched = isolated or own.isolated, watched or own.watch
    time_limit = own.time_limit if own.time_limit is not None else time_limit
    if time_limit < 0:
        raise CourseError(f"--time-limit must be at least 0, not {time_limit:g}")
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
        keys = {"h": Key("hint", NextHint(repo, syllabus))}
        again = [sys.executable, "-m", "tiny_llm_course", "test", *(["--isolated"] if isolated else [])]
        return watch(repo, [*again, f"--time-limit={time_limit}", chosen.id, *arguments], saves(repo), keys)
    return run_day(repo, syllabus, chosen, arguments, isolated=isolated, time_limit=time_limit)


def on_test_refsol(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[DAY|FILE]",
            help="A day (1.1), a part (3.2b) or a file (tests_refsol/test_week_1_day_1.py); default: all.",
        ),
    ] = None,
) -> int:
    """Run the course's tests on the reference.

    \b
    pdm run test-refsol
    pdm run test-refsol 1.1
    pdm run test-refsol 3.2b      # one part
    pdm run test-refsol tests_refsol/test_week_1_day_1.py -k softmax

    Other options go to pytest.
    """
    repo, syllabus = open_course()
    arguments = list(context.args)
    if what is not None and what.startswith("-"):
        arguments.insert(0, what)
        what = None
    if what is None:
        return run_reference(repo, [repo.suites], arguments)
    file = Path(what.partition("::")[0])
    if file.exists():
        return run_reference(repo, [], [*arguments, what])
    if file.suffix == ".py" and syllabus.owner(file.stem) is None:
        raise CourseError(f"there is no file {file}")
    unit = syllabus.to_start(what)
    return run_reference(repo, [repo.suites / unit.suite], [*tests_of(unit), *arguments])


def on_course_check(
    days: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DAY...]", help="Only run the checks of these days, such as 3.2."),
    ] = None,
    static_only: Annotated[
        bool,
        typer.Option("--static", help="Only read the files and run the docstring examples; takes seconds."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of problems.")] = False,
) -> int:
    """Check the course itself; for maintainers and CI.

    \b
    It takes a few minutes, and proves that
    - a blank exercise makes a test of its day fail, with the exercise's own message;
    - every starter file can be imported, is formatted, and contains no line of a solution;
    - no test needs a later day or part (3.2b), uses a private name, or asserts block ids;
    - every exercise has a docstring example, and all examples are correct;
    - the reference, and other correct solutions (tests/second_solutions), pass all tests.
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
        print("\n".join(map(str, problems)) or "no problems found")
    return int(bool(problems))


def _own_options() -> argparse.ArgumentParser:
    """A parser for our own options after the day; the other arguments there are pytest's."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--isolated", action="store_true")
    own.add_argument("--watch", action="store_true")
    own.add_argument("--time-limit", type=float)
    return own
