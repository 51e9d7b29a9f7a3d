"""How one request wants its tokens chosen and when it wants to stop; names and defaults are vLLM's."""

from dataclasses import dataclass

from .errors import TinyLLMError

LEAST_TEMPERATURE = 1e-5  # logits divided by less overflow float32, and leave no probabilities to draw from


class SamplingParamsError(TinyLLMError, ValueError):
    """A sampling parameter has a value out of range; the message names it and the range."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; frozen, checked once, different for each row of a batch.

    n: completions for the prompt; they share the prompt's pages.
    temperature: 0 is greedy, and so is less than 1e-5; otherwise logits are divided by it.
    top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this.
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    min_p: drop tokens less likely than this fraction of the likeliest token's probability.
    seed: completion i draws with seed + i; None takes a seed at admission.
    stop: strings that end the text; the output never contains one.
    stop_token_ids: tokens that end the output (the token is part of `token_ids`, not of the text).
    ignore_eos: go on after end-of-sequence tokens.
    max_tokens: longest output in tokens; None means up to the context's end.
    logprobs: log-probabilities to return for each token: the chosen one and this many likeliest.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check(self.n >= 1, "n", "at least 1", self.n)
        _check(
            0.0 <= self.temperature < float("inf"),
            "temperature",
            "a finite number from 0 up",
            self.temperature,
        )
        _check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        _check(self.top_k >= -1, "top_k", "-1, 0 (both: off) or a positive number", self.top_k)
        _check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more", self.logprobs)
        _check(self.seed is None or self.seed >= 0, "seed", "0 or more", self.seed)
        _check(all(self.stop_strings), "stop", "non-empty strings", self.stop)

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


def _check(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise SamplingParamsError(f"{name} must be {expected}, not {value!r}")
