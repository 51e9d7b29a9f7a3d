"""Prefix caching for layers that see differently far: a hit needs only the blocks that can still be seen.

Layers that see everything need every block of the prefix. A windowed layer needs the blocks in reach of the
first token that is left to compute, and none before. A prefix is found if every group of layers has the
blocks that it needs of it. Source: vLLM's hybrid KV cache.
"""

from collections.abc import Sequence as Seq

from .paged_attention import BlockTable
from .prefix_cache import TokenBlocks
from .sequence import PagedSequence
from .sliding_window import WindowedTable, first_block, first_visible


class WindowedPrefixSharing:
    def first_needed(self, group: int, num_blocks: int) -> int:
        """Return the first block that a group needs to continue after `num_blocks` blocks of a text.

        The next token, at position num_blocks * block_size, decides: the block of the first position that it
        sees. A group whose window is None sees everything and needs block 0. With a window of 1 no block is
        needed, and the answer is `num_blocks`.

        >>> groups = (LayerGroup((0,)), LayerGroup((1,), window=6))
        >>> sharing = WindowedPrefixSharing(BlockAllocator(8), 4, groups)
        >>> sharing.first_needed(0, 3), sharing.first_needed(1, 3)  # token 12 sees 7 .. 12
        (0, 1)
        """
        window = self._groups[group].window
        position = 0 if window is None else first_visible(num_blocks * self.block_size, window)
        return position // self.block_size

    def longest_hit(self, streams: Seq[TokenBlocks], first: int, stop: int) -> int:
        """Return the largest n from `first` to `stop` so that every group can continue after n blocks.

        streams: the text as each group sees it, cut into at least `stop` blocks. The sequence has computed
        the blocks before `first` itself. A group can continue after n blocks if those of the blocks first ..
        n - 1 that it needs are kept: the blocks from `first_needed(group, n)` on. n = `first` needs none.

        Begin with n = stop and ask one group after the other. Where a group lacks a block, n falls to the
        first block that it lacks, and all groups are asked again: with a smaller n a window needs other
        blocks. Looking changes nothing (`cache.match`).

        >>> allocator, streams = BlockAllocator(20), [TokenBlocks(4, "all layers"), TokenBlocks(4, "window")]
        >>> sharing = WindowedPrefixSharing(allocator, 4, (LayerGroup((0,)), LayerGroup((1,), window=6)))
        >>> for stream, kept in zip(streams, ([0, 1, 2, 3, 4], [2, 3, 6, 7])):
        ...     stream.extend(range(32))
        ...     _ = [sharing.cache.add(allocator.allocate(), stream, index) for index in kept]
        >>> sharing.longest_hit(streams, 0, 8)  # after 5 blocks the window needs 3 and 4, and lacks 4
        4
        """
        hit, settled = stop, False
        while not settled:
            settled = True
            for group, stream in enumerate(streams):
                needed = max(first, self.first_needed(group, hit))
                reached = needed + len(self.cache.match(stream, needed, hit))
                if reached < hit:
                    hit, settled = reached, False
                    break
        return hit

    def share_hit(self, group: int, table: BlockTable, stream: TokenBlocks, first: int, hit: int) -> None:
        """Let one group's table continue after `hit` blocks of a text, of which it has computed `first`.

        The table gets the blocks that its group needs, from `first_needed(group, hit)` on but not before
        `first`, by `cache.share`, in order and with their full length. `longest_hit` has made sure that they
        are kept; the group's `stream` finds them.

        If the first of them lies behind block `first`, the window sees nothing of what the table holds: the
        `WindowedTable` skips to that block's position, and `released` is told which blocks it gave back.
        Otherwise the table keeps its blocks. If `hit` is `first`, nothing changes.

        >>> allocator, stream = BlockAllocator(20), TokenBlocks(4)
        >>> sharing = WindowedPrefixSharing(allocator, 4, [LayerGroup((0,), window=6)])
        >>> table = WindowedTable(allocator, 4)
        >>> stream.extend(range(32))
        >>> _ = [sharing.cache.add(allocator.allocate(), stream, index) for index in range(8)]
        >>> sharing.share_hit(0, table, stream, 0, 8)
        >>> table.start, len(table.blocks)  # token 32 sees 27 .. 32: blocks 6 and 7
        (24, 2)
        """
        if hit == first:
            return
        needed = max(first, self.first_needed(group, hit))
        if needed > first:
            assert isinstance(table, WindowedTable)
            self.released(table.skip_to(needed * self.block_size))
        for block in self.cache.match(stream, needed, hit):
            self.cache.share(table, block, self.block_size)

    def adopt(self, sequence: PagedSequence) -> None:
        """Share the longest prefix of kept blocks after which all groups can continue.

        As `PrefixSharing.adopt` of day 3.4: the next block is num_computed // block_size; only blocks within
        the first `num_shareable` tokens are shared, so the last known token is computed; nothing happens if
        no block is left to share or if `_may_share` says no. Group i has `sequence.tables[i]` and the stream
        `sequence.stream_of(i, n)`, the text cut into at least n blocks. Find the longest hit before you
        change a table: all tables of a sequence must end at the same token. `note_shared` counts the tokens
        once, not once for each group.

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
        first = sequence.num_computed // self.block_size
        stop = sequence.num_shareable // self.block_size
        if first >= stop or not self._may_share(sequence):
            return
        streams = [sequence.stream_of(group, stop) for group in range(len(self._groups))]
        hit = self.longest_hit(streams, first, stop)
        for group, (table, stream) in enumerate(zip(sequence.tables, streams, strict=True)):
            self.share_hit(group, table, stream, first, hit)
        sequence.note_shared((hit - first) * self.block_size)

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had computed `start` tokens, in every group.

        The text's blocks start // block_size .. num_computed // block_size - 1 have become full; if there are
        none, nothing happens. `cache.keep(table, stream, first, stop)` uses one number for a place in the
        table and for a block of the stream. But the places of a windowed table count from its first block,
        `first_block(table)`, and those of `sequence.stream_of(group, n)` from the text's first block:
        `TokenBlocks.tail(n)` is a stream from block n on. Blocks that the table has given back, or never had,
        are not kept: no place is negative.

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
        if first >= stop:
            return
        for group, table in enumerate(sequence.tables):
            begin = first_block(table)
            stream = sequence.stream_of(group, stop).tail(begin)
            self.cache.keep(table, stream, max(0, first - begin), stop - begin)
