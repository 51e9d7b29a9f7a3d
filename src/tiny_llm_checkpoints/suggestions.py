"""Suggests known names for an unknown name, for error messages."""

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

MAX_SUGGESTIONS = 3
MAX_NAME = 64  # characters; nothing resembles a longer name, which may come from a client and have any length
_LIKENESS = 0.75  # of two names, from 0 to 1

Class = TypeVar("Class", bound=type)


def closest(name: str, known: Iterable[str]) -> list[str]:
    """The known names that `name` may stand for, at most three, the likeliest first.

    A name that differs only in case, dashes or underscores is the only suggestion. Otherwise these are the
    names that start with `name`, or else those that are spelled like it.

    >>> closest("topP", ["top_p", "top_k"]), closest("temp", ["temperature"]), closest("sede", ["seed", "n"])
    (['top_p'], ['temperature'], ['seed'])
    """
    by_letters = {letters(one): one for one in known}
    plain = letters(name)
    if plain in by_letters:
        return [by_letters[plain]]
    if not plain or len(plain) > MAX_NAME:
        return []
    if longer := [one for spelled, one in by_letters.items() if spelled.startswith(plain)]:
        return longer[:MAX_SUGGESTIONS]
    return [by_letters[one] for one in get_close_matches(plain, by_letters, MAX_SUGGESTIONS, _LIKENESS)]


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name, after a semicolon; `otherwise` if no known name is close.

    >>> "unknown name 'temprature'" + did_you_mean("temprature", ["temperature", "seed"])
    "unknown name 'temprature'; did you mean temperature?"
    """
    found = closest(name, known)
    text = f"did you mean {' or '.join(found)}?" if found else otherwise
    return f"; {text}" if text else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message about an unknown name: it suggests the closest known names, or else lists all of them.

    >>> unknown_name("field", "tmp", ["temperature", "seed"])
    "unknown field 'tmp'; known: temperature, seed"
    """
    known = list(known)
    listed = f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}{did_you_mean(name, known, listed)}"


def check_fields(
    cls: type, names: Iterable[str], kind: str, error: type[Exception], others: Iterable[str] = ()
) -> None:
    """Raise `error` for the first of these names that is not a field of the dataclass `cls`.

    others: names that are valid too.
    """
    known = [*(field.name for field in fields(cls)), *others]
    for name in names:
        if name not in known:
            raise error(unknown_name(kind, name, known))


def suggests_fields(cls: Class) -> Class:
    """Decorate a dataclass: its constructor's TypeError for an unknown field suggests a known one."""
    init = cls.__init__  # type: ignore[misc]
    known = [field.name for field in fields(cls) if field.init]

    @wraps(init)
    def checked_init(self: object, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}")
        init(self, *args, **options)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


def letters(name: str) -> str:
    """A name in lower case, without dashes and underscores."""
    return re.sub(r"[-_]", "", name).lower()
