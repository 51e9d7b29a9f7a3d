"""Finds a drawing by name: `MODULE.FIGURE` is an entry of the dictionary `FIGURES` in `figures/MODULE.py`."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from .drawing import Drawing

FOLDER = Path(__file__).parent


class UnknownFigureError(LookupError):
    """No figure has that name; the message says which ones exist."""


def draw(name: str) -> Drawing:
    """The drawing of that name. Raises `UnknownFigureError`."""
    module, _, key = name.partition(".")
    figures = _figures(module)
    if key not in figures:
        guess = get_close_matches(key, figures, n=1)
        advice = f"; did you mean {guess[0]}?" if guess else ""
        raise UnknownFigureError(f"figures/{module}.py has no {key!r}{advice} (has: {', '.join(figures)})")
    return figures[key]()


def _figures(module: str) -> Mapping[str, Callable[[], Drawing]]:
    if not (FOLDER / f"{module}.py").exists():
        raise UnknownFigureError(f"there is no figures/{module}.py")
    found: Mapping[str, Callable[[], Drawing]] = getattr(import_module(f"figures.{module}"), "FIGURES", {})
    if not found:
        raise UnknownFigureError(f"figures/{module}.py has no FIGURES")
    return found
