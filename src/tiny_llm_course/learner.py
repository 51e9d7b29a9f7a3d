"""Turns errors in a learner's modules into one line that names the file and line."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CourseError
from .mistake import Mistake, mistake
from .repo import Repo
from .syllabus import Syllabus
from .units import Unit


@contextmanager
def learners_errors(repo: Repo) -> Iterator[None]:
    """Raise `CourseError`, with the file and line, for an error from a learner's module."""
    try:
        yield
    except (Exception, SystemExit) as error:
        found = mistake(error, repo.overlay)
        if found is None:
            raise
        state = "still blank: " if found.is_blank else ""
        raise CourseError(f"{repo.shown(found.file)}, line {found.line}: {state}{found.what}") from error


@contextmanager
def blanks_of_others(repo: Repo, syllabus: Syllabus, unit: Unit) -> Iterator[None]:
    """Raise `CourseError`, with advice, if a blank exercise of another day or part is reached."""
    try:
        yield
    except (Exception, SystemExit) as error:
        found = mistake(error, repo.overlay)
        if found is None or not found.is_blank or _is_of(found, unit):
            raise
        exercise = syllabus.exercise(found.what.partition(" ")[0])
        owner = syllabus.unit(exercise.id)
        raise CourseError(
            f"the demonstration of {unit.named} also needs {exercise.id} {exercise.name} of {owner.named}, "
            f"which is blank in your {found.file.name}: write it, or run `pdm run skip {owner.id}`"
        ) from error


def _is_of(blank: Mistake, unit: Unit) -> bool:
    return any(blank.what.startswith(f"{exercise.id} ") for exercise in unit.exercises)
