"""What clients get, in OpenAI's shapes."""

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel

from tiny_llm import RequestEvent, RequestUsage

from .schema import StreamOptions


class PromptTokensDetails(BaseModel):
    """cached_tokens: tokens of prompts that were in the pool already."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request's prompts and of all its completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usages: list[RequestUsage]) -> "Usage":
        """The sum over the prompts of a request."""
        read = sum(usage.prompt_tokens for usage in usages)
        written = sum(usage.completion_tokens for usage in usages)
        cached = sum(usage.num_cached_tokens for usage in usages)
        return cls(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


def new_head(kind: str, model: str) -> dict[str, Any]:
    """The fields that an answer and each event of its stream start with: a new id, the time, the model."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def null_usage(options: StreamOptions | None) -> dict[str, Any]:
    """The field `usage` of an event before the last: null if the request includes usage, else left out."""
    return {"usage": None} if options is not None and options.include_usage else {}


def stop_reason_of(event: RequestEvent) -> dict[str, Any]:
    """The field `stop_reason` of a choice, which is vLLM's; left out if a stream's event has none."""
    return {} if event.stop_reason is None else {"stop_reason": event.stop_reason}


class Answer(BaseModel):
    """What every answer of a model begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None


class CompletionLogprobs(BaseModel):
    """Of each token of a text: itself, its log-probability, the likeliest ones, and where it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Completion(Answer):
    """The answer of `/v1/completions`, and each event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token, its log-probability, and the bytes of its text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A token of an answer, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of an answer."""

    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


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


class ChatDelta(BaseModel):
    """What is new of an answer. role: with its first piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Answer):
    """Each event of a chat's stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served. max_model_len: longest prompt and answer together, in tokens."""

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
    """The answer of `/health`. status: loading, ready, draining or failed."""

    status: str


class Version(BaseModel):
    """The answer of `/version`."""

    version: str
    mlx: str
    kernels: str
