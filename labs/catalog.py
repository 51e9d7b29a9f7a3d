"""The list of labs: every file `lab_NAME.py` in this folder.

A lab's docstring starts with its course day and one line, as in `2.1: What a token costs`. It is read without
importing the lab, so that an error in a learner's module does not hide any lab.
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from result import Result
from tiny_llm_checkpoints.suggestions import did_you_mean

PREFIX = "lab_"


class UnknownLabError(Exception):
    """The name is unknown; the message suggests the closest name and lists all labs."""


class Lab(NamedTuple):
    """A lab: its name, its course day, and its file's docstring without the day."""

    name: str
    day: str
    doc: str

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]

    def load(self) -> Callable[..., Result]:
        """Import the lab, and with it the modules that it measures; return its function `measure`."""
        return cast(Callable[..., Result], importlib.import_module(PREFIX + self.name).measure)


def all_labs() -> list[Lab]:
    """All labs, in the order of their days."""
    files = Path(__file__).parent.glob(f"{PREFIX}*.py")
    return sorted(map(_read, files), key=lambda lab: (lab.day, lab.name))


def find(name: str) -> Lab:
    """Return the lab named `name`. Raises `UnknownLabError`."""
    labs = {lab.name: lab for lab in all_labs()}
    if name in labs:
        return labs[name]
    raise UnknownLabError(f"there is no lab {name!r}{did_you_mean(name, labs)} (labs: {', '.join(labs)})")


def _read(file: Path) -> Lab:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    day, colon, text = (doc or "").partition(": ")
    if not colon:
        raise ValueError(f"{file.name}: the docstring must start with a day, as in `2.1: What a token costs`")
    return Lab(file.stem.removeprefix(PREFIX), day, text)
