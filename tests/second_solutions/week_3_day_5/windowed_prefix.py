"""Prefix caching for layers with different windows: a hit needs only the blocks that can still be seen.

Layers without a window need every block of the prefix. A windowed layer needs only the blocks that the next
token to compute sees. A prefix is a hit if the blocks that each group of layers needs are kept. Source:
vLLM's hybrid KV cache.
"""

from collections.abc import Sequence as Seq

from .paged_attention import BlockTable
from .prefix_cache import TokenBlocks
from .sequence import PagedSequence
from .sliding_window import WindowedTable, first_block, first_visible


class WindowedPrefixSharing:
    def first_needed(self, group: int, num_blocks: int) -> int:
        window = self._groups[group].window
        position = 0 if window is None else first_visible(num_blocks * self.block_size, window)
        return position // self.block_size

    def longest_hit(self, streams: Seq[TokenBlocks], first: int, stop: int) -> int:
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
        if hit == first:
            return
        needed = max(first, self.first_needed(group, hit))
        if needed > first:
            assert isinstance(table, WindowedTable)
            self.released(table.skip_to(needed * self.block_size))
        for block in self.cache.match(stream, needed, hit):
            self.cache.share(table, block, self.block_size)

    def adopt(self, sequence: PagedSequence) -> None:
        first = sequence.num_computed // self.block_size
        stop = sequence.num_shareable // self.block_size
        if first >= stop or not self._may_share(sequence):
            return
        streams = [sequence.stream_of(group, stop) for group in range(len(self._groups))]
        hit = self.longest_hit(streams, first, stop)
        for group, (table, stream) in enumerate(zip(sequence.tables, streams, strict=True)):
            self.share_hit(group, table, stream, first, hit)
        sequence.add_shared_tokens((hit - first) * self.block_size)

    def keep(self, sequence: PagedSequence, start: int) -> None:
        first, stop = start // self.block_size, sequence.num_computed // self.block_size
        if first >= stop:
            return
        for group, table in enumerate(sequence.tables):
            begin = first_block(table)
            stream = sequence.stream_of(group, stop).tail(begin)
            self.cache.keep(table, stream, max(0, first - begin), stop - begin)
