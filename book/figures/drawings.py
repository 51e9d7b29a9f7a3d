"""Finds figures by name: `MODULE.FIGURE` is the entry FIGURE of the dictionary `FIGURES` in `figures/MODULE.py`."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from html import escape
from importlib import import_module
from pathlib import Path

from preprocessor.errors import BookError

from .drawing import Drawing

FOLDER = Path(__file__).parent


def figure(arguments: str) -> str:
    """The directive `figure MODULE.FIGURE CAPTION`. Raises `BookError` for an unknown name."""
    name, _, caption = arguments.partition(" ")
    caption = f"\n<figcaption>{escape(caption.strip())}</figcaption>" if caption else ""
    return f'<figure class="drawing">\n{draw(name).inline()}{caption}\n</figure>'


def draw(name: str) -> Drawing:
    """The drawing of that name."""
    module, _, key = name.partition(".")
    figures = _figures(module)
    if key not in figures:
        guess = get_close_matches(key, figures, n=1)
        advice = f"; did you mean {guess[0]}?" if guess else ""
        raise BookError(f"figures/{module}.py has no figure {key!r}{advice} (has: {', '.join(figures)})")
    return figures[key]()


def _figures(module: str) -> Mapping[str, Callable[[], Drawing]]:
    if not (FOLDER / f"{module}.py").exists():
        raise BookError(f"there is no figures/{module}.py")
    found = getattr(import_module(f"figures.{module}"), "FIGURES", None)
    if found is None:
        raise BookError(f"figures/{module}.py has no FIGURES")
    figures: Mapping[str, Callable[[], Drawing]] = found
    return figures
