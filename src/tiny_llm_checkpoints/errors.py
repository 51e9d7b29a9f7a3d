"""Errors of model files, and the base class of all errors that tiny-llm raises on purpose.

Each message names the offending value and the limit. Errors that a caller can cause are also `ValueError`s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import Any


class TinyLLMError(Exception):
    """Base class of every error that tiny-llm raises on purpose. It can be pickled, without its cause."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the copy without `__init__` if that takes other arguments than `args` has."""
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[TinyLLMError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TinyLLMError:
    try:
        error = kind(*args)
    except TypeError:
        error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(TinyLLMError, ValueError):
    """An option is unknown or has an unusable value; the message names both."""


class PromptTooLongError(TinyLLMError, ValueError):
    """A prompt leaves no space in the context for even one output token."""


class ModelFileError(TinyLLMError, ValueError):
    """A model file cannot be read. The message names the file, what was found, and what was expected.

    It is one line of printable text, whatever the file contains.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


MAX_MESSAGE = 2000  # characters of a message, which may quote the file


def _printable(message: str) -> str:
    """Shorten a long message in the middle, and escape characters that are not printable."""
    half = MAX_MESSAGE // 2
    shown = message if len(message) <= MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
SHOWN_BITS = 256  # larger integers are described, because Python limits conversion to 4,300 digits


def shown(value: object) -> str:
    """The value's repr for an error message, shortened. Never raises, and never takes long."""
    if isinstance(value, int) and int.bit_length(value) > SHOWN_BITS:
        return f"a number of {int.bit_length(value)} bits"
    try:
        return _SHORT.repr(value)
    except Exception:  # the value's own __repr__ may raise anything
        return f"a {type(value).__name__}"


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError or ValueError in the `with` block into a `ModelFileError` that names `file`."""
    try:
        yield
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(f"{file}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise ModelFileError(f"{file}: {error}") from error
