"""The files of a day's suite: the day's own, those in the folder beside it, and what these import.

A large day's tests lie in several files, `week_3_day_2/beams.py` and so on, which the day's own file
imports: `from week_3_day_2.beams import *`. Toy models and oracles that several suites use are in `common/`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from .source import import_nodes

SHARED = "common"
CONFTEST = "conftest.py"


def folder_of(suite: Path) -> Path:
    """The folder of a day's further files: `week_1_day_1` beside `test_week_1_day_1.py`, there or not."""
    return suite.with_name(suite.stem.removeprefix("test_"))


def suite_files(suite: Path) -> list[Path]:
    """All files that a day's suite consists of, its own first; empty where it has none.

    What it does not import counts too where it lies in the day's folder.
    """
    found: dict[Path, None] = {}
    waiting = [suite, *parts_of(suite)]
    while waiting:
        file = waiting.pop(0)
        if file not in found and file.exists():
            found[file] = None
            waiting += imported_files(suite.parent, file)
    return list(found)


def parts_of(suite: Path) -> list[Path]:
    """The files in the day's folder."""
    return sorted(folder_of(suite).glob("*.py"))


def imported_files(suites: Path, file: Path) -> list[Path]:
    """The files of the suites' folder that a file imports; none of one that does not parse."""
    try:
        nodes = import_nodes(file.read_text(encoding="utf-8"))
    except SyntaxError:
        return []
    base = file.parent.relative_to(suites).parts
    return [found for node in nodes for found in _files_of(suites, base, node)]


def _files_of(suites: Path, base: tuple[str, ...], node: ast.AST) -> Iterator[Path]:
    """The files that an import statement of a file in the package `base` runs, packages included."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _files_along(suites, alias.name.split("."))
    elif isinstance(node, ast.ImportFrom):
        above = list(base[: len(base) - node.level + 1]) if node.level else []
        module = above + (node.module.split(".") if node.module else [])
        yield from _files_along(suites, module)
        for alias in node.names:
            yield from _files_along(suites, [*module, alias.name])


def _files_along(suites: Path, names: list[str]) -> Iterator[Path]:
    """The packages on the way to a module, and the module itself, as far as they are there."""
    for stop in range(1, len(names) + 1):
        place = suites.joinpath(*names[:stop])
        yield from (file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file())
