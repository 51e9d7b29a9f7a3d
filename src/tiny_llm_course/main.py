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
    except UnicodeDecodeError as error:
        return _fail(f"{_not_text()} is not UTF-8 text ({error.reason}): save it as UTF-8", FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", FAILED)


def _not_text() -> str:
    """The learner's file that cannot be decoded."""
    from .repo import Repo

    for file in sorted(Repo.here().overlay.glob("*.py")):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(file)
    return "a file"


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
