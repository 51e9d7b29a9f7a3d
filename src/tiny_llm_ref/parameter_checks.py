"""Checks of a request's parameters: a value comes back as a plain Python one, or is refused.

Every refusal is a `SamplingParamsError`. Its message begins with the field's name, and has the range that is
allowed and the value, shortened. Numbers may be NumPy's. A list that is too long is refused before its
elements are looked at, so a refusal costs no more than the longest list that is allowed.
"""

import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

from .errors import SamplingParamsError

MOST_COUNT = 2**31 - 1
MOST_SALT_CHARACTERS = 1024
SHOWN_BITS = 256  # of a whole number; Python writes none of more than 4,300 digits


def refuse(name: str, expected: str, value: object) -> NoReturn:
    """Raise `SamplingParamsError`: the field, what it must be, and what it is."""
    raise SamplingParamsError(f"{name} must be {expected}, not {shortened(value)}")


def check(holds: bool, name: str, expected: str, value: object) -> None:
    """`refuse` unless it holds."""
    if not holds:
        refuse(name, expected, value)


def shortened(value: object) -> str:
    """A value as Python writes it, but never long: of a text or a list the beginning."""
    if isinstance(value, int) and value.bit_length() > SHOWN_BITS:
        return f"a number of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except Exception:  # a class may write its values as it likes, and a list may hold such a number
        return f"a value of type {type(value).__name__}"


def whole_number(name: str, value: object, least: int, most: int = MOST_COUNT) -> int:
    """An int from `least` to `most`; a bool is none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        refuse(name, "a whole number", value)
    found = int(value)
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
    check(least <= found <= most and not (above and found == least), name, expected, value)
    return found


def flag(name: str, value: object) -> bool:
    """True or False."""
    check(isinstance(value, bool), name, "true or false", value)
    return bool(value)


def text(name: str, value: object, most: int) -> str:
    """A text that UTF-8 can encode, of at most so many characters."""
    if not isinstance(value, str):
        refuse(name, "a text", value)
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
