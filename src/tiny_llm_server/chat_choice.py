"""One choice of a chat: the events of a completion become deltas for a stream, and one message."""

import json
import secrets
import string

from tiny_llm import RequestEvent
from tiny_llm_checkpoints.answer_deltas import CallDelta, ContentDelta, Delta, ReasoningDelta
from tiny_llm_checkpoints.answer_parser import AnswerParser

from .answers import ChatMessage, FunctionCall, ToolCall
from .stream_events import ChatDelta, ToolCallDelta

_ALPHANUMERIC = string.ascii_letters + string.digits


class ChatChoiceState:
    """A choice that grows event by event.

    parser: finds reasoning and calls; None: all text is content. has_short_ids: ids of calls have nine
    letters and digits, as Mistral's templates require. shows_reasoning: reasoning is sent. is_named: the
    request names the tool to call; such an answer ends with "stop", as in OpenAI's API.
    """

    def __init__(
        self,
        index: int,
        parser: AnswerParser | None,
        *,
        has_short_ids: bool = False,
        shows_reasoning: bool = True,
        is_named: bool = False,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self._parser = parser
        self._has_short_ids = has_short_ids
        self._shows_reasoning = shows_reasoning
        self._is_named = is_named
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_GrowingCall] = []

    def take(self, event: RequestEvent) -> list[ChatDelta]:
        """Add an event; return what is new in the message, as OpenAI streams it."""
        found = [one for delta in self._parsed(event) for one in self._added(delta)]
        if event.finish_reason is not None:
            is_by_call = self._has_calls and event.finish_reason == "stop" and not self._is_named
            self.finish_reason = "tool_calls" if is_by_call else event.finish_reason
        return found

    @property
    def _has_calls(self) -> bool:
        """True if there are calls, and the arguments of the last one are complete."""
        return bool(self._calls) and self._calls[-1].is_whole

    @property
    def message(self) -> ChatMessage:
        """The whole message."""
        reasoning, content = "".join(self._reasoning) or None, "".join(self._content)
        calls = [call.whole for call in self._calls]
        is_only_these = not content and (calls or reasoning)
        return ChatMessage(
            content=None if is_only_these else content,
            reasoning=reasoning,
            reasoning_content=reasoning,
            tool_calls=calls or None,
        )

    def _parsed(self, event: RequestEvent) -> list[Delta]:
        if self._parser is None:
            return [ContentDelta(event.text)] if event.text else []
        deltas = self._parser.push(event.text)
        return deltas if event.finish_reason is None else deltas + self._parser.finish()

    def _added(self, delta: Delta) -> list[ChatDelta]:
        """Add a part to the message; return it as OpenAI streams it. A call starts with empty arguments."""
        if isinstance(delta, ContentDelta):
            self._content.append(delta.text)
            return [{"content": delta.text}]
        if isinstance(delta, ReasoningDelta):
            if not self._shows_reasoning:
                return []
            self._reasoning.append(delta.text)
            return [{"reasoning": delta.text, "reasoning_content": delta.text}]
        return self._added_call(delta)

    def _added_call(self, delta: CallDelta) -> list[ChatDelta]:
        found: list[ChatDelta] = []
        if delta.name is not None:
            self._calls.append(_GrowingCall(self._new_id(), delta.name))
            first: ToolCallDelta = {
                "index": delta.number,
                "id": self._calls[-1].id,
                "type": "function",
                "function": {"name": delta.name, "arguments": ""},
            }
            found.append({"tool_calls": [first]})
        if delta.arguments:
            self._calls[-1].arguments.append(delta.arguments)
            more: ToolCallDelta = {"index": delta.number, "function": {"arguments": delta.arguments}}
            found.append({"tool_calls": [more]})
        return found

    def _new_id(self) -> str:
        if self._has_short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


class _GrowingCall:
    """A call whose arguments grow."""

    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.arguments: list[str] = []

    @property
    def is_whole(self) -> bool:
        """True if the arguments are complete."""
        try:
            json.loads("".join(self.arguments))
        except ValueError:
            return False
        return True

    @property
    def whole(self) -> ToolCall:
        function = FunctionCall(name=self.name, arguments="".join(self.arguments))
        return ToolCall(id=self.id, function=function)
