"""Sampling parameters: how a request's tokens are chosen and when it stops. Names and defaults are vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

from tiny_llm_checkpoints.suggestions import check_fields, suggests_fields

from .errors import SamplingParamsError
from .parameter_checks import (
    MAX_COUNT,
    MAX_SALT_CHARACTERS,
    check,
    flag,
    listed,
    number,
    refuse,
    text,
    whole_number,
)
from .structured_outputs import StructuredOutputsParams

MIN_TEMPERATURE = 1e-5  # vLLM's: less is greedy (dividing a logit by 1e-38 would overflow float32)
MAX_TEMPERATURE = 1e30  # far below 3.4e38: beyond that, float32 has inf, and -inf / inf is a NaN
MIN_REPETITION, MAX_REPETITION = 0.01, 100.0  # a logit times or divided by these stays finite in float32
MAX_BIAS = 100.0  # of a logit; OpenAI's limit
MAX_DIGITS = 18  # in a token id that is a string
MAX_SEED = 2**64 - 1

# Lists cost time in every step, so their lengths have limits: vLLM's, if it has one.
MAX_BIASES = 1024
MAX_STOP_IDS = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024  # in each stop string

_WHOLE = {
    "n": (1, MAX_COUNT),
    "top_k": (-1, MAX_COUNT),
    "min_tokens": (0, MAX_COUNT),
    "priority": (-MAX_COUNT, MAX_COUNT),
}
_OPTIONAL = {
    "seed": (0, MAX_SEED),
    "max_tokens": (1, MAX_COUNT),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_NUMBERS = {
    "temperature": (0.0, MAX_TEMPERATURE),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (MIN_REPETITION, MAX_REPETITION),
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


class _DefaultMaxTokens(int):
    """The default of `max_tokens`, which can be told apart from the same number given by a caller.

    It compares and prints like the number, and `dataclasses.replace` keeps it.
    """


@suggests_fields
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, checked on creation and then frozen. Each request has its own.

    n: completions for the prompt; they share the prompt's pages.
    temperature: logits are divided by it; 0, or less than 1e-5, is greedy.
    top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    min_p: drop tokens that are less likely than this fraction of the most likely token's probability.
    seed: from 0 to 2**64 - 1; completion i uses seed + i. None: the engine chooses a seed at admission.
    presence_penalty: subtracted from the logit of each token that is in the output; from -2 to 2.
    frequency_penalty: the same, times the number of occurrences; from -2 to 2.
    repetition_penalty: for tokens that are in the prompt or the output, divides a positive logit and
        multiplies a negative one; 1 is off; from 0.01 to 100.
    stop: strings that end the text, which contains none of them unless `include_stop_str_in_output` is set.
        At most 64, of at most 1,024 characters each. A control token in a stop string, such as "<|im_end|>",
        matches that token when it is generated, even if the text leaves it out.
    stop_token_ids: at most 128 tokens that end the output; they are in `token_ids` but not in the text.
    ignore_eos: continue after end-of-sequence tokens.
    max_tokens: longest output in tokens; None: up to the end of the context. Left out: 16 (vLLM's default)
        for completions, and up to the end of the context for chat answers.
    min_tokens: the output has at least this many tokens; nothing ends it earlier.
    logprobs: for each token of the output, return the log-probability of the chosen token and of this many of
        the most likely tokens; at most 20.
    prompt_logprobs: the same for each token of the prompt except the first.
    logit_bias: values to add to the logits of at most 1,024 tokens, from -100 to 100, by token id.
    skip_special_tokens: leave control tokens out of the text.
    include_stop_str_in_output: end the text with the stop string, or with the stop token's text.
    cache_salt: the request shares cached prefix blocks only with requests that have the same salt.
    priority: lower runs earlier; the default is 0. Waiting requests gain priority over later ones, so that
        none waits forever.
    structured_outputs: the form of the text, such as a JSON schema; or a mapping of the fields of
        `StructuredOutputsParams`. A completion ends with "stop" when its text is complete and cannot go on.
        Before that, only tokens that the form allows are drawn; the other parameters choose among them.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = _DefaultMaxTokens(16)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str = ""
    priority: int = 0
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check every field; convert numbers to Python's and lists to tuples."""
        for name, checked in self._checked().items():
            object.__setattr__(self, name, checked)
        if self.max_tokens is not None:
            limit = f"from 0 to max_tokens ({self.max_tokens})"
            check(self.min_tokens <= self.max_tokens, "min_tokens", limit, self.min_tokens)

    def _checked(self) -> dict[str, Any]:
        """The value of every field, each checked on its own. Raises `SamplingParamsError`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        checked: dict[str, Any] = {}
        for name, (least, most) in _WHOLE.items():
            checked[name] = whole_number(name, values[name], least, most)
        for name, (least, most) in _OPTIONAL.items():
            checked[name] = None if values[name] is None else whole_number(name, values[name], least, most)
        if self.leaves_out_max_tokens:
            checked["max_tokens"] = self.max_tokens
        for name, limits in _NUMBERS.items():
            checked[name] = number(name, values[name], *limits, above=name == "top_p")
        for name in _FLAGS:
            checked[name] = flag(name, values[name])
        checked["stop"] = _stop(self.stop)
        checked["stop_token_ids"] = None if self.stop_token_ids is None else _token_ids(self.stop_token_ids)
        checked["logit_bias"] = None if self.logit_bias is None else _bias(self.logit_bias)
        checked["cache_salt"] = text("cache_salt", self.cache_salt, MAX_SALT_CHARACTERS)
        form = self.structured_outputs
        checked["structured_outputs"] = None if form is None else StructuredOutputsParams.of(form)
        return checked

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Make parameters from keyword options. Raises `SamplingParamsError` for an unknown name."""
        check_fields(cls, options, "sampling parameter", SamplingParamsError)
        return cls(**options)

    @property
    def leaves_out_max_tokens(self) -> bool:
        """True if `max_tokens` was not given; False for `SamplingParams(max_tokens=16)`."""
        return isinstance(self.max_tokens, _DefaultMaxTokens)

    def for_chat(self) -> Self:
        """These parameters for a chat answer, which may fill the context if `max_tokens` was not given."""
        return replace(self, max_tokens=None) if self.leaves_out_max_tokens else self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whether `stop` is a string or a list."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens of `stop_token_ids`, as a set."""
        return frozenset(self.stop_token_ids or ())

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always chosen."""
        return self.temperature < MIN_TEMPERATURE


def _stop(given: object) -> str | tuple[str, ...] | None:
    """The checked value of `stop`: one string, a tuple of strings, or None."""
    if given is None:
        return None
    several = isinstance(given, (list, tuple))
    if not several and not isinstance(given, str):
        refuse("stop", "a string or a list of strings", given)
    texts = listed("stop", given if several else (given,), "strings", MAX_STOPS)
    found = tuple(text(f"stop[{i}]", one, MAX_STOP_CHARACTERS) for i, one in enumerate(texts))
    check(all(found), "stop", "a non-empty string or a list of such strings", given)
    return found if several else found[0]


def _token_ids(given: object) -> tuple[int, ...]:
    """The checked value of `stop_token_ids`."""
    ids = listed("stop_token_ids", given, "token ids", MAX_STOP_IDS)
    return tuple(whole_number(f"stop_token_ids[{i}]", token, 0) for i, token in enumerate(ids))


def _bias(given: object) -> dict[int, float]:
    """The checked value of `logit_bias`; token ids may be texts, as in JSON."""
    if not isinstance(given, Mapping):
        refuse("logit_bias", "a mapping from token ids to numbers", given)
    if len(given) > MAX_BIASES:
        raise SamplingParamsError(f"logit_bias must have at most {MAX_BIASES} tokens, not {len(given)}")
    bias: dict[int, float] = {}
    for key, value in given.items():
        token = _token_of_key(key)
        check(token not in bias, "logit_bias", "a mapping that has each token once", key)
        bias[token] = number(f"logit_bias[{token}]", value, -MAX_BIAS, MAX_BIAS)
    return bias


def _token_of_key(key: object) -> int:
    """The token id of a key, which is an integer or a string of digits."""
    if isinstance(key, str):
        is_number = key.isascii() and key.isdecimal() and len(key) <= MAX_DIGITS
        check(is_number, "logit_bias keys", "token ids", key)
        key = int(key)
    return whole_number("logit_bias", key, 0)
