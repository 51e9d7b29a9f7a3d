"""Finds out whether an error comes from a learner's module, and if so from which file and line."""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tiny_llm_checkpoints.errors import TinyLLMError

_OF_A_BLANK = re.compile(r"\d\.\d\.\d+ \S+: ")


class Mistake(NamedTuple):
    """An error from a learner's module: its file, line and message (`what`).

    is_blank: the error comes from an exercise that is not written; `what` names the exercise.
    """

    file: Path
    line: int
    what: str
    is_blank: bool


def mistake(error: BaseException, overlay: Path) -> Mistake | None:
    """The mistake that caused an error, directly or through a chain of errors; None if it is not a learner's.

    An error that the engine raises on purpose (`TinyLLMError`) is not a mistake, whichever module raises it.
    """
    for one in _chain(error):
        if isinstance(one, SyntaxError):
            file, line, what = Path(one.filename or ""), one.lineno or 0, one.msg
            if file.parent == overlay:
                return Mistake(file, line, what, is_blank=False)
        elif own := _frames_in(overlay, one):
            is_blank = isinstance(one, NotImplementedError) and _OF_A_BLANK.match(str(one)) is not None
            what = str(one) if is_blank else f"{type(one).__name__}: {one}"
            return Mistake(Path(own[-1].filename), own[-1].lineno or 0, what, is_blank)
        elif isinstance(one, ImportError) and one.path and Path(one.path).parent == overlay:
            return Mistake(Path(one.path), 1, str(one).partition(" (")[0], is_blank=False)  # a missing name
    return None


def one_line(error: BaseException) -> str | None:
    """The mistake that caused an error in this process, as one line with a helpful command, or None."""
    package = sys.modules.get("tiny_llm")
    found = None if package is None else mistake(error, Path(package.__path__[0]))
    if found is None:
        return None
    if found.is_blank:
        return f"still blank: {found.what}"
    file = os.path.relpath(found.file)
    shown = str(found.file) if file.startswith(os.pardir) else file
    return f"{shown}, line {found.line}: {found.what} (pdm run test {found.file.stem})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause, the cause's cause and so on, without errors that are raised on purpose."""
    following: BaseException | None = error
    while following is not None:
        if not isinstance(following, TinyLLMError):
            yield following
        following = following.__cause__ or following.__context__


def _frames_in(overlay: Path, error: BaseException) -> list[traceback.FrameSummary]:
    """The error's frames in the learner's modules; the overlay's `__init__.py` is not one of them."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    return [
        frame
        for frame, file in zip(frames, files, strict=True)
        if file.parent == overlay and file.name != "__init__.py"
    ]
