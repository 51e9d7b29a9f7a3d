"""What a lab brings home: tables that set predictions beside what was measured, a picture, a conclusion.

Plain values, ready to be shown; knows nothing of how a lab measures, or of screens, JSON and files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Progress = Callable[[str, int, int], None]
"""Called with what is under way, how much of it is done, and how much there is."""


class Pair(NamedTuple):
    """A prediction, computed from a definition, beside what was measured."""

    predicted: float
    measured: float


Cell = Pair | float | str


class Column(NamedTuple):
    """A column of a table: its key in JSON, its heading with the unit, and how a number of it reads."""

    key: str
    head: str
    form: Callable[[float], str] = "{:,}".format


def percent(share: float) -> str:
    """0.854 -> 85.4%."""
    return f"{share:.1%}"


def as_bytes(count: float) -> str:
    """16384 -> 16 KiB; three digits at least, in the largest unit that leaves a number from 1 up."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.4g} {unit}"
    return f"{count:.0f} bytes"


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        uneven = [row for row in self.rows if len(row) != len(self.columns)]
        if uneven:
            raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, a row has {uneven[0]}")


class Point(NamedTuple):
    """One point of a line."""

    x: float
    y: float


class Line(NamedTuple):
    """A line of a picture; a predicted one is dashed."""

    name: str
    points: Sequence[Point]
    is_predicted: bool = False


@dataclass(frozen=True)
class Picture:
    """Lines over two axes, whose labels have the units.

    x_base, y_base: the logarithm of an axis, None for a plain one. *_is_share: from 0 to 1, read as per cent.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    x_base: int | None = None
    y_base: int | None = None
    x_is_share: bool = False
    y_is_share: bool = False


@dataclass(frozen=True)
class Result:
    """What a lab found. title: the thing looked at; asks: the question; conclusion: a sentence or two."""

    title: str
    asks: str
    tables: Sequence[Table]
    conclusion: str
    picture: Picture
