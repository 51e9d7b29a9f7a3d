"""A lab's result as text and as JSON, with the settings, the machine and the modules that were measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from catalog import Lab
from result import Cell, Column, Pair, Result, Table

FILE_WIDTH = 120


class Report(NamedTuple):
    """A lab, its result, and the settings, machine, modules and kernels of the run."""

    lab: Lab
    result: Result
    settings: Mapping[str, object]
    machine: Mapping[str, object]
    your_modules: Sequence[str]
    your_kernels: Sequence[str] = ()


def as_json_object(report: Report) -> dict[str, object]:
    """The report as plain values. A table has its raw values in `rows`, and what `show` prints in `shown`."""
    found = report.result
    return {
        "lab": report.lab.name,
        "day": report.lab.day,
        "title": found.title,
        "question": found.question,
        "tables": [_table_as_json(table) for table in found.tables],
        "conclusion": found.conclusion,
        "picture": asdict(found.picture) | {"lines": [line._asdict() for line in found.picture.lines]},
        "data": dict(found.data),
        "settings": dict(report.settings),
        "machine": dict(report.machine),
        "your_modules": list(report.your_modules),
        "your_kernels": list(report.your_kernels),
    }


def show(report: Report) -> None:
    """Print a report, as wide as the terminal, or 120 columns wide if stdout is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    found = report.result
    console.print(Text(f"{found.title} (day {report.lab.day})", "bold"), Text(found.question), sep="\n")
    for table in found.tables:
        console.print("", Text(table.title, "italic"), _grid(table), sep="\n")
    console.print("", Text(found.conclusion, "bold"), "", sep="\n")
    console.print(Text(_setup(report), "dim"))


def _setup(report: Report) -> str:
    kinds = {"your modules": report.your_modules, "your kernels": report.your_kernels}
    yours = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    modules = f"{yours}; all others: the reference's" if yours else "all modules: the reference's"
    settings = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in report.settings.items())
    machine = report.machine
    described = f"{machine['processor']}, MLX {machine['mlx']}, kernels: {machine['kernels']}"
    return f"{modules}\nsettings: {settings}\nmachine: {described}"


def _table_as_json(table: Table) -> dict[str, object]:
    keys = [column.key for column in table.columns]
    rows = [dict(zip(keys, map(_cell_as_json, row), strict=True)) for row in table.rows]
    columns = list(_shown_columns(table))
    return {
        "title": table.title,
        "rows": rows,
        "shown": {
            "heads": [" ".join(column.head.split()) for column in columns],
            "is_text": [column.is_text for column in columns],
            "rows": [list(row) for row in zip(*(column.texts for column in columns), strict=True)],
        },
    }


def _cell_as_json(cell: Cell) -> object:
    return cell._asdict() if isinstance(cell, Pair) else cell


def _grid(table: Table) -> Grid:
    """The table for rich; a column with pairs becomes two columns."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = list(_shown_columns(table))
    for column in columns:
        justify: Literal["left", "right"] = "left" if column.is_text else "right"
        grid.add_column(column.head, justify=justify, vertical="bottom")
    for row in zip(*(column.texts for column in columns), strict=True):
        grid.add_row(*row)
    return grid


class _Shown(NamedTuple):
    """A column as text. is_text: it has no numbers."""

    head: str
    texts: list[str]
    is_text: bool


def _shown_columns(table: Table) -> Iterator[_Shown]:
    """The columns as shown; a column with pairs gives two, predicted and measured."""
    for place, column in enumerate(table.columns):
        cells = [row[place] for row in table.rows]
        is_text = all(isinstance(cell, str) for cell in cells)
        for half in Pair._fields if any(isinstance(cell, Pair) for cell in cells) else ("",):
            texts = [_text(column, cell, half) for cell in cells]
            yield _Shown(f"{column.head}\n{half}".strip(), texts, is_text)


def _text(column: Column, cell: Cell, half: str) -> str:
    """Format a cell or one half of it; a cell without a prediction has an empty predicted half."""
    if not isinstance(cell, Pair):
        value: float | str = "" if half == "predicted" else cell
    else:
        value = cell.predicted if half == "predicted" else cell.measured
    return value if isinstance(value, str) else column.form(value)
