"""Separates a model's reasoning from its answer while both are generated.

Reasoning stands between two markers at the start of an answer. White space beside a marker belongs to it.
"""

from dataclasses import dataclass
from enum import Enum, auto

from .answer_deltas import ContentDelta, Delta, ReasoningDelta, joined
from .answer_markers import num_begun, num_spaces
from .errors import ConfigError
from .suggestions import unknown_name


@dataclass(frozen=True)
class ReasoningFormat:
    """The markers of reasoning. is_implied: an answer starts with reasoning even if `begin` is missing."""

    name: str
    begin: str
    end: str
    is_implied: bool = False


# Under vLLM's names for its parsers.
DEEPSEEK_R1 = ReasoningFormat("deepseek_r1", "<think>", "</think>", is_implied=True)
QWEN3 = ReasoningFormat("qwen3", "<think>", "</think>")
MISTRAL = ReasoningFormat("mistral", "[THINK]", "[/THINK]")
FORMATS = {one.name: one for one in (DEEPSEEK_R1, MISTRAL, QWEN3)}


def reasoning_of(template: str) -> ReasoningFormat | None:
    """Return the form of reasoning whose end marker is in a chat template; None if there is none."""
    return next((one for one in (QWEN3, MISTRAL) if one.end in template), None)


def reasoning_named(name: str) -> ReasoningFormat:
    """Return the form with vLLM's name for its parser. Raises `ConfigError` for an unknown name."""
    if name not in FORMATS:
        raise ConfigError(unknown_name("reasoning parser", name, FORMATS))
    return FORMATS[name]


class _State(Enum):
    BEFORE = auto()
    OPEN = auto()  # the marker has been read, but no text of the reasoning
    INSIDE = auto()
    CLOSED = auto()  # the end's marker has been read, but no text of the answer
    AFTER = auto()


class ReasoningParser:
    """The reasoning in one answer. is_open: the prompt ends within the reasoning.

    Without `is_open` and `form.is_implied`, an answer has reasoning only if it starts with `begin`, after any
    white space; otherwise all of it is content. `begin` may be repeated. Everything up to `end` is reasoning,
    or the whole answer if there is no `end`. Dropped are the markers, all white space before the text of the
    reasoning and before the content after it, and up to 64 characters of white space before `end`. The joined
    deltas depend only on the whole text.

    >>> parser = ReasoningParser(QWEN3)
    >>> parser.push("<think> Hm"), parser.push(".\\n</thi"), parser.push("nk> Yes"), parser.finish()
    ([ReasoningDelta(text='Hm')], [ReasoningDelta(text='.')], [ContentDelta(text='Yes')], [])
    """

    def __init__(self, form: ReasoningFormat, *, is_open: bool = False) -> None:
        self._form = form
        self._state = _State.OPEN if is_open or form.is_implied else _State.BEFORE
        self._text = ""  # not passed on yet

    def push(self, text: str) -> list[Delta]:
        """Take the next piece of the answer; return the deltas that are certain now, joined."""
        self._text += text
        return self._run(is_last=False)

    def finish(self) -> list[Delta]:
        """End the answer; return what was held back."""
        return self._run(is_last=True)

    def _run(self, is_last: bool) -> list[Delta]:
        deltas: list[Delta] = []
        before = None
        while before != (self._state, len(self._text)):
            before = (self._state, len(self._text))
            deltas += self._step(is_last)
        return joined(deltas)

    def _step(self, is_last: bool) -> list[Delta]:
        if self._state in (_State.BEFORE, _State.OPEN):
            return self._read_begin(is_last)
        if self._state is _State.INSIDE:
            return self._read_reasoning(is_last)
        if self._state is _State.CLOSED:
            self._text = self._text.lstrip()
            self._state = _State.AFTER if self._text else self._state
            return []
        text, self._text = self._text, ""
        return [ContentDelta(text)]

    def _read_begin(self, is_last: bool) -> list[Delta]:
        """Read the marker `begin`, which a model may repeat if the prompt has it already."""
        text, begin = self._text.lstrip(), self._form.begin
        is_open = self._state is _State.OPEN
        if text.startswith(begin):
            self._text, self._state = text[len(begin) :], _State.OPEN
        elif is_last or not begin.startswith(text):
            self._text = text if is_open else self._text
            self._state = _State.INSIDE if is_open else _State.AFTER
        return []

    def _read_reasoning(self, is_last: bool) -> list[Delta]:
        text, end = self._text, self._form.end
        place = text.find(end)
        if place >= 0:
            self._text, self._state = text[place + len(end) :], _State.CLOSED
            return [ReasoningDelta(text[: place - num_spaces(text[:place])])]
        known = len(text) - (0 if is_last else num_begun(text, end))
        known -= num_spaces(text[:known]) if not is_last else 0
        self._text = text[known:]
        return [ReasoningDelta(text[:known])]
