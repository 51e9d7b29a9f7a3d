"""The bodies of answers, in OpenAI's format."""

import time
import uuid
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from tiny_llm import RequestUsage


class PromptTokensDetails(BaseModel):
    """cached_tokens: prompt tokens that came from the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request's prompts and of all its completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usages: list[RequestUsage]) -> "Usage":
        """Sum over the prompts of a request."""
        prompt = sum(usage.prompt_tokens for usage in usages)
        completion = sum(usage.completion_tokens for usage in usages)
        cached = sum(usage.num_cached_tokens for usage in usages)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class Head(TypedDict):
    """The fields common to an answer and all events of its stream."""

    id: str
    created: int
    model: str


def new_head(kind: str, model: str) -> Head:
    """Make the fields common to an answer and all events of its stream: a new id, the time, the model."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class Answer(BaseModel):
    """Fields common to all answers of a model."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None


class CompletionLogprobs(BaseModel):
    """For each token of a text: its name, its log-probability, the most likely tokens, and its offset.

    text_offset: characters of the text before the token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Completion(Answer):
    """The answer of `/v1/completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token, its log-probability, and the bytes of its text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A token of an answer, and the most likely tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of an answer."""

    content: list[ChatTokenLogprob]


class FunctionCall(BaseModel):
    """A function to call. arguments: the JSON text of an object; cut off if max_tokens ended the answer."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool. The client sends its result in a message with this id as `tool_call_id`."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """The model's message. content: null if there are only calls or reasoning.

    reasoning, reasoning_content: the same text, under the names of vLLM and DeepSeek. These and `tool_calls`
    are left out if the message has none.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        optional = ("reasoning", "reasoning_content", "tool_calls")
        return {name: value for name, value in fields.items() if value is not None or name not in optional}


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: str | int | None = None


class ChatCompletion(Answer):
    """The answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The served model. max_model_len: longest prompt + output in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tiny-llm"
    max_model_len: int


class ModelList(BaseModel):
    """The answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    """The answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The answer of `/detokenize`."""

    prompt: str


class Health(BaseModel):
    """The answer of `/health`. status: loading, ready, draining, unavailable (no replica runs) or failed."""

    status: str


class Version(BaseModel):
    """The answer of `/version`."""

    version: str
    mlx: str
    kernels: str
