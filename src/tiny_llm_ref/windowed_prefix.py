"""Prefix caching where layers see differently far: a hit needs, of each layer, only what can still be seen.

Layers that see everything need every block of the prefix; a windowed layer needs the blocks in reach of the
first token that is left to compute, and never asks for those before. A prefix counts as found where all
groups of layers have what they need of it. Source: vLLM's hybrid KV cache.
"""

from collections.abc import Sequence as Seq

from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator
from .prefix_sharing import LEAST_WORTH_COPYING, PrefixSharing
from .sequence import PagedSequence
from .sliding_window import WindowedTable, first_block, first_visible


class WindowedPrefixSharing(PrefixSharing):
    """Shares prefixes group by group, of groups of layers that each have a table and a stream.

    The streams differ from their first hash on, so that one cache holds the blocks of all groups, and gives
    them up in one order.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, groups: Seq[LayerGroup]) -> None:
        super().__init__(allocator, block_size)
        self._groups = groups

    def adopt(self, sequence: PagedSequence) -> None:
        """At a block's edge: share the longest prefix of kept blocks that all groups can go on from.

        As `PrefixSharing.adopt`. Where the first block in reach lies behind what a windowed table has, the
        table skips to it, and `released` is told what it held.
        """
        size = self.block_size
        first, stop = sequence.num_computed // size, sequence.num_shareable // size
        if first >= stop or not self._may_share(sequence):
            return
        stop = self.longest_hit(sequence, first, stop)
        if stop == first:
            return
        for index, table in enumerate(sequence.tables):
            start = max(first, self.first_needed(index, stop))
            if start > first and isinstance(table, WindowedTable):
                self.released(table.skip_to(start * size))
            for block in self.cache.match(sequence.stream_of(index, stop), start, stop):
                self.cache.share(table, block, size)
        sequence.note_shared((stop - first) * size)

    def longest_hit(self, sequence: PagedSequence, first: int, stop: int) -> int:
        """The largest n from `first` to `stop` such that every group has kept what blocks n and later need.

        That is, of the blocks first .. n - 1, those from `first_needed(index, n)` on. A group that lacks one
        of them allows no n behind it that needs it too, so n falls to the missing block, and all are asked
        again.
        """
        index = 0
        while index < len(self._groups):
            start = max(first, self.first_needed(index, stop))
            found = self.cache.match(sequence.stream_of(index, stop), start, stop)
            missing = start + len(found)
            index = 0 if missing < stop else index + 1
            stop = missing
        return stop

    def first_needed(self, index: int, num_blocks: int) -> int:
        """The first block that a group needs to go on after `num_blocks`; 0 where it sees everything."""
        window = self._groups[index].window
        if window is None:
            return 0
        return first_visible(num_blocks * self.block_size, window) // self.block_size

    def adopt_part(self, sequence: PagedSequence) -> None:
        """At a block's edge: share the beginning of one block more, in every group."""
        size, start = self.block_size, sequence.num_computed
        known = min(sequence.num_shareable - start, size)
        if known < LEAST_WORTH_COPYING or not self._may_share(sequence):
            return
        tokens = sequence.tokens(start, start + known)
        parents = [
            sequence.stream_of(index, start // size).parent(start // size)
            for index in range(len(self._groups))
        ]
        matches = [self.cache.match_part(parent, tokens) for parent in parents]
        length = min(0 if match is None else match.length for match in matches)
        if length >= LEAST_WORTH_COPYING:
            for table, match in zip(sequence.tables, matches, strict=True):
                assert match is not None
                self.cache.share(table, match.block, length)
            sequence.note_shared(length)

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had `start` tokens computed, group by group.

        A table's blocks count from its first one on, and a stream's from the text's. What a table has no
        more, or never had, is not kept.
        """
        first, stop = start // self.block_size, sequence.num_computed // self.block_size
        if first == stop:
            return
        for index, table in enumerate(sequence.tables):
            begin = first_block(table)
            stream = sequence.stream_of(index, stop).tail(begin)
            self.cache.keep(table, stream, max(0, first - begin), stop - begin)

    def _may_share(self, sequence: PagedSequence) -> bool:
        """As for one table, and behind kept blocks in each."""
        behind_kept = all(not table.blocks or table.blocks[-1] in self.cache for table in sequence.tables)
        return behind_kept and super()._may_share(sequence)
