"""Turns formulas into MathML, as GitHub writes them: $`x^2`$ in a line, and fenced blocks named `math`."""

import re

from .errors import BookError

_BLOCK = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"\$`([^`\n]+)`\$")
_FENCE = re.compile(r"(^(`{3,})[^\n]*\n.*?^\2[ \t]*$)", re.MULTILINE | re.DOTALL)


def with_mathml(text: str, chapter: str) -> str:
    """Replace the formulas of a chapter. Raises `BookError` for a formula that is not valid LaTeX."""
    text = _BLOCK.sub(lambda found: _mathml(found[1], "block", chapter), text)
    pieces = _FENCE.split(text)  # text, fence, its marks, text, ...
    for place in range(0, len(pieces), 3):
        pieces[place] = _INLINE.sub(lambda found: _mathml(found[1], "inline", chapter), pieces[place])
    return "".join(piece for place, piece in enumerate(pieces) if place % 3 != 2)


def _mathml(formula: str, display: str, chapter: str) -> str:
    from latex2mathml.converter import convert

    try:
        return convert(formula, display=display)
    except Exception as error:  # the library has many kinds of errors
        raise BookError(f"{chapter}: the formula {formula!r} is not valid: {error!r}") from error
