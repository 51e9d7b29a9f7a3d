"""The cost of an engine's steps: what steps took, and a line through their times."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple


class Step(NamedTuple):
    """A step: the tokens it computed, the sequences that ran, and its seconds."""

    tokens: int
    running: int
    seconds: float


class Cost(NamedTuple):
    """Seconds of a step: a fixed part, and a part for each of its tokens."""

    per_step: float
    per_token: float

    @classmethod
    def of(cls, steps: Sequence[Step]) -> "Cost":
        """Fit a line to these steps by least squares."""
        tokens, seconds = fmean(step.tokens for step in steps), fmean(step.seconds for step in steps)
        spread = sum((step.tokens - tokens) ** 2 for step in steps)
        slope = sum((step.tokens - tokens) * (step.seconds - seconds) for step in steps) / max(spread, 1e-9)
        return cls(seconds - slope * tokens, slope)

    def seconds(self, steps: float, tokens: float) -> float:
        """The predicted seconds of that many steps, which compute that many tokens together."""
        return steps * self.per_step + tokens * self.per_token
