"""Finds the files of a day's suite: its test file, the files in its folder, and all that these import.

A large day has several files, such as `week_3_day_2/beams.py`, which its test file imports:
`from week_3_day_2.beams import *`. Toy models and oracles that several suites use are in `common/`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from .source import import_nodes

SHARED = "common"
CONFTEST = "conftest.py"


def folder_of(suite: Path) -> Path:
    """The folder of a day's other files, `week_1_day_1` for `test_week_1_day_1.py`; it may not exist."""
    return suite.with_name(suite.stem.removeprefix("test_"))


def suite_files(suite: Path) -> list[Path]:
    """All files of a day's suite, its test file first; empty if it does not exist.

    Files in the day's folder count even if they are not imported.
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
    """The files in the suites' folder that a file imports; empty if it does not parse."""
    try:
        nodes = import_nodes(file.read_text(encoding="utf-8"))
    except SyntaxError:
        return []
    base = file.parent.relative_to(suites).parts
    return [found for node in nodes for found in _files_of(suites, base, node)]


def _files_of(suites: Path, base: tuple[str, ...], node: ast.Import | ast.ImportFrom) -> Iterator[Path]:
    """The files that an import statement in the package `base` runs, including each `__init__.py`."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    else:
        above = list(base[: len(base) - node.level + 1]) if node.level else []
        module = above + (node.module.split(".") if node.module else [])
        names = [[*module, alias.name] for alias in node.names]
    for path in names:
        yield from _files_along(suites, path)


def _files_along(suites: Path, names: list[str]) -> Iterator[Path]:
    """The packages on the path to a module, and the module itself, if they exist."""
    for stop in range(1, len(names) + 1):
        place = suites.joinpath(*names[:stop])
        yield from (file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file())
