"""`pdm run lab NAME`: an experiment of the book, through your modules where you have written them.

Finds the lab, reads its options, runs it, and shows what it found: as tables, as JSON, as a picture.
0: done. 1: it failed. 2: it was called wrongly. 130: Ctrl-C.
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
from tiny_llm_course.errors import CourseError
from tiny_llm_course.learner import learners_errors
from tiny_llm_course.repo import Repo

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
INTRODUCTION = """\
Usage: pdm run lab NAME [--json] [--plot FILE] [its own options]

The experiments of the book. Each prints tables that set what a definition predicts beside what was
measured, and says what follows. What is measured are your modules where you have written them, and
the reference's everywhere else.

  pdm run lab trap                    tables on the screen
  pdm run lab trap --plot trap.svg    and a picture, .svg or .png
  pdm run lab trap --json             one JSON object instead of tables
  pdm run lab trap --help             what it does, and its options

Labs, and the day that each belongs to:
"""


def main() -> None:
    """Run the command of this process and exit."""
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = (f"  {lab.name:10} {lab.day}  {lab.line}" for lab in catalog.all_labs())
        print(INTRODUCTION + "\n".join(lines))
        return OK
    name, *options = arguments
    try:
        lab = catalog.find(name)
        with learners_errors(Repo.here()):
            as_command(lab, lab.load()).main(options, prog_name=f"pdm run lab {name}", standalone_mode=False)
    except (TyperException, catalog.UnknownLabError) as error:
        return _fail(error.format_message() if isinstance(error, TyperException) else str(error), USAGE)
    except Exception as error:
        if not _is_refusal(error):
            raise
        return _fail(str(error), FAILED)
    return OK


def as_command(lab: Lab, measure: Callable[..., Result]) -> TyperCommand:
    """A lab as a command: its function's parameters but the first are options, beside --json and --plot."""

    def command(as_json: bool, plot: Path | None, **settings: Any) -> None:
        if plot is not None:
            draw.check(plot)
        result = measure(_progress, **settings)
        _deliver(_report(lab, result, settings), as_json, plot)

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
    app.command(help=lab.doc)(command)
    built = get_command(app)
    assert isinstance(built, TyperCommand)
    return built


def _shared_options(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write the lab's picture there: .svg or .png.", metavar="FILE")
    ] = None,
) -> None:
    """The options that every lab has, beside its own."""


def _report(lab: Lab, result: Result, settings: dict[str, object]) -> Report:
    from tiny_llm_cli import facts

    yours = facts.overlay()["modules"]
    assert isinstance(yours, list)
    return Report(lab, result, settings, facts.machine(), yours)


def _deliver(report: Report, as_json: bool, plot: Path | None) -> None:
    if as_json:
        print(json.dumps(as_json_object(report)))
    else:
        show(report)
    if plot is not None:
        draw.draw(report.result.picture, plot)
        print(f"picture: {plot}", file=sys.stderr)


def _progress(what: str, done: int, total: int) -> None:
    """One line on a terminal, rewritten in place, without a thread that would disturb what is measured."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{what} {done}/{total}", end=end, file=sys.stderr, flush=True)


def _is_refusal(error: Exception) -> bool:
    """Whether the message is meant for the user; anything else is a mistake of ours and stays a traceback."""
    if isinstance(error, CourseError | draw.PictureError | OSError):
        return True
    from tiny_llm import TinyLLMError

    return isinstance(error, TinyLLMError)


def _fail(message: str, code: int) -> int:
    line_start = "\r\033[K" if sys.stderr.isatty() else ""  # there may be a line of progress
    print(f"{line_start}error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
