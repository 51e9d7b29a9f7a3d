"""The entry point of the command line: runs a command and turns an error into one line and an exit code.

0: done. 1: the command failed. 2: the command line is wrong. 130: Ctrl-C. An error is one line on standard
error; the environment variable TINY_LLM_DEBUG=1 shows the traceback instead.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from threading import enumerate as enumerate_threads

from tiny_llm_course.mistake import one_line

from .closed_output import ClosedOutput

OK, FAILED, INTERRUPTED = 0, 1, 130


def main() -> None:
    """Run the command line of this process and exit."""
    if sys.stdout is None:
        sys.stdout = ClosedOutput()
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED or _is_loading():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without destructors: MLX aborts if one of its threads is starting or runs
    sys.exit(code)


def _is_loading() -> bool:
    """True if a server was stopped while its thread `load` still makes the model."""
    return any(thread.name == "load" for thread in enumerate_threads())


def run(arguments: Sequence[str]) -> int:
    """Run one command line, given without the program's name, and return the exit code."""
    from typer.exceptions import TyperException

    from .app import command
    from .mistakes import explain

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say("warning", str(message))
        try:
            code = command().main(list(arguments), prog_name="tiny-llm", standalone_mode=False)
            return code if isinstance(code, int) else OK
        except TyperException as error:
            return _fail(error, explain(error), error.exit_code)
        except SystemExit as error:  # a learner's module may raise it
            if (mistake := one_line(error)) is None:
                raise
            return _fail(error, mistake, FAILED)
        except Exception as error:
            return _fail(error, _explained(error), FAILED)


def _explained(error: Exception) -> str:
    """An error in one line. Raises the error again if it is a bug of this program."""
    if isinstance(error, MemoryError | RuntimeError) and (resource := _missing_resource(error)) is not None:
        return resource
    if (mistake := one_line(error)) is not None:
        return mistake
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if named else error.strerror or str(error)
    if not _is_for_the_user(error):
        raise error
    return str(error)


def _missing_resource(error: MemoryError | RuntimeError) -> str | None:
    """Name the resource that the system refused, in one line; None if the error is about something else."""
    from tiny_llm.resources import limits, missing_resource

    from tiny_llm import TinyLLMError

    missing = None if isinstance(error, TinyLLMError) else missing_resource(error)
    return None if missing is None else f"not enough {missing} ({limits()})"


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("TINY_LLM_DEBUG"):
        raise error
    _say("error", message)
    return code


def _say(kind: str, message: str) -> None:
    print(f"tiny-llm: {kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message is meant for the user. Any other error is a bug and stays a traceback."""
    if isinstance(error, ValueError | ImportError):
        return True
    from tiny_llm import TinyLLMError

    return isinstance(error, TinyLLMError)


if __name__ == "__main__":
    main()
