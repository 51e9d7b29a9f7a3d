"""How one request wants its tokens chosen and when it wants to stop; names and defaults are vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

from .errors import SamplingParamsError
from .parameter_checks import (
    MOST_COUNT,
    MOST_SALT_CHARACTERS,
    check,
    flag,
    listed,
    number,
    refuse,
    text,
    whole_number,
)

LEAST_TEMPERATURE = 1e-5  # logits divided by less overflow float32, and leave no probabilities to draw from
MOST_TEMPERATURE = 1e30  # divided by more, -inf is no number in float32
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0  # a logit changed by as much stays finite in float32
MOST_BIAS = 100.0  # of a logit; OpenAI's limit
MOST_DIGITS = 18  # of a token id that is written out
MOST_SEED = 2**64 - 1

# Lists cost time in every step, so they are bounded: as in vLLM, where it has a limit.
MOST_BIASES = 1024
MOST_STOP_IDS = 128
MOST_LOGPROBS = 20
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 1024  # of each

_WHOLE = {
    "n": (1, MOST_COUNT),
    "top_k": (-1, MOST_COUNT),
    "min_tokens": (0, MOST_COUNT),
    "priority": (-MOST_COUNT, MOST_COUNT),
}
_OPTIONAL = {
    "seed": (0, MOST_SEED),
    "max_tokens": (1, MOST_COUNT),
    "logprobs": (0, MOST_LOGPROBS),
    "prompt_logprobs": (0, MOST_LOGPROBS),
}
_NUMBERS = {
    "temperature": (0.0, MOST_TEMPERATURE),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (LEAST_REPETITION, MOST_REPETITION),
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


class _DefaultMaxTokens(int):
    """The default of `max_tokens`, kept apart from the same number as a caller may give it.

    It equals and prints as the number, and goes through `dataclasses.replace`.
    """


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; frozen, checked once, different for each row of a batch.

    n: completions for the prompt; they share the prompt's pages.
    temperature: 0 is greedy, and so is less than 1e-5; otherwise logits are divided by it.
    top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this.
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    min_p: drop tokens less likely than this fraction of the likeliest token's probability.
    seed: from 0 to 2**64 - 1; completion i draws with seed + i; None takes a seed at admission.
    presence_penalty, frequency_penalty: taken from the logit of a token that the output has, once, and once
        for each time; from -2 to 2.
    repetition_penalty: divides the logit of a token that prompt or output has where it is positive, and
        multiplies it where it is negative; 1 is off; from 0.01 to 100.
    stop: strings that end the text; the output never contains one. At most 64, of 1,024 characters each. A
        control token that a string spells out matches that token where it is produced, also where the text
        leaves it out.
    stop_token_ids: at most 128 tokens that end the output (part of `token_ids`, not of the text).
    ignore_eos: go on after end-of-sequence tokens.
    max_tokens: longest output in tokens; None: up to the end of the context. Left out: 16 (vLLM's default)
        for completions, and up to the end of the context for chat answers.
    min_tokens: nothing ends the output before it has this many tokens.
    logprobs: log-probabilities to return for each token: the chosen one and this many likeliest, at most 20.
    prompt_logprobs: the same for each token of the prompt but the first.
    logit_bias: what to add to the logits of at most 1,024 tokens, from -100 to 100, by token id.
    skip_special_tokens: leave control tokens out of the text.
    include_stop_str_in_output: let the text end with the stop string, or the stop token's text.
    cache_salt: the request shares the pages of a common beginning with requests of the same salt alone.
    priority: whose turn it is; the lower the earlier, 0 is common. A request that waits gains on those that
        come later, so that none waits for ever.
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

    def __post_init__(self) -> None:
        """Refuse what is out of range; keep numbers as Python's, and lists as tuples of our own."""
        for name, checked in self._checked().items():
            object.__setattr__(self, name, checked)
        if self.max_tokens is not None:
            limit = f"from 0 to max_tokens, {self.max_tokens}"
            check(self.min_tokens <= self.max_tokens, "min_tokens", limit, self.min_tokens)

    def _checked(self) -> dict[str, Any]:
        """Every field's value, checked by itself. Raises `SamplingParamsError`."""
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
        checked["cache_salt"] = text("cache_salt", self.cache_salt, MOST_SALT_CHARACTERS)
        return checked

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build from keyword options; an unknown one raises `SamplingParamsError` with the known names."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise SamplingParamsError(f"unknown sampling parameter {name!r}; known: {', '.join(known)}")
        return cls(**options)

    @property
    def leaves_out_max_tokens(self) -> bool:
        """True if `max_tokens` was not given; `SamplingParams(max_tokens=16)` gives it."""
        return isinstance(self.max_tokens, _DefaultMaxTokens)

    def for_chat(self) -> Self:
        """These parameters for a chat answer: without a `max_tokens`, up to the end of the context."""
        return replace(self, max_tokens=None) if self.leaves_out_max_tokens else self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whatever form `stop` was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens of `stop_token_ids`."""
        return frozenset(self.stop_token_ids or ())

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and no randomness is drawn."""
        return self.temperature < LEAST_TEMPERATURE


def _stop(given: object) -> str | tuple[str, ...] | None:
    """One stop string, or several."""
    if given is None:
        return None
    several = isinstance(given, (list, tuple))
    if not several and not isinstance(given, str):
        refuse("stop", "a text or a list of texts", given)
    texts = listed("stop", given if several else (given,), "texts", MOST_STOPS)
    found = tuple(text(f"stop[{i}]", one, MOST_STOP_CHARACTERS) for i, one in enumerate(texts))
    check(all(found), "stop", "non-empty strings", given)
    return found if several else found[0]


def _token_ids(given: object) -> tuple[int, ...]:
    """The tokens that end the output."""
    ids = listed("stop_token_ids", given, "token ids", MOST_STOP_IDS)
    return tuple(whole_number(f"stop_token_ids[{i}]", token, 0) for i, token in enumerate(ids))


def _bias(given: object) -> dict[int, float]:
    """A bias by token id; ids may be texts, as they are in JSON."""
    if not isinstance(given, Mapping):
        refuse("logit_bias", "a mapping from token ids to numbers", given)
    if len(given) > MOST_BIASES:
        raise SamplingParamsError(f"logit_bias must have at most {MOST_BIASES} tokens, not {len(given)}")
    bias: dict[int, float] = {}
    for key, value in given.items():
        token = _token_of_key(key)
        check(token not in bias, "logit_bias", "a mapping that has each token once", key)
        bias[token] = number(f"logit_bias[{token}]", value, -MOST_BIAS, MOST_BIAS)
    return bias


def _token_of_key(key: object) -> int:
    """The token id that a key is, or that it spells."""
    if isinstance(key, str):
        is_number = key.isascii() and key.isdecimal() and len(key) <= MOST_DIGITS
        check(is_number, "logit_bias", "a mapping from token ids", key)
        key = int(key)
    return whole_number("logit_bias", key, 0)
