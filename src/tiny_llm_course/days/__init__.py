"""The days' demonstrations, a file for each day: `pdm run try` prints `show`, `pdm run compare` times `work`.

`show()` yields lines of text: the day's main number, measured on the real model or in a simulation. `work()`
prepares fixed input and returns a function that computes an array from it; days with `no_compare` in the
syllabus have none. `kernel_work()` is the same for a day's optional kernel in C++. All run on `tiny_llm`, and
therefore on the learner's modules. A day's file needs MLX and the engine, so it is imported only to run it.

A part may have its own functions, such as `show_b` and `work_b` for part b, which must not need later parts.
A part without its own functions uses those of its day.
"""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..units import Day, Unit


def demonstration(day_id: str) -> ModuleType:
    """The module of a day such as 1.1. Raises `ModuleNotFoundError` if it does not exist."""
    return import_module(f"{__name__}.{_name(day_id)}")


def function_of(unit: Unit, name: str) -> Callable[[], Any]:
    """`show` or `work` of a day or a part; a part without its own uses its day's."""
    found: Callable[[], Any] = getattr(demonstration(unit.day.id), function_name(unit, name))
    return found


def function_name(unit: Unit, name: str) -> str:
    """The function's name: `show_b` for part b if the day's file defines it, otherwise `show`."""
    return _own_name(unit, name) if has_own(unit, name) else name


def has_own(unit: Unit, name: str) -> bool:
    """Whether the day's file defines a function for this unit, read from its text; always true for a day."""
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
