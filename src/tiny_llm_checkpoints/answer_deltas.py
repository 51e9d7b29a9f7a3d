"""The parts of a model's answer as they become known: deltas of reasoning, content and calls of tools."""

from collections.abc import Iterable
from typing import NamedTuple


class ReasoningDelta(NamedTuple):
    """New text of the model's reasoning."""

    text: str


class ContentDelta(NamedTuple):
    """New text of the answer itself."""

    text: str


class CallDelta(NamedTuple):
    """A new call of a tool, or more of the last one.

    number: 0 for the first call of the answer. name: the function's name in the call's first delta, otherwise
    None. arguments: new text of the arguments' JSON.
    """

    number: int
    name: str | None
    arguments: str


Delta = ReasoningDelta | ContentDelta | CallDelta


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Join neighbouring texts of the same kind, and the pieces of a call; drop empty deltas.

    A delta with a call's name starts a call, even without arguments.

    >>> joined([ContentDelta("a"), ContentDelta("b"), CallDelta(0, "f", "{"), CallDelta(0, None, "}")])
    [ContentDelta(text='ab'), CallDelta(number=0, name='f', arguments='{}')]
    """
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
