"""One file a day: `show` is what `pdm run try` prints, `work` is what `pdm run compare` times.

`show()` yields lines as they come: the real model where it can show the subject, otherwise a simulation,
and the number that the day is about. `work()` prepares fixed input and returns a function that computes an
array from it; a day with `no_compare` in the syllabus has none. Both run on `tiny_llm`, so on the learner's
modules where there are any. A day's file needs MLX and the engine, so it is imported only where it is run.
"""

from importlib import import_module
from types import ModuleType


def demonstration(day_id: str) -> ModuleType:
    """The module of a day such as 1.1. Raises `ModuleNotFoundError` for a day that has none."""
    week, day = day_id.split(".")
    return import_module(f"{__name__}.week_{week}_day_{day}")
