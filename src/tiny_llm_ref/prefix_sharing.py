"""The policy that puts the prefix cache to work: what a sequence finds there, it does not compute.

Knows sequences and their tables; the cache knows neither. Bookkeeping over ints, without an array.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from .paged_attention import BlockAllocator
from .prefix_cache import PrefixCache, TokenBlocks
from .sequence import PagedSequence

LEAST_WORTH_COPYING = 4  # tokens of a block; copying it costs as much as computing about two


class PrefixSharing:
    """Lets sequences share what is kept, and keeps what they have computed."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.cache = PrefixCache(allocator, block_size)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.cache.block_size

    @property
    def blocks(self) -> list[int]:
        """Every kept block."""
        return self.cache.blocks

    @property
    def num_idle(self) -> int:
        """Blocks that `evict` could give up now."""
        return self.cache.num_idle

    def adopt(self, sequence: PagedSequence) -> None:
        """At a block's edge: share all kept blocks that come next, as far as they go unbroken.

        They come into the sequence's table by `cache.share`, and `note_shared` says how many tokens need no
        computing. Only blocks of tokens that are `num_shareable`: the last known token is always left to
        compute, because somebody must produce its logits. Nothing happens where it may not share.
        """
        size = sequence.table.block_size
        first, stop = sequence.num_computed // size, sequence.num_shareable // size
        if first < stop and self._may_share(sequence):
            found = self.cache.match(self._stream(sequence, stop), first, stop)
            for block in found:
                self.cache.share(sequence.table, block, size)
            sequence.note_shared(len(found) * size)

    def adopt_part(self, sequence: PagedSequence) -> None:
        """At a block's edge: share the beginning of one kept block more; the next write copies it.

        Its owner never sees that write, and the last known token is left to compute here too.
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
        """The hash of the block that a sequence fills next; None where its tokens are not all known.

        The block of the first token that is not computed, which may be half full. Two sequences with one
        answer would compute the same: the scheduler lets the later one wait, and share.
        """
        index = sequence.num_computed // sequence.table.block_size
        if (index + 1) * sequence.table.block_size > sequence.num_tokens:
            return None
        return self._stream(sequence, index + 1).hashes[index]

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had `start` tokens computed."""
        first, stop = start // self.block_size, sequence.num_computed // self.block_size
        if first < stop:
            self.cache.keep(sequence.table, self._stream(sequence, stop), first, stop)

    def released(self, blocks: Seq[int]) -> None:
        """Take note that a table has let go of these blocks, given in the table's order."""
        self.cache.released(blocks)

    def evict(self, num_blocks: int) -> int:
        """Give up to `num_blocks` idle blocks back to the allocator; returns how many."""
        return self.cache.evict(num_blocks)

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved to other places in the pool."""
        self.cache.rename_blocks(moved)

    def _may_share(self, sequence: PagedSequence) -> bool:
        """True at a block's edge, behind kept blocks, unless log-probabilities of the prompt are due."""
        blocks = sequence.table.blocks
        is_behind_kept = not blocks or blocks[-1] in self.cache
        due = sequence.prompt_positions(sequence.num_computed, sequence.num_tokens)
        return sequence.is_at_edge and is_behind_kept and not due

    def _stream(self, sequence: PagedSequence, num_blocks: int) -> TokenBlocks:
        """The sequence's stream, cut into at least so many blocks."""
        return sequence.stream_of(0, num_blocks)
