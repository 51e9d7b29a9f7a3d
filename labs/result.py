"""The result of a lab: tables with predictions and measurements, a picture, a conclusion.

Plain values, independent of how a lab measures and of how its result is shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Progress = Callable[[str, int, int], None]
"""Called as progress(what is running, number done, total)."""


class Pair(NamedTuple):
    """A prediction, computed from a definition, and the measured value."""

    predicted: float
    measured: float


Cell = Pair | float | str


class Column(NamedTuple):
    """A column of a table: its key in JSON, its heading with the unit, and the format of its numbers."""

    key: str
    head: str
    form: Callable[[float], str] = "{:,}".format


def percent(share: float) -> str:
    """Format a share.

    >>> percent(0.854)
    '85.4%'
    """
    return f"{share:.1%}"


def as_bytes(count: float) -> str:
    """Format a byte count with up to four digits, in the largest unit that gives at least 1.

    >>> as_bytes(16384)
    '16 KiB'
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.4g} {unit}"
    return f"{count:.0f} bytes"


@dataclass(frozen=True)
class Table:
    """A table; each row has one cell for each column."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        uneven = [row for row in self.rows if len(row) != len(self.columns)]
        if uneven:
            raise ValueError(
                f"table {self.title!r} has {len(self.columns)} columns, but a row is {uneven[0]}"
            )


class Point(NamedTuple):
    """One point of a line."""

    x: float
    y: float


class Line(NamedTuple):
    """A line of a picture; predicted lines are dashed."""

    name: str
    points: Sequence[Point]
    is_predicted: bool = False


@dataclass(frozen=True)
class Picture:
    """Lines and two axes, whose labels have the units.

    x_base, y_base: base of a logarithmic axis, None for a linear one. *_is_share: values are shares from 0 to
    1, shown in percent.
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
    """The result of a lab: its subject, the question, tables, a conclusion of a few sentences, a picture.

    data: further values for `--json`, which are not shown.
    """

    title: str
    question: str
    tables: Sequence[Table]
    conclusion: str
    picture: Picture
    data: Mapping[str, object] = field(default_factory=dict)
