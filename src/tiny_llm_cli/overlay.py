"""Tells a mistake in a learner's module apart from one of the engine's: which file, which line, what."""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_OF_A_BLANK = re.compile(r"\d\.\d\.\d+ \S+: ")


class Mistake(NamedTuple):
    """What a learner's module raised. is_blank: an exercise that is not written yet, which `what` names."""

    file: Path
    line: int
    what: str
    is_blank: bool


def mistake(error: BaseException, overlay: Path) -> Mistake | None:
    """The mistake behind an error, or behind one that it was raised from; None where it is no learner's.

    What the engine raises on purpose (`TinyLLMError`) is no mistake, in whichever module it stands.
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
    return None


def one_line(error: BaseException) -> str | None:
    """The same in one line, with the command that helps, for an error of this process."""
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
    """An error, the one that it was raised from, and so on, without those that are raised on purpose."""
    named = getattr(sys.modules.get("tiny_llm.errors"), "TinyLLMError", ())
    following: BaseException | None = error
    while following is not None:
        if not isinstance(following, named):
            yield following
        following = following.__cause__ or following.__context__


def _frames_in(overlay: Path, error: BaseException) -> list[traceback.FrameSummary]:
    """Where the error passed through a learner's module; the overlay's `__init__` is ours."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    return [
        frame
        for frame, file in zip(frames, files, strict=True)
        if file.parent == overlay and file.name != "__init__.py"
    ]
