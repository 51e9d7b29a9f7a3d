"""The policy that uses the prefix cache: a sequence does not compute what it finds there.

Knows sequences and their tables; the cache knows no sequences. Bookkeeping over ints, without an array.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from .paged_attention import BlockAllocator
from .prefix_cache import PrefixCache, TokenBlocks
from .sequence import PagedSequence

LEAST_WORTH_COPYING = 4  # tokens of a block; copying it costs as much as computing about two


class PrefixSharing:
    """Lets sequences share kept blocks, and keeps the blocks that they have computed."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.cache = PrefixCache(allocator, block_size)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.cache.block_size

    @property
    def blocks(self) -> list[int]:
        """The ids of all kept blocks."""
        return self.cache.blocks

    @property
    def num_idle(self) -> int:
        """Number of blocks that `evict` could give back now."""
        return self.cache.num_idle

    def adopt(self, sequence: PagedSequence) -> None:
        """Block by block; a miss ends it."""
        if not self._may_share(sequence):
            return
        index = sequence.num_computed // self.block_size
        while (index + 1) * self.block_size <= sequence.num_shareable:
            found = self.cache.match(self._stream(sequence, index + 1), index, index + 1)
            if not found:
                break
            self.cache.share(sequence.table, found[0], self.block_size)
            sequence.note_shared(self.block_size)
            index += 1

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Share the beginning of one more kept block, if its next tokens differ; the next write copies it.

        The block's other holders never see that write. The last known token is left to compute here too.
        """
        size, start = sequence.table.block_size, sequence.num_computed
        known = min(sequence.num_shareable - start, size)
        if known >= LEAST_WORTH_COPYING and self._may_share(sequence):
            parent = self._stream(sequence, start // size).parent(start // size)
            match = self.cache.match_part(parent, sequence.tokens(start, start + known))
            if match is not None and match.length >= LEAST_WORTH_COPYING:
                self.cache.share(sequence.table, match.block, match.length)
                sequence.note_shared(match.length)

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """Known blocks, counted."""
        index, num_known = sequence.num_computed // self.block_size, sequence.num_tokens // self.block_size
        return self._stream(sequence, num_known).hashes[index] if index < num_known else None

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had computed `start` tokens."""
        first, stop = start // self.block_size, sequence.num_computed // self.block_size
        if first < stop:
            self.cache.keep(sequence.table, self._stream(sequence, stop), first, stop)

    def released(self, blocks: Seq[int]) -> None:
        """Note that a table has given back its references to these blocks, listed in the table's order."""
        self.cache.released(blocks)

    def evict(self, num_blocks: int) -> int:
        """Give up to `num_blocks` idle blocks back to the allocator, and return how many."""
        return self.cache.evict(num_blocks)

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved in the pool: from old ids to new ones."""
        self.cache.rename_blocks(moved)

    def _may_share(self, sequence: PagedSequence) -> bool:
        """Return whether a sequence may share now.

        Only at a block's edge, behind blocks that are all kept, and only if no log-probabilities of the
        prompt are still to be computed.
        """
        blocks = sequence.table.blocks
        is_behind_kept = not blocks or blocks[-1] in self.cache
        due = sequence.prompt_positions(sequence.num_computed, sequence.num_tokens)
        return sequence.is_at_edge and is_behind_kept and not due

    def _stream(self, sequence: PagedSequence, num_blocks: int) -> TokenBlocks:
        """Return the sequence's stream, cut into at least so many blocks."""
        return sequence.stream_of(0, num_blocks)
