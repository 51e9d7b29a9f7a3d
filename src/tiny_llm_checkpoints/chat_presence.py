"""Checks that a rendered prompt contains the text of the messages: templates must not drop it silently."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .chat_messages import ChatMessage
from .plain_json import MessageError

_GUARDED = ("user", "tool", "function", "system", "developer")
MAX_TRIES = 10_000  # positions tried for one text that is not where it was expected


class _Text(NamedTuple):
    """A text that the prompt must contain; `place` is the index of its message."""

    text: str
    place: int
    role: str


def check_presence(messages: Sequence[ChatMessage], prompt: str) -> None:
    """Raise `MessageError` if `prompt` lacks the text of a user, tool, function, system or developer message.

    Leading and trailing white space is ignored. A template may move a text, write it as JSON, or change its
    case and white space. A text that is sent twice must appear twice. Assistant text may be missing, because
    templates remove earlier reasoning; the names of called functions may not.
    """
    _check_calls(messages, prompt)
    wanted = [
        _Text(text, place, message.role)
        for place, message in enumerate(messages)
        if message.role in _GUARDED
        for text in _texts_of(message)
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


def _check_calls(messages: Sequence[ChatMessage], prompt: str) -> None:
    for place, message in enumerate(messages):
        for index, call in enumerate(message.calls):
            if call.name not in prompt:
                field = f"messages[{place}].tool_calls[{index}]"
                raise MessageError(field, f"the chat template drops this call of {call.name!r}")


def _texts_of(message: ChatMessage) -> list[str]:
    return [text for part in message.parts if (text := part.strip())]


def _all_in_order(wanted: Sequence[_Text], prompt: str) -> bool:
    """Whether all texts appear in this order without overlap: one pass over the prompt."""
    end = 0
    for one in wanted:
        start = prompt.find(one.text, end)
        if start < 0:
            return False
        end = start + len(one.text)
    return True


def _forms(text: str) -> Iterator[str]:
    """The forms in which a template may write a text: as it is, and escaped in JSON."""
    yield text
    for ensure_ascii in (False, True):
        yield json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def _bare(text: str) -> str:
    """The text in lower case and without white space."""
    return "".join(text.split()).lower()


class _Spans:
    """The parts of a prompt that are already matched to a text; they never overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, prompt: str, text: str) -> bool:
        """Match `text` to its first free occurrence. Returns False if there is none."""
        start = prompt.find(text)
        for _ in range(MAX_TRIES):
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
