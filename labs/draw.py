"""Write a lab's picture to a file. Only this module imports matplotlib, and only to draw a picture."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from result import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
STYLE: Any = {
    "svg.hashsalt": "tiny-llm",  # the same numbers give the same file
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
}


class PictureError(Exception):
    """The file cannot be written, or matplotlib is missing; the message says what to do."""


def check(file: Path) -> None:
    """Raise `PictureError` if `draw` could not write `file`."""
    if file.suffix not in SUFFIXES:
        raise PictureError(f"{file}: the name of a picture must end in {' or '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise PictureError(f"{file}: the folder {file.parent} does not exist")
    if find_spec("matplotlib") is None:
        raise PictureError("--plot needs matplotlib, which is not installed: run `pdm install`")


def draw(picture: Picture, file: Path) -> None:
    """Write the picture to `file` in the format of its suffix."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        _plot_lines(axes, picture)
        _set_axes(axes, picture)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _plot_lines(axes: "Axes", picture: Picture) -> None:
    """Plot all lines; lines with the same name have the same color."""
    colors = {name: f"C{place}" for place, name in enumerate({line.name: None for line in picture.lines})}
    for line in picture.lines:
        xs, ys = zip(*line.points, strict=True)
        style, name = ("--", f"{line.name}, predicted") if line.is_predicted else ("o-", line.name)
        axes.plot(xs, ys, style, color=colors[line.name], label=name, markersize=4)


def _set_axes(axes: "Axes", picture: Picture) -> None:
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    plain, share = StrMethodFormatter("{x:,g}"), PercentFormatter(1.0)
    if picture.x_base is not None:
        axes.set_xscale("log", base=picture.x_base)
    if picture.y_base is not None:
        axes.set_yscale("log", base=picture.y_base)
    axes.xaxis.set_major_formatter(share if picture.x_is_share else plain)
    axes.yaxis.set_major_formatter(share if picture.y_is_share else plain)
    if picture.y_is_share:
        axes.set_ylim(bottom=0)
    axes.set(title=picture.title, xlabel=picture.x, ylabel=picture.y)
    axes.legend(frameon=False)
