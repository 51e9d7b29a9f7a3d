"""What several commands take: a day, an exercise, and the course itself."""

from typing import Annotated

import typer

from .house import House
from .syllabus import Syllabus, read_syllabus

DayId = Annotated[str, typer.Argument(metavar="DAY", help="A week and a day, such as 1.1; or a file of it.")]
AnExercise = Annotated[str, typer.Argument(metavar="EXERCISE", help="Week, day and task, such as 1.1.2.")]


def open_course() -> tuple[House, Syllabus]:
    """This checkout and its syllabus."""
    house = House.here()
    return house, read_syllabus(house.syllabus)
