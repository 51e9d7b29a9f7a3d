"""Measurements of one answer: tokens, latency, speed, and what the prefix cache saved."""

from dataclasses import dataclass
from time import monotonic


@dataclass(frozen=True)
class AnswerStats:
    """Token counts of one answer and its times in seconds.

    num_cached_tokens: prompt tokens whose keys and values came from the prefix cache. ttft: time to first
    token; None if the answer was stopped before it. decode_time: from the first token to the last.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_answer_tokens: int
    ttft: float | None
    decode_time: float

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return self.num_prompt_tokens + self.num_answer_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, which leaves out the first token; None for fewer than two tokens."""
        if self.num_answer_tokens < 2 or self.decode_time <= 0:
            return None
        return (self.num_answer_tokens - 1) / self.decode_time


class AnswerMeter:
    """Counts tokens and takes times while an answer streams. Made when the request is sent."""

    def __init__(self) -> None:
        self._start = monotonic()
        self._first: float | None = None
        self._last = self._start
        self._num_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Note tokens that have just arrived."""
        self._last = monotonic()
        if self._first is None and num_tokens:
            self._first = self._last
        self._num_tokens += num_tokens

    def stats(self, num_prompt_tokens: int, num_cached_tokens: int) -> AnswerStats:
        """The measurements so far."""
        first = self._last if self._first is None else self._first
        ttft = None if self._first is None else self._first - self._start
        return AnswerStats(num_prompt_tokens, num_cached_tokens, self._num_tokens, ttft, self._last - first)


def stats_text(stats: AnswerStats, context: int) -> str:
    """The measurements of an answer as text, one per line. context: the context's size in tokens."""
    speed = stats.tokens_per_second
    rows = {
        "prompt": f"{stats.num_prompt_tokens:,} tokens, {stats.num_cached_tokens:,} from the prefix cache",
        "answer": f"{stats.num_answer_tokens:,} tokens",
        "first token": "none" if stats.ttft is None else f"after {stats.ttft:.2f} s",
        "speed": "too short to measure" if speed is None else f"{speed:,.1f} tokens/s",
        "context": f"{stats.num_tokens:,} of {context:,} tokens ({stats.num_tokens / context:.0%})",
    }
    return "\n".join(f"{name:<13}{value}" for name, value in rows.items())
