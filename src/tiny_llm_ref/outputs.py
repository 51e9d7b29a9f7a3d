"""Outputs of requests; names and shapes follow vLLM's."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """A token's log-probability, its rank (1: the most likely), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    finish_reason: "stop" (an end-of-sequence token, a stop token or a stop string), "length", "abort" (the
    request was cancelled), "error" (it failed), or None while it is unfinished. stop_reason: the stop string
    or the id of the stop token that ended it; otherwise None. logprobs: for each token a dict from token id
    to `Logprob`, which includes the chosen token. error: the error's message if finish_reason is "error".
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
    """Times of a request, in seconds on the monotonic clock; None for what has not happened yet.

    scheduled: when the request first ran; set with its first token.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    scheduled: float | None = None

    def __repr__(self) -> str:
        """Show durations, such as `ttft=0.012 s`; the times themselves have no meaning for a reader."""
        times = {"queue_time": self.queue_time, "ttft": self.ttft, "e2e_latency": self.e2e_latency}
        shown = (f"{name}={seconds:.3f} s" for name, seconds in times.items() if seconds is not None)
        return f"RequestMetrics({', '.join(shown)})"

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until the request first ran."""
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

    prompt_logprobs: for each token of the prompt a dict from token id to `Logprob`, which includes that
    token; None for the first token, which has no context.
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

    tokens: the prompt's tokens and the new ones. text: the text of the new tokens. cum_logprob: the sum of
    their log-probabilities. score: that sum divided by a power of the number of new tokens; hypotheses are
    ordered by it.
    """

    tokens: tuple[int, ...]
    text: str
    cum_logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True)
class BeamSearchOutput:
    """The hypotheses of a beam search, best first: `beam_width` of them, or fewer if no more exist.

    error: the error's message if the search failed; `sequences` is empty then.
    """

    sequences: tuple[BeamSearchSequence, ...]
    error: str | None = None


@dataclass(frozen=True)
class RequestUsage:
    """The usage of a request that has ended: tokens of the prompt and of all completions, and its times.

    num_cached_tokens: tokens of the prompt that came from the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    num_cached_tokens: int
    metrics: RequestMetrics = field(compare=False)


@dataclass(frozen=True)
class RequestEvent:
    """The result of one step for one completion of a request.

    index: the completion's index. text: the new text, which may be empty. token_ids: the new tokens.
    logprobs: if requested, one dict for each of these tokens; prompt_logprobs: if requested, once, as in
    `RequestOutput`. finish_reason, stop_reason, error: in the completion's last event, as in
    `CompletionOutput`. usage: only in the request's last event.
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
    """A piece of a streamed completion: new text, which may be empty, and at the end a finish_reason."""

    index: int  # type: ignore[assignment]  # named like vLLM's, which hides tuple.index
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
