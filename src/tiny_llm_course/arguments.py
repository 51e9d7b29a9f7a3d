"""Arguments that several commands share, and the syllabus that they need."""

from typing import Annotated

import typer

from .repo import Repo
from .syllabus import Syllabus, read_syllabus

ADay = Annotated[
    str, typer.Argument(metavar="DAY", help="A day (1.1), a part of it (3.2b) or one of its files.")
]
AnExercise = Annotated[
    str,
    typer.Argument(
        metavar="EXERCISE", help="An exercise (1.1.2), or a part (3.2b) for its first unfinished exercise."
    ),
]


def open_course() -> tuple[Repo, Syllabus]:
    """Return this checkout and its syllabus."""
    repo = Repo.here()
    return repo, read_syllabus(repo.syllabus)
