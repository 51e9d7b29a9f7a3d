"""What goes wrong in a learner's module, as one line that says where."""

from collections.abc import Iterator
from contextlib import contextmanager

from tiny_llm_cli.overlay import mistake

from .errors import CourseError
from .house import House


@contextmanager
def learners_errors(house: House) -> Iterator[None]:
    """An error that a learner's module raises becomes a `CourseError` that names the line."""
    try:
        yield
    except Exception as error:
        found = mistake(error, house.overlay)
        if found is None:
            raise
        raise CourseError(f"{house.shown(found.file)}, line {found.line}: {found.what}") from error
