"""One file a day: `show` is what `pdm run try` prints, `work` is what `pdm run compare` times.

`show()` yields lines as they come: the real model where it can show the subject, otherwise a simulation,
and the number that the day is about. `work()` prepares fixed input and returns a function that computes an
array from it; a day with `no_compare` in the syllabus has none. Both run on `tiny_llm`, so on the learner's
modules where there are any. A day's file needs MLX and the engine, so it is imported only where it is run.

A part may have its own: `show_b` and `work_b` for part b, which need nothing of later parts. A part without
them has those of its day.
"""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..units import Day, Unit


def demonstration(day_id: str) -> ModuleType:
    """The module of a day such as 1.1. Raises `ModuleNotFoundError` for a day that has none."""
    return import_module(f"{__name__}.{_name(day_id)}")


def function_of(unit: Unit, name: str) -> Callable[[], Any]:
    """`show` or `work` of a day or a part: the part's own, or else its day's."""
    found: Callable[[], Any] = getattr(demonstration(unit.day.id), function_name(unit, name))
    return found


def function_name(unit: Unit, name: str) -> str:
    """`show_b` where the day's file has that for part b, otherwise `show`."""
    return _own_name(unit, name) if has_own(unit, name) else name


def has_own(unit: Unit, name: str) -> bool:
    """Whether the day's file has a function for this unit, read from its text: true for a day."""
    if isinstance(unit, Day):
        return True
    file = Path(__file__).with_name(f"{_name(unit.day.id)}.py")
    nodes = ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []
    return _own_name(unit, name) in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def _own_name(unit: Unit, name: str) -> str:
    return name if isinstance(unit, Day) else f"{name}_{unit.entry.letter}"


def _name(day_id: str) -> str:
    week, day = day_id.split(".")
    return f"week_{week}_day_{day}"
