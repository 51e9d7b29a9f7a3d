"""What Python makes for interactive figures: drawings for readers without JavaScript, and data.

DATA: values that a figure reads as JSON, made by the reference's own scheduler.
"""

from collections.abc import Callable

from .find import draw

FALLBACKS: dict[str, str] = {}
"""The drawing for each interactive figure, as `MODULE.FIGURE`."""

DATA: dict[str, Callable[[], object]] = {}


def fallback(name: str) -> str:
    """The drawing for an interactive figure, as an element."""
    return draw(FALLBACKS[name]).inline()
