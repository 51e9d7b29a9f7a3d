"""Checks of a request's parameters: each returns a plain Python value or raises.

The error is a `SamplingParamsError`. Its message starts with the field's name and has the allowed range and
the value, shortened. Numbers may be NumPy's. The length of a list is checked before its elements, so that
rejecting a long list is cheap.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from operator import index
from typing import Any, NoReturn

from tiny_llm_checkpoints.errors import shown

from .errors import SamplingParamsError, is_integer

MAX_COUNT = 2**31 - 1
MAX_SALT_CHARACTERS = 1024


def refuse(name: str, expected: str, value: object) -> NoReturn:
    """Raise `SamplingParamsError` with the field, the expected values and the actual value."""
    raise SamplingParamsError(f"{name} must be {expected}, not {shown(value)}")


def check(holds: bool, name: str, expected: str, value: object) -> None:
    """Call `refuse` unless `holds`."""
    if not holds:
        refuse(name, expected, value)


def whole_number(name: str, value: object, least: int, most: int = MAX_COUNT) -> int:
    """An int from `least` to `most`; not a bool."""
    if not isinstance(value, Integral) or not is_integer(value):
        refuse(name, "a whole number", value)
    found = index(value)
    check(found >= least, name, f"at least {least}", value)
    check(found <= most, name, f"at most {most}", value)
    return found


def number(name: str, value: object, least: float, most: float, *, above: bool = False) -> float:
    """A float from `least` to `most`; not a bool or NaN. above: `least` itself is not allowed."""
    if not isinstance(value, Real) or isinstance(value, bool):
        refuse(name, "a number", value)
    expected = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
    try:
        found = float(value)
    except OverflowError:
        refuse(name, expected, value)
    except Exception:  # a NumPy timedelta, or an error in the value's own method
        refuse(name, "a number", value)
    check(least <= found <= most and not (above and found == least), name, expected, value)
    return found


def flag(name: str, value: object) -> bool:
    """True or False."""
    check(isinstance(value, bool), name, "true or false", value)
    return bool(value)


def text(name: str, value: object, most: int) -> str:
    """A str that UTF-8 can encode, of at most `most` characters; an instance of a subclass becomes a str."""
    if not isinstance(value, str):
        refuse(name, "a string", value)
    value = str.__str__(value)
    if len(value) > most:
        raise SamplingParamsError(f"{name} must have at most {most} characters, not {len(value)}")
    check(_is_unicode(value), name, "valid Unicode", value)
    return value


def listed(name: str, value: object, kind: str, most: int) -> Sequence[Any]:
    """A list or tuple of at most `most` elements; kind: the elements' kind, for the message."""
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
