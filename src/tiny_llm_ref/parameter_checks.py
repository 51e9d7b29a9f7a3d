"""Checks of a request's parameters: a value comes back as a plain Python one, or is refused.

Every refusal is a `SamplingParamsError`. Its message begins with the field's name, and has the range that is
allowed and the value, shortened. Numbers may be NumPy's. A list that is too long is refused before its
elements are looked at, so a refusal costs no more than the longest list that is allowed.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from operator import index
from typing import Any, NoReturn

from tiny_llm_checkpoints.errors import shown

from .errors import SamplingParamsError, is_integer

MOST_COUNT = 2**31 - 1
MOST_SALT_CHARACTERS = 1024


def refuse(name: str, expected: str, value: object) -> NoReturn:
    """Raise `SamplingParamsError`: the field, what it must be, and what it is."""
    raise SamplingParamsError(f"{name} must be {expected}, not {shown(value)}")


def check(holds: bool, name: str, expected: str, value: object) -> None:
    """`refuse` unless it holds."""
    if not holds:
        refuse(name, expected, value)


def whole_number(name: str, value: object, least: int, most: int = MOST_COUNT) -> int:
    """An int from `least` to `most`; a bool is none."""
    if not isinstance(value, Integral) or not is_integer(value):
        refuse(name, "a whole number", value)
    found = index(value)
    check(found >= least, name, f"at least {least}", value)
    check(found <= most, name, f"at most {most}", value)
    return found


def number(name: str, value: object, least: float, most: float, *, above: bool = False) -> float:
    """A float from `least` to `most`, or above `least`; a bool is none, and neither is a NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        refuse(name, "a number", value)
    expected = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
    try:
        found = float(value)
    except OverflowError:
        refuse(name, expected, value)
    except Exception:  # a span of time of NumPy's, or whatever the value's own method raised
        refuse(name, "a number", value)
    check(least <= found <= most and not (above and found == least), name, expected, value)
    return found


def flag(name: str, value: object) -> bool:
    """True or False."""
    check(isinstance(value, bool), name, "true or false", value)
    return bool(value)


def text(name: str, value: object, most: int) -> str:
    """A text that UTF-8 can encode, of at most so many characters; a subclass becomes a str."""
    if not isinstance(value, str):
        refuse(name, "a text", value)
    value = str.__str__(value)
    if len(value) > most:
        raise SamplingParamsError(f"{name} must have at most {most} characters, not {len(value)}")
    check(_is_unicode(value), name, "Unicode text", value)
    return value


def listed(name: str, value: object, kind: str, most: int) -> Sequence[Any]:
    """A list or a tuple of at most so many elements; kind: what they are, for the message."""
    if not isinstance(value, (list, tuple)):
        refuse(name, f"a list of {kind}", value)
    if len(value) > most:
        raise SamplingParamsError(f"{name} must have at most {most} {kind}, not {len(value)}")
    return value


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
