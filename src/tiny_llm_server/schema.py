"""What clients may send: OpenAI's fields, and vLLM's where OpenAI has none. Anything else is refused by name.

A field that is null counts as not sent, and so does one that asks for what is done anyway, such as no tools.
Types are taken strictly: "1" is no number.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema

MOST_LOGPROBS = 20
MOST_MESSAGES = 4096
MOST_TOKENS = 131_072  # for /detokenize
MOST_PRIORITY = 100
INT32 = 2**31 - 1


Text = str  # Unicode: `bodies` refuses halves of characters, which JSON can spell
TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _fail_fast(schema: Any) -> None:
    """Set `fail_fast` on every list within a schema of pydantic's core."""
    if isinstance(schema, dict) and schema.get("type") == "list":
        schema["fail_fast"] = True
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list | tuple):
            _fail_fast(part)


class Body(BaseModel):
    """A request's body: no fields but these. IDLE: values of a field that ask for what is done without it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    IDLE: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Have every list stop at its first wrong element: an error for each would cost gigabytes."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown_field(cls, fields: Any) -> Any:
        """Of the fields that are refused, only the first: an error for each would cost gigabytes."""
        if not isinstance(fields, dict) or len(fields) <= len(cls.model_fields):
            return fields
        known = {*cls.model_fields, *cls.IDLE}
        unknown = [name for name in fields if name not in known]
        return {name: fields[name] for name in [*(known & {*fields}), *unknown[:1]]}

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {k: v for k, v in fields.items() if v is not None and not cls._is_idle(k, v)}

    @classmethod
    def _is_idle(cls, name: str, value: Any) -> bool:
        return any(type(value) is type(idle) and value == idle for idle in cls.IDLE.get(name, ()))


def _of_numbers(biases: Any) -> Any:
    """Stop at the first value that is not a number: a mapping has no `fail_fast`."""
    for name, bias in biases.items() if isinstance(biases, dict) else ():
        if type(bias) not in (int, float) or not math.isfinite(bias):
            raise ValueError(f"{name[:100]!r} must have a finite number")
    return biases


class StreamOptions(Body):
    """include_usage: one more event at the end of a stream, with the request's usage."""

    IDLE = {"include_obfuscation": (False,)}

    include_usage: bool = False


class Generation(Body):
    """What completions and chats have in common.

    temperature, top_p, n, seed, stop, the penalties and logit_bias are OpenAI's; the rest is vLLM's. user is
    for the client's own records, and changes nothing.
    """

    IDLE = {
        "tools": ([],),
        "tool_choice": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "seed": (-1,),  # none, as in vLLM
    }

    model: Text | None = Field(None, description="The served model's name; nothing: that one.")
    n: int = Field(1, ge=1, le=INT32, description="Completions of each prompt.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: Text | list[Text] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[Text, float], BeforeValidator(_of_numbers)] | None = Field(
        None, description="From token id, as a text, to -100 .. 100."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None

    top_k: int = Field(0, ge=-1, le=INT32)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    min_tokens: int = Field(0, ge=0, le=INT32)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: Text = Field("", description="Shares kept prompts with requests of the same salt alone.")
    priority: int = Field(
        0, ge=-MOST_PRIORITY, le=MOST_PRIORITY, description="The lower, the earlier, if the server allows it."
    )

    def sampling(self) -> dict[str, Any]:
        """The fields that are sampling parameters of the engine under the same names."""
        return self.model_dump(include=_SAMPLING)

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self


_SAMPLING = {
    *(
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "top_k",
    ),
    *("min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens"),
    *("include_stop_str_in_output", "cache_salt", "priority"),
}


class CompletionRequest(Generation):
    """`/v1/completions`: texts or token ids that are to be continued."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    max_tokens: int = Field(16, ge=0, le=INT32, description="0: nothing but the prompt, with echo.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = Field(False, description="Begin each text with its prompt.")
    best_of: int | None = Field(None, description="Only the number that n is: none is thrown away.")

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of: only n, which is {self.n}, not {self.best_of}")
        return self

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: at least 1, or 0 with echo: true")
        return self


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation. A list of texts is one text."""

    IDLE = {"tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart]
    tool_call_id: Text | None = Field(None, description="With role tool: which call this answers.")

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """What an answer looks like: text. JSON is not enforced, so it is not offered."""

    type: Literal["text"]


class ChatCompletionRequest(Generation):
    """`/v1/chat/completions`: a conversation that is to be answered, through the model's own template."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32, description="Nothing: up to the context's end."
    )
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="The old name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: another number than max_completion_tokens")
        return self


class TokenizeRequest(Body):
    """`/tokenize`: a text, or a conversation as the model's template writes it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """`/detokenize`: token ids, special ones too."""

    model: Text | None = None
    tokens: list[TokenId] = Field(max_length=MOST_TOKENS)
