"""How one request wants its tokens chosen and when it wants to stop; names and defaults are vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from .errors import TinyLLMError

LEAST_TEMPERATURE = 1e-5  # logits divided by less overflow float32, and leave no probabilities to draw from
MOST_BIAS = 100.0  # of a logit; OpenAI's limit
MOST_DIGITS = 18  # of a token id that is written out

_INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "priority")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


class SamplingParamsError(TinyLLMError, ValueError):
    """A sampling parameter is unknown or has a value out of range; the message names it and the range."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; frozen, checked once, different for each row of a batch.

    n: completions for the prompt; they share the prompt's pages.
    temperature: 0 is greedy, and so is less than 1e-5; otherwise logits are divided by it.
    top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this.
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    min_p: drop tokens less likely than this fraction of the likeliest token's probability.
    seed: completion i draws with seed + i; None takes a seed at admission.
    presence_penalty, frequency_penalty: taken from the logit of a token that the output has, once, and once
        for each time; from -2 to 2.
    repetition_penalty: divides the logit of a token that prompt or output has where it is positive, and
        multiplies it where it is negative; 1 is off.
    stop: strings that end the text; the output never contains one. A control token that a string spells out
        matches that token where it is produced, also where the text leaves it out.
    stop_token_ids: tokens that end the output (the token is part of `token_ids`, not of the text).
    ignore_eos: go on after end-of-sequence tokens.
    max_tokens: longest output in tokens; None means up to the context's end.
    min_tokens: nothing ends the output before it has this many tokens.
    logprobs: log-probabilities to return for each token: the chosen one and this many likeliest.
    prompt_logprobs: the same for each token of the prompt but the first.
    logit_bias: what to add to the logits of some tokens, from -100 to 100, by token id.
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
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        for name, penalty in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            _check(-2.0 <= penalty <= 2.0, f"{name}_penalty", "in [-2, 2]", penalty)
        finite = float("inf")
        _check(self.n >= 1, "n", "at least 1", self.n)
        _check(0.0 <= self.temperature < finite, "temperature", "a finite number from 0 up", self.temperature)
        _check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        _check(self.top_k >= -1, "top_k", "-1, 0 (both: off) or a positive number", self.top_k)
        _check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        _check(
            0.0 < self.repetition_penalty < finite,
            "repetition_penalty",
            "a finite number above 0",
            self.repetition_penalty,
        )
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        most = "max_tokens" if self.max_tokens is None else f"max_tokens, {self.max_tokens}"
        _check(
            self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
            "min_tokens",
            f"from 0 to {most}",
            self.min_tokens,
        )
        for name in ("logprobs", "prompt_logprobs", "seed"):
            value = getattr(self, name)
            _check(value is None or value >= 0, name, "0 or more", value)
        _check(all(self.stop_strings), "stop", "non-empty strings", self.stop)

    def _check_types(self) -> None:
        """Refuse what is not a number, a flag, a text or a list of them; make the bias a dict of its own."""
        for name in _INTEGERS:
            value = getattr(self, name)
            optional = self.__dataclass_fields__[name].default is None or name == "max_tokens"
            _check(type(value) is int or (optional and value is None), name, "a whole number", value)
        for name in _NUMBERS:
            value = getattr(self, name)
            _check(isinstance(value, (int, float)) and type(value) is not bool, name, "a number", value)
        for name in _FLAGS:
            _check(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        listed = isinstance(self.stop, (str, list, tuple, type(None)))
        texts = listed and all(isinstance(text, str) for text in self.stop_strings)
        _check(texts, "stop", "a text or a list of texts", self.stop)
        _check(_are_ids(self.stop_token_ids or ()), "stop_token_ids", "token ids", self.stop_token_ids)
        _check(isinstance(self.cache_salt, str), "cache_salt", "a text", self.cache_salt)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build from keyword options; an unknown one raises `SamplingParamsError` with the known names."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise SamplingParamsError(f"unknown sampling parameter {name!r}; known: {', '.join(known)}")
        return cls(**options)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whatever form `stop` was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and no randomness is drawn."""
        return self.temperature < LEAST_TEMPERATURE


def _bias(given: Mapping[Any, Any]) -> dict[int, float]:
    """A bias by token id; ids may be texts, as they are in JSON."""
    _check(isinstance(given, Mapping), "logit_bias", "a mapping from token ids to numbers", given)
    bias = {}
    for key, value in given.items():
        is_id = str(key).isdecimal() and len(str(key)) <= MOST_DIGITS
        _check(is_id, "logit_bias", "a mapping from token ids", str(key)[: 2 * MOST_DIGITS])
        is_number = isinstance(value, (int, float)) and type(value) is not bool
        _check(is_number and -MOST_BIAS <= value <= MOST_BIAS, f"logit_bias[{key}]", "in [-100, 100]", value)
        bias[int(key)] = float(value)
    return bias


def _are_ids(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(v) is int and v >= 0 for v in values)


def _check(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise SamplingParamsError(f"{name} must be {expected}, not {value!r}")
