"""What a request gives back; names and shapes are vLLM's."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """A token's log-probability, its rank (1 is the likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    finish_reason: "stop" (end-of-sequence, a stop token or a stop string), "length", "abort" (its caller
    cancelled it), "error" (it failed), or None while it is not finished. stop_reason: the stop string or
    token id; None otherwise. logprobs: for each token a dict from token id to `Logprob`, the chosen one
    included. error: with the reason "error", what went wrong.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Moments, in seconds on the monotonic clock; None where one has not come.

    scheduled: when the request ran for the first time; known from its first token on.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    scheduled: float | None = None

    def __repr__(self) -> str:
        """Durations instead of clock readings, which say nothing without the clock: `ttft=0.012 s`."""
        times = {"queue_time": self.queue_time, "ttft": self.ttft, "e2e_latency": self.e2e_latency}
        shown = (f"{name}={seconds:.3f} s" for name, seconds in times.items() if seconds is not None)
        return f"RequestMetrics({', '.join(shown)})"

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until it ran."""
        return None if self.scheduled is None else self.scheduled - self.arrival

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def e2e_latency(self) -> float | None:
        """Seconds from arrival to the end of the request."""
        return None if self.finished is None else self.finished - self.arrival


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its completions, in the order of their index.

    prompt_logprobs: for each token of the prompt a dict from token id to `Logprob`, its own included; None
    for the first, which nothing comes before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = field(default=None, compare=False)


@dataclass(frozen=True)
class BeamSearchSequence:
    """One hypothesis of a beam search.

    tokens: the prompt's and those that were found. text: what the latter say. cum_logprob: the sum of their
    log-probabilities; score: what hypotheses are ordered by, the sum divided by a power of their number.
    """

    tokens: tuple[int, ...]
    text: str
    cum_logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True)
class BeamSearchOutput:
    """What a beam search found, best first; `beam_width` hypotheses, or all that there are.

    error: what went wrong, where the search failed; `sequences` is empty then.
    """

    sequences: tuple[BeamSearchSequence, ...]
    error: str | None = None


@dataclass(frozen=True)
class RequestUsage:
    """What a request that has ended took: tokens of the prompt and of all completions, and its times.

    num_cached_tokens: tokens of the prompt that came from the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    num_cached_tokens: int
    metrics: RequestMetrics = field(compare=False)


@dataclass(frozen=True)
class RequestEvent:
    """What one step gave one completion of a request: new text (may be empty) and the tokens behind it.

    index: which completion. logprobs: one dict for each of the tokens, where they are asked for, and
    prompt_logprobs once, as in `RequestOutput`. finish_reason, stop_reason, error: with the completion's last
    event, as in `CompletionOutput`. usage: with the request's last event, and with no other.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    usage: RequestUsage | None = None
    error: str | None = None


class TextDelta(NamedTuple):
    """A piece of one completion as it streams: new text (may be empty) and, at the end, why it ended."""

    index: int  # type: ignore[assignment]  # named like vLLM's, which hides tuple.index
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
