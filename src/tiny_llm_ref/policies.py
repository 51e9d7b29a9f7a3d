"""The decisions that a batch manager leaves to others, with defaults that do nothing.

`PagedBatchManager` runs correctly on the defaults alone; later days replace one part each.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from .paged_attention import BlockAllocator
from .sequence import PagedSequence


class PreemptionPolicy(Protocol):
    """Which sequence gives up its blocks when the pool runs out, and how many are reserved at admission."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """Tokens of `sequence`, from its first, for which blocks must be available once it is admitted."""

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """The sequence of `candidates` (oldest first, never empty) to preempt; None: none of them."""


class NoPreemption:
    """A sequence is admitted only when pages for its whole life are free: nobody is ever preempted."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """All tokens that the sequence may ever have."""
        return sequence.max_len

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """Nobody."""
        return None


class PrefixPolicy(Protocol):
    """Who shares pages with whom because their tokens begin alike."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def blocks(self) -> Seq[int]:
        """The blocks that are kept, each one reference."""

    @property
    def num_idle(self) -> int:
        """How many of them no table holds: `evict` can free these now."""

    def adopt(self, sequence: PagedSequence) -> None:
        """Let a sequence share the full blocks that come next and are there already."""

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Let it share the beginning of one block more, to be copied on its next write."""

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """What stands for the block that a sequence will fill next: who has the same waits for it."""

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had `start` tokens computed."""

    def released(self, blocks: Seq[int]) -> None:
        """A table has let go of these blocks, given in the table's order."""

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks, none for a number below 1; returns how many."""

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Blocks have moved to other places in the pool: from old ids to new ones."""


class NoPrefixSharing:
    """Everybody computes their own; nothing is kept."""

    num_idle = 0
    blocks: Seq[int] = ()

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size

    def adopt(self, sequence: PagedSequence) -> None:
        """Nothing is there."""

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Nothing is there."""

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """Nobody waits."""
        return None

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Nothing is kept."""

    def released(self, blocks: Seq[int]) -> None:
        """Nothing was kept."""

    def evict(self, num_blocks: int) -> int:
        """Nothing to give up."""
        return 0

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Nothing to rename."""


def in_order_of_arrival(number: int, priority: int) -> int:
    """The priority key of first come, first served: the number of the arrival, whatever the priority."""
    return number


@dataclass(frozen=True)
class Policies:
    """One object for each decision; frozen, so a manager's behaviour never changes under way.

    prefix: makes the policy for a manager's allocator and block size. swap_blocks: blocks on the host for
    what is preempted; without one to spare it is computed again. priority_key: a request's place in the order
    of service from its arrival number and its priority; the lowest is served first.
    """

    preemption: PreemptionPolicy = field(default_factory=NoPreemption)
    prefix: Callable[[BlockAllocator, int], PrefixPolicy] = NoPrefixSharing
    swap_blocks: int = 0
    priority_key: Callable[[int, int], int] = in_order_of_arrival
