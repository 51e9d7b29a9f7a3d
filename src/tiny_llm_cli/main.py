"""The door of the command line: runs a command and turns whatever it raises into an exit code.

0: done. 1: it failed. 2: it was called wrongly. 130: Ctrl-C. What went wrong is one line on standard
error; the environment variable TINY_LLM_DEBUG=1 shows the traceback instead.
"""

import os
import sys
import warnings
from collections.abc import Sequence

from .overlay import one_line

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Run the command of this process and exit."""
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line, without the program's name; the exit code."""
    from typer.exceptions import TyperException

    from .app import command

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say("warning", str(message))
        try:
            code = command().main(list(arguments), prog_name="tiny-llm", standalone_mode=False)
            return code if isinstance(code, int) else OK
        except TyperException as error:
            return _fail(error, error.format_message() + _where_help_is(error), error.exit_code)
        except Exception as error:
            return _fail(error, *_explained(error))


def _explained(error: Exception) -> tuple[str, int]:
    """An error in one line, and the exit code. Raises it again where it is a mistake of ours."""
    if isinstance(error, MemoryError | RuntimeError) and (resource := _missing_resource(error)) is not None:
        return resource, FAILED
    if (of_a_learner := one_line(error)) is not None:
        return of_a_learner, FAILED
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return (f"{error.filename}: {error.strerror}" if named else str(error)), FAILED
    if not _is_refusal(error):
        raise error
    return str(error), USAGE if _is_option_error(error) else FAILED


def _missing_resource(error: MemoryError | RuntimeError) -> str | None:
    """What the system did not give, in one line; None where the error is about something else."""
    from tiny_llm.resources import limits, missing_resource

    from tiny_llm import TinyLLMError

    missing = None if isinstance(error, TinyLLMError) else missing_resource(error)
    return None if missing is None else f"not enough {missing} ({limits()})"


def _fail(error: Exception, message: str, code: int) -> int:
    if os.environ.get("TINY_LLM_DEBUG"):
        raise error
    _say("error", message)
    return code


def _say(kind: str, message: str) -> None:
    print(f"tiny-llm: {kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _where_help_is(error: Exception) -> str:
    """Names the command whose help describes what was called wrongly."""
    context = getattr(error, "ctx", None)
    return "" if context is None else f" (see `{context.command_path} --help`)"


def _is_refusal(error: Exception) -> bool:
    """Whether the message is meant for the user; anything else is a mistake of ours and stays a traceback."""
    if isinstance(error, ValueError | ImportError):
        return True
    from tiny_llm import TinyLLMError

    return isinstance(error, TinyLLMError)


def _is_option_error(error: Exception) -> bool:
    if isinstance(error, ImportError):
        return False
    from tiny_llm import ConfigError, SamplingParamsError

    return isinstance(error, ConfigError | SamplingParamsError)


if __name__ == "__main__":
    main()
