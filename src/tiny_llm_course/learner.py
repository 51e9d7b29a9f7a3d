"""What goes wrong in a learner's module, as one line that says where."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CourseError
from .house import House


@contextmanager
def learners_errors(house: House) -> Iterator[None]:
    """An error whose traceback passes through the overlay becomes a `CourseError` that names the line."""
    try:
        yield
    except SyntaxError as error:
        file = Path(error.filename or "")
        if file.parent != house.overlay:
            raise
        raise CourseError(f"{house.shown(file)}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).parent == house.overlay]
        if not own:
            raise
        kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
        place = f"{house.shown(Path(own[-1].filename))}, line {own[-1].lineno}"
        raise CourseError(f"{place}: {kind}{error}") from error
