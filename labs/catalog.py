"""Which labs there are: every file `lab_NAME.py` beside this one.

A lab's docstring begins with its day and one line, as in `2.1: What a token costs without a cache.` It is
read without importing the lab, so that a mistake in one module of a learner's hides no lab.
"""

import ast
import importlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, cast

from result import Result

PREFIX = "lab_"


class UnknownLabError(Exception):
    """There is no lab of that name; the message has the nearest one and all of them."""


class Lab(NamedTuple):
    """A lab that can be run; doc is its file's docstring without the day."""

    name: str
    day: str
    doc: str

    @property
    def line(self) -> str:
        """What it is about, in one line."""
        return self.doc.partition("\n")[0]

    def load(self) -> Callable[..., Result]:
        """Its function `measure`; this imports what the lab measures."""
        return cast(Callable[..., Result], importlib.import_module(PREFIX + self.name).measure)


def all_labs() -> list[Lab]:
    """In the order of their days."""
    files = Path(__file__).parent.glob(f"{PREFIX}*.py")
    return sorted(map(_read, files), key=lambda lab: (lab.day, lab.name))


def find(name: str) -> Lab:
    """The lab of that name. Raises `UnknownLabError`."""
    labs = {lab.name: lab for lab in all_labs()}
    if name in labs:
        return labs[name]
    near = get_close_matches(name, labs, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise UnknownLabError(f"there is no lab {name!r}{guess} (labs: {', '.join(labs)})")


def _read(file: Path) -> Lab:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    day, colon, text = (doc or "").partition(": ")
    if not colon:
        raise ValueError(f"{file.name}: its docstring must begin with a day, as in `2.1: What a token costs`")
    return Lab(file.stem.removeprefix(PREFIX), day, text)
