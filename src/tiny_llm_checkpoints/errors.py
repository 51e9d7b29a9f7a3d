"""The errors of a model's files, and the root of all errors that tiny-llm raises on purpose.

Each message names the offending value and the limit. Errors that a caller can cause are also `ValueError`s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr


class TinyLLMError(Exception):
    """The root of every error that this package raises on purpose."""


class ConfigError(TinyLLMError, ValueError):
    """An option is unknown or has a value that cannot work; the message names both."""


class PromptTooLongError(TinyLLMError, ValueError):
    """A text has so many tokens that no output fits into the context behind it."""


class ModelFileError(TinyLLMError, ValueError):
    """A model file cannot be read: names the file, what was found, and what was expected.

    The message is one line of printable text, whatever names the file contains.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


MOST_MESSAGE = 2000  # characters of a message about a file, which may quote what the file says


def _printable(message: str) -> str:
    """The message, its middle left out where it is too long, and what is not printable as an escape."""
    half = MOST_MESSAGE // 2
    shown = message if len(message) <= MOST_MESSAGE else f"{message[:half]} ... {message[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
SHOWN_BITS = 256  # of a whole number; Python writes none of more than 4,300 digits


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, shortened; never raises, and never takes long."""
    if isinstance(value, int) and int.bit_length(value) > SHOWN_BITS:
        return f"a number of {int.bit_length(value)} bits"
    try:
        return _SHORT.repr(value)
    except Exception:  # whatever the value's own repr raised
        return f"a {type(value).__name__}"


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """What goes wrong in this block is wrong with that file: it becomes a `ModelFileError` that names it."""
    try:
        yield
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(f"{file}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise ModelFileError(f"{file}: {error}") from error
