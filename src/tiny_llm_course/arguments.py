"""What several commands take: a day, an exercise, and the course itself."""

from typing import Annotated

import typer

from .repo import Repo
from .syllabus import Syllabus, read_syllabus

ADay = Annotated[
    str, typer.Argument(metavar="DAY", help="Such as 1.1; a part of it, such as 3.2b; or a file of it.")
]
AnExercise = Annotated[
    str,
    typer.Argument(
        metavar="EXERCISE", help="Such as 1.1.2; a part, such as 3.2b, is its first exercise to do."
    ),
]


def open_course() -> tuple[Repo, Syllabus]:
    """This checkout and its syllabus."""
    repo = Repo.here()
    return repo, read_syllabus(repo.syllabus)
