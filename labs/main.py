"""`pdm run lab NAME`: run an experiment of the course with your modules and, where missing, the reference's.

Finds the lab, reads its options, runs it, and shows the result as tables, JSON or a picture. Exit codes:
0 success, 1 the lab failed, 2 wrong arguments, 130 interrupted by Ctrl-C.
"""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException
from typer.main import get_command

import catalog
import draw
from catalog import Lab
from report import Report, as_json_object, show
from result import Result
from tiny_llm_cli.command import Command
from tiny_llm_cli.mistakes import explain
from tiny_llm_course.cpp import refuse_outdated, running_kernels
from tiny_llm_course.errors import CourseError
from tiny_llm_course.learner import learners_errors
from tiny_llm_course.repo import Repo
from tiny_llm_course.syllabus import Syllabus, read_syllabus

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
INTRODUCTION = """\
Usage: pdm run lab NAME [--json] [--plot FILE] [options of the lab]

Run an experiment of the course. A lab predicts numbers from definitions, measures them, and prints
both in tables with a conclusion. It measures the modules that you have written; all other modules
are the reference's.

  pdm run lab trap                    print tables
  pdm run lab trap --plot trap.svg    also draw a picture, .svg or .png
  pdm run lab trap --json             print one JSON object instead of tables
  pdm run lab trap --help             describe the lab and its options

Labs, each with its course day:
"""


def main() -> None:
    """Run the command line of this process and exit."""
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = (f"  {lab.name:10} {lab.day}  {lab.summary}" for lab in catalog.all_labs())
        print(INTRODUCTION + "\n".join(lines))
        return OK
    name, *options = arguments
    try:
        lab = catalog.find(name)
        with learners_errors(Repo.here()):
            as_command(lab, lab.load()).main(options, prog_name=f"pdm run lab {name}", standalone_mode=False)
    except (TyperException, catalog.UnknownLabError) as error:
        return _fail(explain(error) if isinstance(error, TyperException) else str(error), USAGE)
    except Exception as error:
        if not _is_user_error(error):
            raise
        return _fail(str(error), FAILED)
    return OK


def as_command(lab: Lab, measure: Callable[..., Result]) -> TyperCommand:
    """Make a command from a lab: the parameters of `measure` after the first, --json and --plot."""

    def command(as_json: bool, plot: Path | None, **settings: Any) -> None:
        if plot is not None:
            draw.check(plot)
        refuse_outdated(*_course())
        result = measure(_progress, **settings)
        _output(_report(lab, result, settings), as_json, plot)

    own = list(inspect.signature(measure).parameters.values())[1:]
    shared = list(inspect.signature(_shared_options).parameters.values())
    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own + shared]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(help=lab.doc, cls=Command)(command)
    built = get_command(app)
    assert isinstance(built, TyperCommand)
    return built


def _shared_options(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture to this .svg or .png file.", metavar="FILE")
    ] = None,
) -> None:
    """The options that all labs have."""


def _report(lab: Lab, result: Result, settings: dict[str, object]) -> Report:
    from tiny_llm_cli import facts

    yours = facts.overlay()["modules"]
    assert isinstance(yours, list)
    kernels = [kernel.file for kernel in running_kernels(*_course())]
    return Report(lab, result, settings, facts.machine(), yours, kernels)


def _course() -> tuple[Repo, Syllabus]:
    """This checkout and its syllabus."""
    repo = Repo.here()
    return repo, read_syllabus(repo.syllabus)


def _output(report: Report, as_json: bool, plot: Path | None) -> None:
    if as_json:
        print(json.dumps(as_json_object(report)))
    else:
        show(report)
    if plot is not None:
        draw.draw(report.result.picture, plot)
        print(f"wrote {plot}", file=sys.stderr)


def _progress(what: str, done: int, total: int) -> None:
    """Print progress on a terminal, on one line; without a thread, which would disturb the measurement."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{what} {done}/{total}", end=end, file=sys.stderr, flush=True)


def _is_user_error(error: Exception) -> bool:
    """Whether the error's message is meant for the user; any other error is a bug and keeps its traceback."""
    if isinstance(error, CourseError | draw.PictureError | OSError):
        return True
    from tiny_llm import TinyLLMError

    return isinstance(error, TinyLLMError)


def _fail(message: str, code: int) -> int:
    line_start = "\r\033[K" if sys.stderr.isatty() else ""  # clear a line of progress
    print(f"{line_start}error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
