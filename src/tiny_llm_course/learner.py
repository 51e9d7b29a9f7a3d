"""What goes wrong in a learner's module, as one line that says where."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CourseError
from .mistake import Mistake, mistake
from .repo import Repo
from .syllabus import Syllabus
from .units import Unit


@contextmanager
def learners_errors(repo: Repo) -> Iterator[None]:
    """An error that a learner's module raises becomes a `CourseError` that names the line."""
    try:
        yield
    except Exception as error:
        found = mistake(error, repo.overlay)
        if found is None:
            raise
        raise CourseError(f"{repo.shown(found.file)}, line {found.line}: {found.what}") from error


@contextmanager
def blanks_of_others(repo: Repo, syllabus: Syllabus, unit: Unit) -> Iterator[None]:
    """A blank of another day or part becomes a `CourseError` that says what to do with it."""
    try:
        yield
    except Exception as error:
        found = mistake(error, repo.overlay)
        if found is None or not found.is_blank or _is_of(found, unit):
            raise
        exercise = syllabus.exercise(found.what.partition(" ")[0])
        owner = syllabus.unit(exercise.id)
        raise CourseError(
            f"what {unit.named} shows needs {exercise.id} {exercise.name} of {owner.named} too, "
            f"still blank in your {found.file.name}: write it, or `pdm run skip {owner.id}`"
        ) from error


def _is_of(blank: Mistake, unit: Unit) -> bool:
    return any(blank.what.startswith(f"{exercise.id} ") for exercise in unit.exercises)
