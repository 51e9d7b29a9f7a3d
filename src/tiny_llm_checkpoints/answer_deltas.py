"""The parts of a model's answer as they become known, and how markers are found in a growing text."""

from collections.abc import Iterable
from typing import NamedTuple

MAX_SPACE = 64  # white space characters beside a marker that belong to it instead of to the content


class ReasoningDelta(NamedTuple):
    """New text of the model's reasoning."""

    text: str


class ContentDelta(NamedTuple):
    """New text of the answer itself."""

    text: str


class CallDelta(NamedTuple):
    """A new call of a tool, or more of the last one.

    number: the call's number in the answer. name: the function's name in the call's first delta, otherwise
    None. arguments: new text of the arguments' JSON.
    """

    number: int
    name: str | None
    arguments: str


Delta = ReasoningDelta | ContentDelta | CallDelta


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Join deltas that follow each other and belong together; drop empty ones."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, CallDelta):
            if isinstance(last, CallDelta) and delta.name is None and last.number == delta.number:
                found[-1] = last._replace(arguments=last.arguments + delta.arguments)
            elif delta.name is not None or delta.arguments:
                found.append(delta)
        elif last is not None and type(last) is type(delta):
            found[-1] = delta._replace(text=last.text + delta.text)
        elif delta.text:
            found.append(delta)
    return found


def begun(text: str, marker: str) -> int:
    """Return how many characters at the end of `text` may be the start of `marker`.

    >>> begun("Hello <tool", "<tool_call>"), begun("Hello", "<tool_call>")
    (5, 0)
    """
    most = min(len(text), len(marker) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(marker[:length])), 0)


def space_before(text: str) -> int:
    """Return how many characters of white space at the end of `text` belong to a marker after it."""
    tail = text[-MAX_SPACE:]
    return len(tail) - len(tail.rstrip())
