"""Whether a rendered prompt holds what was said: a template must not drop a message's words silently."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .chat_messages import ChatMessage, MessageError

_GUARDED = ("user", "tool", "function", "system", "developer")
MOST_LOOKS = 10_000  # places that are looked at for one text that is not where it was expected


class _Text(NamedTuple):
    """A text that must be there, and the message that it is of."""

    text: str
    place: int
    role: str


def check_presence(messages: Sequence[ChatMessage], prompt: str) -> None:
    """Raise `MessageError` for a text of a user, a tool or a system message that `prompt` does not hold.

    Texts are compared without the white space around them. A template may move a text, write it as JSON, or
    change its case and its white space; what is said twice must be there twice. What an assistant has said
    may be left out: templates remove earlier reasoning.
    """
    wanted = [
        _Text(text, place, message.role)
        for place, message in enumerate(messages)
        if message.role in _GUARDED
        for text in _lines_of(message)
    ]
    if _all_in_order(wanted, prompt):
        return
    spans = _Spans()
    for one in sorted(wanted, key=lambda one: len(one.text), reverse=True):
        if any(spans.take(prompt, form) for form in _forms(one.text)):
            continue
        if any(form in prompt for form in _forms(one.text)) or _bare(one.text) not in _bare(prompt):
            raise MessageError(
                f"messages[{one.place}].content",
                f"the chat template drops the text of this message (role {one.role[:40]!r})",
            )


def _lines_of(message: ChatMessage) -> list[str]:
    return [text for part in message.parts if (text := part.strip())]


def _all_in_order(wanted: Sequence[_Text], prompt: str) -> bool:
    """Whether all texts are there one behind the other: one pass over the prompt."""
    end = 0
    for one in wanted:
        start = prompt.find(one.text, end)
        if start < 0:
            return False
        end = start + len(one.text)
    return True


def _forms(text: str) -> Iterator[str]:
    """A text as templates write it: as it is, and inside of JSON."""
    yield text
    for ensure_ascii in (False, True):
        yield json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def _bare(text: str) -> str:
    """A text without any white space, in small letters."""
    return "".join(text.split()).lower()


class _Spans:
    """Stretches of a prompt that are taken by a text already; none overlaps another."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, prompt: str, text: str) -> bool:
        """Take the first stretch that is `text` and free. False where there is none."""
        start = prompt.find(text)
        for _ in range(MOST_LOOKS):
            if start < 0:
                return False
            place = bisect_right(self._starts, start)
            if place and self._ends[place - 1] > start:
                start = prompt.find(text, self._ends[place - 1])
            elif place < len(self._starts) and self._starts[place] < start + len(text):
                start = prompt.find(text, start + 1)
            else:
                self._starts.insert(place, start)
                self._ends.insert(place, start + len(text))
                return True
        return False
