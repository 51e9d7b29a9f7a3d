"""The policies of a batch manager, with defaults that do nothing.

`PagedBatchManager` runs correctly with the defaults; each later day of the course replaces one of them.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from .paged_attention import BlockAllocator
from .sequence import PagedSequence, Sequence


class PreemptionPolicy(Protocol):
    """Decides which sequence is preempted when blocks run out, and how many blocks admission reserves."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """How many of the sequence's tokens, from the first, need reserved blocks when it is admitted."""

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """The sequence to preempt, from `candidates` (oldest first, never empty); None: none of them."""


class NoPreemption:
    """Never preempts: a sequence is admitted only when pages for its longest possible output are free."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """All tokens that the sequence may have at its end."""
        return sequence.max_len

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """None: nothing is preempted."""
        return None


class PrefixPolicy(Protocol):
    """Decides which sequences share pages, because their tokens have a common prefix."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def blocks(self) -> Seq[int]:
        """The cached blocks; the cache holds one reference to each."""

    @property
    def hash_of(self) -> Mapping[int, bytes]:
        """The hash of each cached block, by the block's id; do not change it."""

    @property
    def num_idle(self) -> int:
        """The number of cached blocks that no table holds: `evict` can free these now."""

    def adopt(self, sequence: PagedSequence) -> None:
        """Let a sequence share cached full blocks that hold its next tokens."""

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Let a sequence share the first tokens of one more block, which its next write will copy."""

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """The hash of the block that a sequence will fill next; later sequences with the same one wait."""

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Cache the blocks that a sequence has filled since it had `start` computed tokens."""

    def released(self, blocks: Seq[int]) -> None:
        """Note that a table has released these blocks, listed in the table's order."""

    def hashes(self, limit: int | None = None) -> Seq[bytes]:
        """The hashes of the cached blocks, at most `limit`: the next to be evicted are left out."""

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks; none for a number below 1. Returns how many were freed."""

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Replace the ids of blocks that have moved in the pool; moved: from old ids to new ids."""


class NoPrefixSharing:
    """No sharing: each sequence computes all of its tokens, and nothing is cached."""

    num_idle = 0
    blocks: Seq[int] = ()
    hash_of: Mapping[int, bytes] = MappingProxyType({})

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size

    def adopt(self, sequence: PagedSequence) -> None:
        """Nothing is cached."""

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Nothing is cached."""

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """None: no sequence waits for another."""
        return None

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Caches nothing."""

    def released(self, blocks: Seq[int]) -> None:
        """Nothing was cached."""

    def hashes(self, limit: int | None = None) -> Seq[bytes]:
        """None are cached."""
        return ()

    def evict(self, num_blocks: int) -> int:
        """0: there is nothing to evict."""
        return 0

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Nothing to rename."""


class DraftPolicy(Protocol):
    """Guesses the next tokens of sequences, for speculative decoding."""

    def drafts(self, decodes: Seq[Sequence], num_rows: int, max_drafted: int) -> Seq[Seq[int]]:
        """Return a draft for each sequence, which may be empty.

        decodes: the sequences of which the step computes only the newest token. num_rows: all rows of the
        step. max_drafted: the maximum number of drafted tokens, all sequences together.
        """

    def observe(self, num_rows: int, seconds: float) -> None:
        """Note how long a step of decodes and drafts took."""


class NoSpeculation:
    """Drafts nothing."""

    def drafts(self, decodes: Seq[Sequence], num_rows: int, max_drafted: int) -> Seq[Seq[int]]:
        """An empty draft for each sequence."""
        return [()] * len(decodes)

    def observe(self, num_rows: int, seconds: float) -> None:
        """Nothing depends on it."""


def in_order_of_arrival(number: int, priority: int) -> int:
    """The priority key of first come, first served: the arrival number, regardless of the priority."""
    return number


@dataclass(frozen=True)
class Policies:
    """One object for each decision; frozen, so that a manager's behaviour never changes while it runs.

    preemption: the preemption policy. prefix: a function or class that makes the prefix policy from the
    manager's allocator and block size. swap_blocks: blocks in host memory for preempted sequences; a sequence
    that does not fit is recomputed. priority_key: a function that makes a request's priority key from its
    arrival number and its priority; the lowest key is served first. drafting: guesses tokens.
    """

    preemption: PreemptionPolicy = field(default_factory=NoPreemption)
    prefix: Callable[[BlockAllocator, int], PrefixPolicy] = NoPrefixSharing
    swap_blocks: int = 0
    priority_key: Callable[[int, int], int] = in_order_of_arrival
    drafting: DraftPolicy = field(default_factory=NoSpeculation)
