"""Turns a model's answer into reasoning, content and calls of tools while it is generated."""

from .answer_deltas import ContentDelta, Delta, joined
from .reasoning_parser import ReasoningParser
from .tool_parser import ToolParser


class AnswerParser:
    """One answer. reasoning, tools: its parsers; None if the answer has no such parts.

    The reasoning's parser gets the text, and the tools' parser the content that it returns.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[Delta]:
        """Take the next piece of the answer; return the deltas that are certain now, joined."""
        found: list[Delta] = [ContentDelta(text)] if self._reasoning is None else self._reasoning.push(text)
        return self._with_calls(found)

    def finish(self) -> list[Delta]:
        """End the answer; return what was held back."""
        found = [] if self._reasoning is None else self._reasoning.finish()
        return joined(self._with_calls(found) + ([] if self._tools is None else self._tools.finish()))

    def _with_calls(self, deltas: list[Delta]) -> list[Delta]:
        if self._tools is None:
            return joined(deltas)
        found: list[Delta] = []
        for delta in deltas:
            found += self._tools.push(delta.text) if isinstance(delta, ContentDelta) else [delta]
        return joined(found)
