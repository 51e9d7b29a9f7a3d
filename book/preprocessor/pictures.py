"""Puts drawings into a chapter as SVG elements, with a caption."""

from html import escape

from figures.find import UnknownFigureError, draw

from .errors import BookError


def figure(arguments: str) -> str:
    """The directive `figure MODULE.FIGURE CAPTION`. Raises `BookError` for an unknown name."""
    name, _, caption = arguments.partition(" ")
    try:
        element = draw(name).inline()
    except UnknownFigureError as error:
        raise BookError(str(error)) from error
    return framed(element, escape(caption.strip()))


def framed(element: str, caption: str) -> str:
    """A figure of the page. caption: HTML, or empty."""
    below = f"\n<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="drawing">\n{element}{below}\n</figure>'
