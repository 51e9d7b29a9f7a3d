"""Runs a command, and reports its errors as one line and an exit code."""

import signal
import sys
from collections.abc import Sequence

from .errors import CourseError

FAILED, INTERRUPTED = 1, 130


def main() -> None:
    """Run this process's command and exit. SIGTERM also stops the child processes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    from typer._click.exceptions import NoArgsIsHelpError
    from typer.exceptions import TyperException

    from .app import command

    try:
        code = command().main(list(arguments), prog_name="pdm run", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr, flush=True)
        return error.exit_code
    except TyperException as error:
        message = error.format_message()
        if message.startswith("Missing argument"):
            message += (
                " For example: `pdm run start 1.1`, `pdm run hint 1.1.1`. `pdm run map` lists all days."
            )
        return _fail(message, error.exit_code)
    except CourseError as error:
        return _fail(str(error), FAILED)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
