"""The policy that uses the prefix cache: sequences share cached blocks instead of computing them.

Knows sequences and their tables; the cache knows nothing of them. Bookkeeping over ints, no arrays.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from .paged_attention import BlockAllocator
from .prefix_cache import PrefixCache, TokenBlocks
from .sequence import PagedSequence

MIN_TOKENS_TO_COPY = 4  # fewer are not worth sharing: copying the block costs as much as computing 2 tokens


class PrefixSharing:
    """Lets sequences share kept blocks, and keeps the full blocks that they have computed.

    cache: the `PrefixCache` that keeps the blocks.
    """

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
    def hash_of(self) -> Mapping[int, bytes]:
        """The hash of each kept block, by the block's id; do not change it."""
        return self.cache.hash_of

    @property
    def num_idle(self) -> int:
        """The number of idle blocks, which `evict` could free now."""
        return self.cache.num_idle

    def adopt(self, sequence: PagedSequence) -> None:
        """Let a sequence share the kept blocks that come next in its text, up to the first miss.

        The next block has the index `sequence.num_computed // self.block_size`. Share only blocks that are
        completely within the first `num_shareable` tokens, which are all known tokens except the last: that
        one must be computed, because its row gives the logits for the next token.

        `cache.match` finds the blocks in `_stream(sequence, n)`, the sequence's text cut into at least n
        blocks. Append them to the sequence's table with the given `cache.share`, in order and with their full
        length. Then call `sequence.add_shared_tokens` with the number of shared tokens; they are not computed
        again.

        Do nothing if no block is left to share, or if the given `_may_share(sequence)` is False. If `match`
        finds no block, `add_shared_tokens(0)` changes nothing.

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
            sequence.add_shared_tokens(len(found) * size)

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Share the first tokens of one more kept block whose later tokens differ; the next write copies it.

        The block's other holders never see that write. As in `adopt`, the last known token is not shared.
        """
        size, start = sequence.table.block_size, sequence.num_computed
        known = min(sequence.num_shareable - start, size)
        if known >= MIN_TOKENS_TO_COPY and self._may_share(sequence):
            parent = self._stream(sequence, start // size).parent(start // size)
            match = self.cache.match_part(parent, sequence.tokens(start, start + known))
            if match is not None and match.length >= MIN_TOKENS_TO_COPY:
                self.cache.share(sequence.table, match.block, match.length)
                sequence.add_shared_tokens(match.length)

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """Return the hash of the block that a sequence fills next; None if some of its tokens are unknown.

        It is the block of the first token that is not computed, with the index
        `sequence.num_computed // self.block_size`. A sequence knows `num_tokens` tokens: its prompt and
        outputs. If two sequences have the same next block, the scheduler lets the later one wait and share
        it. The earlier one may be in the middle of this block, so a partly full block has the same hash.

        `_stream(sequence, n)` is the sequence's text cut into at least n blocks. It may have more, for
        instance after a preemption, so do not take its last hash.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager = PagedBatchManager(8, 4, 1)  # 8 blocks of 4 tokens
        >>> added = manager.add_request(list(range(11)), "a", SamplingParams(max_tokens=1))
        >>> sequence, sharing = manager.sequence("a"), PrefixSharing(manager.allocator, 4)
        >>> sequence.num_computed = 9  # the next block, 2, has the tokens 8 .. 11, and 11 is unknown
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
        """Make idle the blocks that only the cache still holds; `blocks` are in the order of their table."""
        self.cache.released(blocks)

    def hashes(self, limit: int | None = None) -> list[bytes]:
        """The hashes of the kept blocks, at most `limit` of them, as `PrefixCache.hashes` lists them."""
        return self.cache.hashes(limit)

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks; return how many were freed."""
        return self.cache.evict(num_blocks)

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Replace the ids of blocks that have moved in the pool: {old: new}."""
        self.cache.rename_blocks(moved)

    def _may_share(self, sequence: PagedSequence) -> bool:
        """True if a sequence may share blocks now.

        It may if its next token is the first of a block, all its blocks are kept, and no prompt
        log-probabilities are still to be computed.
        """
        blocks = sequence.table.blocks
        all_kept = not blocks or blocks[-1] in self.cache  # if the last is kept, so are those before it
        due = sequence.prompt_positions(sequence.num_computed, sequence.num_tokens)
        return sequence.is_at_block_start and all_kept and not due

    def _stream(self, sequence: PagedSequence, num_blocks: int) -> TokenBlocks:
        """Return the sequence's stream, cut into at least `num_blocks` blocks."""
        return sequence.stream_of(0, num_blocks)
