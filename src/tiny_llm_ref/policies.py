"""The decisions that a batch manager leaves to others, with defaults that do nothing.

`PagedBatchManager` runs correctly on the defaults alone; later days replace one part each.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from .sequence import PagedSequence


class PreemptionPolicy(Protocol):
    """Who gives up pages when the pool runs out, and how much is promised so that it rarely does."""

    def promised_tokens(self, sequence: PagedSequence) -> int:
        """Tokens of `sequence`, from its first, for which pages must be there once it is admitted."""

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """The sequence of `candidates` (oldest first, never empty) to preempt; None for nobody."""


class NoPreemption:
    """A sequence is admitted only when pages for its whole life are free: nobody is ever preempted."""

    def promised_tokens(self, sequence: PagedSequence) -> int:
        """All tokens that the sequence may ever have."""
        return sequence.max_len

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """Nobody."""
        return None


@dataclass(frozen=True)
class Policies:
    """One object for each decision; frozen, so a manager's behaviour never changes under way."""

    preemption: PreemptionPolicy = field(default_factory=NoPreemption)
