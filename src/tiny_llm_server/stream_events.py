"""The events of streamed answers, in OpenAI's format.

They are dicts with only the fields that OpenAI sends. A server makes one for each token, and a dict takes a
fifth of the time of a pydantic model.
"""

from typing import Literal, NotRequired, TypedDict

from tiny_llm import RequestEvent

from .answers import ChatLogprobs, CompletionLogprobs, Usage
from .schema import StreamOptions


class NullUsage(TypedDict, total=False):
    """The usage of an event before the last one: null, or left out."""

    usage: None


def null_usage(options: StreamOptions | None) -> NullUsage:
    """Return `usage` for an event before the last one: null if the request includes usage, else left out."""
    return {"usage": None} if options is not None and options.include_usage else {}


class StopReason(TypedDict, total=False):
    """vLLM's `stop_reason` of a choice, or nothing."""

    stop_reason: str | int


def stop_reason_of(event: RequestEvent) -> StopReason:
    """Return vLLM's `stop_reason` for a choice; left out if there is none, as OpenAI has no such field."""
    return {} if event.stop_reason is None else {"stop_reason": event.stop_reason}


class CompletionPart(TypedDict):
    """The part of a completion that an event adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int]


class CompletionEvent(TypedDict):
    """An event of a stream of `/v1/completions`."""

    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[CompletionPart]
    usage: NotRequired[Usage | None]


class FunctionDelta(TypedDict):
    """The new part of a call. name: in the call's first event only."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The new part of the call with this index. id, type: in the call's first event only."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    """The new part of an answer. role: in the first event only."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatPart(TypedDict):
    """The part of one answer that an event adds."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int]


class ChatEvent(TypedDict):
    """An event of a chat's stream."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    choices: list[ChatPart]
    usage: NotRequired[Usage | None]
