"""The fields of requests: OpenAI's, and vLLM's if OpenAI has none. Any other field is refused by name.

A field that is null, or has a value that requests the default behaviour (such as `tools: []`), counts as not
sent. A field without effect on the answer is accepted if it has the right type. docs/server.md lists all
fields. Types are strict: "1" is not a number. Messages are checked by the engine (`read_messages`).
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
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from tiny_llm import StructuredOutputsParams
from tiny_llm_checkpoints.chat_tools import MAX_TOOLS
from tiny_llm_checkpoints.errors import shown

from .structured_fields import RESPONSE_FORMAT, STRUCTURED_OUTPUTS, ResponseFormat, StructuredOutputs
from .unknown_fields import IgnoredFields, unknown_field

MAX_LOGPROBS = 20
MAX_METADATA = 16
MAX_MESSAGES = 4096
MAX_TOKENS = 131_072  # for /detokenize
MAX_PRIORITY = 100
INT32 = 2**31 - 1
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CHOICES = ("none", "auto", "required")
EFFORTS = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _checked_prompts(value: Any) -> Any:
    """Check for a text, a list of token ids, or a list of either; the error names the first wrong element."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise ValueError(
                f"must be a string, a list of token ids, or a list of either, not {type(value).__name__}"
            )
        return value
    if not value:
        raise ValueError("the list must not be empty")
    first = type(value[0])
    for place, item in enumerate(value):
        if type(item) is not first or first not in (str, int, list):
            raise ValueError(
                f"[{place}] is of type {type(item).__name__}, but the list must have only strings or only "
                "token ids"
            )
        if first is list:
            _check_ids(item, f"[{place}]")
    if first is int:
        _check_ids(value, "")
    return value


def _check_ids(ids: list[Any], place: str) -> None:
    if not ids:
        raise ValueError(f"{place} must not be empty")
    for index, token in enumerate(ids):
        if type(token) is not int:
            raise ValueError(f"{place}[{index}] is {type(token).__name__}: token ids are integers")
        if not 0 <= token <= INT32:
            raise ValueError(
                f"{place}[{index}] is {str(token)[:40]}: a token id is at least 0 and in the vocabulary"
            )


def _checked_metadata(value: Any) -> Any:
    """Check metadata against OpenAI's limits; stop at the first wrong entry."""
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise ValueError(f"must be an object with at most {MAX_METADATA} entries")
    for name, item in value.items():
        if not isinstance(item, str):
            raise ValueError(f"{name[:40]!r} must be a string, not {type(item).__name__}")
    return value


def _checked_choice(value: Any) -> Any:
    """Check for the name of a choice, or for the function to call."""
    if not isinstance(value, dict):
        if value not in TOOL_CHOICES:
            raise ValueError(f"must be {', '.join(TOOL_CHOICES)} or a function, not {shown(value)}")
        return value
    kind, function = value.get("type"), value.get("function")
    if kind != "function":
        message = "tool_choice of type {kind} is not supported; supported: function"
        raise PydanticCustomError("unsupported_field", message, {"kind": shown(kind)})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('must name a function: {"type": "function", "function": {"name": "f"}}')
    return value


Text = str  # valid Unicode: `bodies` refuses lone surrogates, which JSON can contain
TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_PROMPTS = {  # the JSON schema of what `_checked_prompts` accepts
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": INT32}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}
_MESSAGE = {  # the outline of what `read_messages` accepts
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]},
    },
}
_TOOL = {  # the outline of what `read_tools` accepts
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    },
}
_TOOL_CHOICE = {"anyOf": [{"enum": list(TOOL_CHOICES)}, _TOOL]}
Prompts = Annotated[Any, BeforeValidator(_checked_prompts), WithJsonSchema(_PROMPTS)]
Messages = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_MESSAGES),
    WithJsonSchema({"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": _MESSAGE}),
]
Metadata = Annotated[
    Any,
    BeforeValidator(_checked_metadata),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
Tools = Annotated[  # checked by `read_tools`
    list[Any],
    Field(max_length=MAX_TOOLS),
    WithJsonSchema({"type": "array", "maxItems": MAX_TOOLS, "items": _TOOL}),
]
ToolChoice = Annotated[Any, BeforeValidator(_checked_choice), WithJsonSchema(_TOOL_CHOICE)]
Json = Annotated[dict[str, Any], Field(max_length=1000)]


def _fail_fast(schema: Any) -> None:
    """Set `fail_fast` on every list in a pydantic core schema."""
    if isinstance(schema, dict) and schema.get("type") == "list":
        schema["fail_fast"] = True
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list | tuple):
            _fail_fast(part)


class Body(BaseModel):
    """A request body without unknown fields. IDLE: for each field, the values that count as not sent.

    If the validation's context is an `IgnoredFields`, unknown fields are logged there and dropped.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    IDLE: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Make each list stop at its first error: an error for each element would take gigabytes."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_fields(cls, fields: Any, info: ValidationInfo) -> Any:
        """Raise an error for the first unknown field only: an error for each would take gigabytes."""
        if not isinstance(fields, dict):
            return fields
        ignored: IgnoredFields | None = info.context
        unknown = [name for name in fields if name not in cls.model_fields]
        for name in unknown:
            if name in FIELDS | REJECTED:  # spelled correctly, and never ignored: it could change the answer
                raise unknown_field(name, cls.__name__, ())
            if ignored is None:
                raise unknown_field(name, cls.__name__, cls.model_fields)
        if ignored is not None:
            ignored.log(unknown)
        return {name: value for name, value in fields.items() if name in cls.model_fields}

    @model_validator(mode="before")
    @classmethod
    def _without_idle_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {k: v for k, v in fields.items() if v is not None and not cls._is_idle(k, v)}

    @classmethod
    def _is_idle(cls, name: str, value: Any) -> bool:
        return any(type(value) is type(idle) and value == idle for idle in cls.IDLE.get(name, ()))


def _checked_biases(biases: Any) -> Any:
    """Check for numbers; stop at the first error, because a mapping has no `fail_fast`."""
    for name, bias in biases.items() if isinstance(biases, dict) else ():
        if type(bias) not in (int, float) or not math.isfinite(bias):
            raise ValueError(f"the bias of {name[:100]!r} must be a finite number")
    return biases


class StreamOptions(Body):
    """include_usage: send the request's usage in an additional event at the end of the stream."""

    IDLE = {"continuous_usage_stats": (False,)}

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="No effect: events have no padding.")


class Generation(Body):
    """The fields common to completions and chats.

    n, temperature, top_p, seed, stop, the penalties, logit_bias and the stream's fields are OpenAI's; top_k
    and those after it are vLLM's. Sampling parameters that are not sent have the defaults of the model or the
    operator, if there are any. WITHOUT_EFFECT: fields that do not change an answer.
    """

    IDLE = {
        "seed": (-1,),  # no seed, as in vLLM
        "use_beam_search": (False,),
        "length_penalty": (1.0, 1),  # for beam search only
        "spaces_between_special_tokens": (True,),
        "bad_words": ([],),
        "logits_processors": ([],),
        "return_tokens_as_token_ids": (False,),
        "return_token_ids": (False,),
        "truncate_prompt_tokens": (-1,),  # vLLM: truncate to the context; a longer prompt is refused here
        "vllm_xargs": ({},),
    }
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        *("user", "metadata", "store", "safety_identifier", "service_tier", "session_id"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    )

    model: Text | None = Field(None, description="Name of the served model; may be left out.")
    n: int = Field(1, ge=1, le=INT32, description="Number of completions of each prompt.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1: no seed, as in vLLM.")
    stop: Text | list[Text] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[Text, float], BeforeValidator(_checked_biases)] | None = Field(
        None, description="Maps token ids (as strings) to -100 to 100."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None

    user: Text | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    safety_identifier: Text | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    session_id: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: Json | None = None

    top_k: int = Field(0, ge=-1, le=INT32)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    min_tokens: int = Field(0, ge=0, le=INT32)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: Text = Field(
        "", description="Share cached prefixes only with requests that have the same salt."
    )
    priority: int = Field(
        0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="Lower runs earlier, with --scheduling-policy priority.",
    )
    response_format: ResponseFormat = Field(
        None, description="The form of the text; a schema is enforced with strict true and false alike."
    )
    structured_outputs: StructuredOutputs = Field(
        None, description="The form of the text: exactly one of json, regex, choice, grammar and json_object."
    )

    @property
    def form(self) -> StructuredOutputsParams | None:
        """The form that the text must have; None: any."""
        found: StructuredOutputsParams | None = self.response_format or self.structured_outputs
        return found

    @property
    def form_field(self) -> str:
        """The name of the field with the form."""
        return STRUCTURED_OUTPUTS if self.response_format is None else RESPONSE_FORMAT

    def sampling(self) -> dict[str, Any]:
        """Return the fields that are sampling parameters of the engine, under the same names.

        A negative seed becomes the unsigned number with the same 64 bits.
        """
        fields = self.model_dump(include=_SAMPLING)
        return fields if self.seed is None else {**fields, "seed": self.seed % 2**64}

    def leaves_out(self, name: str) -> bool:
        """Return whether the client did not send a sampling parameter, not even with its default value."""
        return name not in self.model_fields_set

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream: true")
        return self

    @model_validator(mode="after")
    def _check_forms(self) -> "Generation":
        if None not in (self.response_format, self.structured_outputs):
            raise ValueError("structured_outputs: not allowed together with response_format")
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
    """`/v1/completions`: texts or token ids to continue."""

    IDLE = {**Generation.IDLE, "suffix": ("",)}

    prompt: Prompts
    max_tokens: int = Field(16, ge=0, le=INT32, description="0, with echo: true, returns only the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(False, description="Start each text with its prompt.")
    best_of: int | None = Field(None, description="Must equal n.")
    add_special_tokens: bool = Field(
        True, description="Add the tokenizer's special tokens to prompts that are texts."
    )

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of: must equal n ({self.n}), not {self.best_of}")
        return self

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: must be at least 1, or 0 with echo: true")
        return self


class ChatCompletionRequest(Generation):
    """`/v1/chat/completions`: a conversation to answer."""

    IDLE = {
        **Generation.IDLE,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "echo": (False,),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    }
    WITHOUT_EFFECT = (
        *Generation.WITHOUT_EFFECT,
        "prediction",
    )

    messages: Messages
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32, description="Default: up to the end of the context."
    )
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="The old name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = Field(
        None,
        description="End the prompt with the start of an answer. "
        "Default: true, or false with continue_final_message: true.",
    )
    continue_final_message: bool = Field(
        False, description="Continue the last message instead of answering it."
    )
    add_special_tokens: bool = Field(False, description="Add the tokenizer's special tokens to the prompt.")
    chat_template_kwargs: Json | None = Field(None, description="Variables of the chat template.")
    reasoning_effort: EFFORTS | None = Field(
        None, description="A variable of the chat template; no effect if the template does not use it."
    )
    tools: Tools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="Whether the model may, must or must not call tools, or must call this one."
    )
    parallel_tool_calls: bool = Field(True, description="Allow several calls in one answer.")
    include_reasoning: bool = Field(True, description="Send the model's reasoning, if it has any.")

    prediction: Json | None = None

    @model_validator(mode="after")
    def _check_end(self) -> "ChatCompletionRequest":
        _check_end(self.add_generation_prompt, self.continue_final_message)
        return self

    def leaves_out(self, name: str) -> bool:
        """As in `Generation`, but `max_tokens` also counts as sent if `max_completion_tokens` was sent."""
        given = name == "max_tokens" and not super().leaves_out("max_completion_tokens")
        return not given and super().leaves_out(name)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: must equal max_completion_tokens if both are sent")
        return self


def _check_end(add_generation_prompt: bool | None, continue_final_message: bool) -> None:
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message: not allowed together with add_generation_prompt")


class TokenizeRequest(Body):
    """`/tokenize`: a text, or a conversation, to which the chat template is applied."""

    IDLE = {"mm_processor_kwargs": ({},), "media_io_kwargs": ({},)}

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default: true for a text, false for a conversation."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    tools: Tools | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_end(self) -> "TokenizeRequest":
        _check_end(self.add_generation_prompt, self.continue_final_message)
        return self

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: send either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """`/detokenize`: token ids, including those of control tokens."""

    model: Text | None = None
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


# Fields of OpenAI's or vLLM's API that no endpoint accepts.
REJECTED = frozenset(
    (
        *("audio", "moderation", "web_search_options"),
        "chat_template",
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern"),
        *("json_schema", "grammar", "regex"),
        *("prompt_logprobs", "allowed_token_ids", "request_id", "thinking_token_budget"),
    )
)
FIELDS = frozenset(  # the fields of all requests, whose names may be logged
    name
    for body in (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
    for name in (*body.model_fields, *body.IDLE)
)
