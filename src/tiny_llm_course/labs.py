"""Finds the labs of a day: the files `labs/lab_NAME.py` whose docstring starts with the day's id."""

import ast

from .repo import Repo
from .units import Day, Part, Unit

PREFIX = "lab_"


def labs_of(repo: Repo, day: Day) -> list[str]:
    """The names of a day's labs, such as `trap`, which `pdm run lab trap` runs."""
    return [
        file.stem.removeprefix(PREFIX)
        for file in sorted(repo.labs.glob(f"{PREFIX}*.py"))
        if (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").startswith(f"{day.id}: ")
    ]


def labs_after(repo: Repo, unit: Unit) -> list[str]:
    """The labs that a unit completes: those of its day, none for a part with later ones."""
    return [] if isinstance(unit, Part) and unit.later else labs_of(repo, unit.day)
