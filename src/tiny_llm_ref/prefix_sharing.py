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
        """Share the kept blocks that come next in a sequence, up to the first miss.

        What it shares it does not compute. The next block has the index `sequence.num_computed //
        self.block_size`. The blocks come into the sequence's table by the given `cache.share`, in order and
        with their full length, and the sequence learns by `note_shared` how many tokens that makes. Share
        only blocks that lie within the first `num_shareable` tokens: all known tokens except the last, which
        is always computed, because its row of the step gives the logits for the next token.

        Nothing happens if no block is left to share or if the given `_may_share` says no. `_stream(sequence,
        n)` is the sequence's text, cut into at least n blocks; `cache.match` finds the blocks.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> from tiny_llm.policies import Policies
        >>> manager = PagedBatchManager(8, 4, 2, policies=Policies(prefix=PrefixSharing))  # 8 blocks of 4
        >>> for name in ("first", "again"):
        ...     added = manager.add_request(list(range(10)), name, SamplingParams(max_tokens=1))
        ...     rows = manager.process_batch()
        >>> [sequence.num_cached_tokens for sequence in manager.running]
        [0, 8]
        """
        size = self.block_size
        first, stop = sequence.num_computed // size, sequence.num_shareable // size
        if first < stop and self._may_share(sequence):
            found = self.cache.match(self._stream(sequence, stop), first, stop)
            for block in found:
                self.cache.share(sequence.table, block, size)
            sequence.note_shared(len(found) * size)

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
        """Return the hash of the block that a sequence fills next, or None if a token of it is not known yet.

        That is the block of the first token that is not computed; it may be partly full. Known are the prompt
        and the outputs (`num_tokens`). Two sequences with the same hash would compute the same block: the
        scheduler lets the later one wait, and share.

        The block's index is `sequence.num_computed // self.block_size`. `_stream(sequence, n)` is the
        sequence's text, cut into at least n blocks. It may have more: a sequence that was preempted computes
        its first block again, and its stream was cut further before.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager = PagedBatchManager(8, 4, 1)  # 8 blocks of 4 tokens
        >>> added = manager.add_request(list(range(11)), "a", SamplingParams(max_tokens=1))
        >>> sequence, sharing = manager.sequence("a"), PrefixSharing(manager.allocator, 4)
        >>> sequence.num_computed = 9  # the next block, 2, has the tokens 8 .. 11, and 11 is not known
        >>> sharing.next_block(sequence) is None
        True
        """
        size = self.block_size
        index = sequence.num_computed // size
        if (index + 1) * size > sequence.num_tokens:
            return None
        return self._stream(sequence, index + 1).hashes[index]

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
