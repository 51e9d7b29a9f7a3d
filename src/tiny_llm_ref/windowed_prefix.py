"""Prefix caching for layers with different windows: a hit needs only the blocks that can still be seen.

Layers without a window need every block of the prefix. A windowed layer needs only the blocks that the next
token to compute sees. A prefix is a hit if the blocks that each group of layers needs are kept. Source:
vLLM's hybrid KV cache.
"""

from collections.abc import Sequence as Seq

from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator, BlockTable
from .prefix_cache import TokenBlocks
from .prefix_sharing import MIN_TOKENS_TO_COPY, PrefixSharing
from .sequence import PagedSequence
from .sliding_window import WindowedTable, first_block, first_visible


class WindowedPrefixSharing(PrefixSharing):
    """Shares prefixes for groups of layers: in each sequence, each group has a separate table and stream.

    The groups' streams have different hashes for the same tokens, so one cache holds the blocks of all groups
    and evicts them in one order. Group `_groups[i]` uses `sequence.tables[i]` and `sequence.stream_of(i, n)`.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, groups: Seq[LayerGroup]) -> None:
        super().__init__(allocator, block_size)
        self._groups = groups

    def first_needed(self, group: int, num_blocks: int) -> int:
        """Return the first block that a group needs to continue after `num_blocks` blocks of a text.

        It is the block of the first position that the next token, at position num_blocks * block_size, sees.
        A group whose window is None sees everything and needs block 0. With a window of 1 the next token sees
        only itself, so no block is needed, and the result is `num_blocks`.

        >>> groups = (LayerGroup((0,)), LayerGroup((1,), window=6))
        >>> sharing = WindowedPrefixSharing(BlockAllocator(8), 4, groups)
        >>> sharing.first_needed(0, 3), sharing.first_needed(1, 3)  # token 12 sees 7 .. 12
        (0, 1)
        """
        window = self._groups[group].window
        if window is None:
            return 0
        return first_visible(num_blocks * self.block_size, window) // self.block_size

    def longest_hit(self, streams: Seq[TokenBlocks], first: int, stop: int) -> int:
        """Return the largest n, first <= n <= stop, such that every group can continue after n blocks.

        streams: the text's stream for each group, cut into at least `stop` blocks. The sequence has already
        computed the blocks before `first`. To continue after n blocks, a group needs the blocks from
        `first_needed(group, n)` to n - 1; those from `first` on must be kept. So n = `first` is always
        possible.

        Start with n = stop and check one group after another with `cache.match`, which changes nothing. If a
        block that a group needs is not kept, reduce n to the first such block, and check all groups again,
        because for a smaller n a window needs other blocks.

        >>> allocator, streams = BlockAllocator(20), [TokenBlocks(4, "all layers"), TokenBlocks(4, "window")]
        >>> sharing = WindowedPrefixSharing(allocator, 4, (LayerGroup((0,)), LayerGroup((1,), window=6)))
        >>> for stream, kept in zip(streams, ([0, 1, 2, 3, 4], [2, 3, 6, 7])):
        ...     stream.extend(range(32))
        ...     _ = [sharing.cache.add(allocator.allocate(), stream, index) for index in kept]
        >>> sharing.longest_hit(streams, 0, 8)  # after 5 blocks the window needs 3 and 4, and lacks 4
        4
        """
        group = 0
        while group < len(self._groups):
            start = max(first, self.first_needed(group, stop))
            missing = start + len(self.cache.match(streams[group], start, stop))
            group = 0 if missing < stop else group + 1
            stop = missing
        return stop

    def share_hit(self, group: int, table: BlockTable, stream: TokenBlocks, first: int, hit: int) -> None:
        """Extend one group's table from `first` computed blocks of a text to `hit` blocks, by sharing.

        The table gets the kept blocks that its group needs: those from `first_needed(group, hit)` to
        hit - 1, but none before `first`. Find them with `cache.match` in the group's `stream` (`longest_hit`
        has checked that they are kept), and append them with `cache.share`, in order and with their full
        length.

        If the first of these blocks comes after block `first`, the window sees none of the blocks that the
        table holds. Then, before sharing, call `table.skip_to` with the position of that first block, and
        pass the blocks that it returns to `released`. Only a `WindowedTable` has `skip_to`, and only a
        windowed table has to skip; for a type checker, check `isinstance(table, WindowedTable)` first.
        Otherwise the table keeps its blocks. If `hit` equals `first`, nothing changes.

        >>> allocator, stream = BlockAllocator(20), TokenBlocks(4)
        >>> sharing = WindowedPrefixSharing(allocator, 4, [LayerGroup((0,), window=6)])
        >>> table = WindowedTable(allocator, 4)
        >>> stream.extend(range(32))
        >>> _ = [sharing.cache.add(allocator.allocate(), stream, index) for index in range(8)]
        >>> sharing.share_hit(0, table, stream, 0, 8)
        >>> table.start, len(table.blocks)  # token 32 sees 27 .. 32: blocks 6 and 7
        (24, 2)
        """
        start = max(first, self.first_needed(group, hit))
        if start > first and isinstance(table, WindowedTable):
            self.released(table.skip_to(start * self.block_size))
        for block in self.cache.match(stream, start, hit):
            self.cache.share(table, block, self.block_size)

    def adopt(self, sequence: PagedSequence) -> None:
        """Let a sequence share the longest prefix of kept blocks after which all groups can continue.

        As in `PrefixSharing.adopt` of day 3.4, the next block is `sequence.num_computed // self.block_size`,
        only blocks completely within the first `num_shareable` tokens are shared, and nothing happens if no
        block is left to share or if `_may_share(sequence)` is False. Group i has `sequence.tables[i]` and the
        stream `sequence.stream_of(i, n)`, the text cut into at least n blocks.

        Find the longest hit before you change any table, because all tables of a sequence must end at the
        same token. Call `sequence.add_shared_tokens` once, not once for each group.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> groups = (LayerGroup((0,)), LayerGroup((1,), window=6))
        >>> manager = PagedBatchManager(40, 4, 1, groups=groups)
        >>> added = manager.add_request(list(range(33)), "a", SamplingParams(max_tokens=1))
        >>> sequence, allocator = manager.sequence("a"), manager.allocator
        >>> sharing = WindowedPrefixSharing(allocator, 4, groups)
        >>> for stream in (sequence.stream_of(0, 8), sequence.stream_of(1, 8)):
        ...     _ = [sharing.cache.add(allocator.allocate(), stream, index) for index in range(8)]
        >>> sharing.adopt(sequence)
        >>> sequence.num_computed, [len(table.blocks) for table in sequence.tables]
        (32, [8, 2])
        """
        size = self.block_size
        first, stop = sequence.num_computed // size, sequence.num_shareable // size
        if first >= stop or not self._may_share(sequence):
            return
        streams = [sequence.stream_of(group, stop) for group in range(len(self._groups))]
        hit = self.longest_hit(streams, first, stop)
        for group, (table, stream) in enumerate(zip(sequence.tables, streams, strict=True)):
            self.share_hit(group, table, stream, first, hit)
        sequence.add_shared_tokens((hit - first) * size)

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had computed `start` tokens, in every group.

        These are the text's blocks start // self.block_size .. num_computed // self.block_size - 1; if there
        are none, nothing happens.

        `cache.keep(table, stream, first, stop)` assumes that `table.blocks[i]` holds block i of the stream. A
        windowed table starts later: its `blocks[0]` is the text's block `first_block(table)`. So pass a
        stream that starts there too, `sequence.stream_of(group, n).tail(first_block(table))`, and count
        `first` and `stop` from that block. Blocks that the table has released, or never had, are not kept:
        `first` must not be negative.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> groups = (LayerGroup((0,)), LayerGroup((1,), window=6))
        >>> manager = PagedBatchManager(40, 4, 1, groups=groups)
        >>> added = manager.add_request(list(range(33)), "a", SamplingParams(max_tokens=1))
        >>> sequence, sharing = manager.sequence("a"), WindowedPrefixSharing(manager.allocator, 4, groups)
        >>> copies, sequence.num_computed = sequence.append_tokens(10), 10
        >>> sharing.keep(sequence, 0)
        >>> [[block in sharing.cache for block in table.blocks] for table in sequence.tables]
        [[True, True, False], [True, True, False]]
        """
        first, stop = start // self.block_size, sequence.num_computed // self.block_size
        if first == stop:
            return
        for group, table in enumerate(sequence.tables):
            offset = first_block(table)
            stream = sequence.stream_of(group, stop).tail(offset)
            self.cache.keep(table, stream, max(0, first - offset), stop - offset)

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Share the first tokens of one more kept block in every group; its later tokens differ."""
        size, start = self.block_size, sequence.num_computed
        known = min(sequence.num_shareable - start, size)
        if known < MIN_TOKENS_TO_COPY or not self._may_share(sequence):
            return
        tokens = sequence.tokens(start, start + known)
        parents = [
            sequence.stream_of(index, start // size).parent(start // size)
            for index in range(len(self._groups))
        ]
        matches = [self.cache.match_part(parent, tokens) for parent in parents]
        length = min(0 if match is None else match.length for match in matches)
        if length >= MIN_TOKENS_TO_COPY:
            for table, match in zip(sequence.tables, matches, strict=True):
                assert match is not None
                self.cache.share(table, match.block, length)
            sequence.add_shared_tokens(length)

    def _may_share(self, sequence: PagedSequence) -> bool:
        """True if a sequence may share blocks now: the conditions of `PrefixSharing`, for every table."""
        all_kept = all(not table.blocks or table.blocks[-1] in self.cache for table in sequence.tables)
        return all_kept and super()._may_share(sequence)
