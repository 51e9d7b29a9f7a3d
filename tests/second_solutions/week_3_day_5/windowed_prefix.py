"""Prefix caching for layers that see differently far: a hit needs only the blocks that can still be seen.

Layers that see everything need every block of the prefix. A windowed layer needs the blocks in reach of the
first token that is left to compute, and none before. A prefix is found if every group of layers has the
blocks that it needs of it. Source: vLLM's hybrid KV cache.
"""

from collections.abc import Sequence as Seq

from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator, BlockTable
from .prefix_cache import TokenBlocks
from .prefix_sharing import LEAST_WORTH_COPYING, PrefixSharing
from .sequence import PagedSequence
from .sliding_window import WindowedTable, first_block


class WindowedPrefixSharing(PrefixSharing):
    """Shares prefixes for groups of layers: in each sequence a group has a table and a stream of its own.

    The streams differ from their first hash on, so one cache holds the blocks of all groups and evicts them
    in one order. `_groups[i]` goes with `sequence.tables[i]` and `sequence.stream_of(i, n)`.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, groups: Seq[LayerGroup]) -> None:
        super().__init__(allocator, block_size)
        self._groups = groups

    def first_needed(self, group: int, num_blocks: int) -> int:
        """The positions out of sight, in whole blocks."""
        window = self._groups[group].window
        out_of_sight = 0 if window is None else num_blocks * self.block_size + 1 - window
        return max(out_of_sight, 0) // self.block_size

    def longest_hit(self, streams: Seq[TokenBlocks], first: int, stop: int) -> int:
        """Every length from the largest down, each asked of all groups."""
        for length in range(stop, first, -1):
            starts = [max(first, self.first_needed(group, length)) for group in range(len(streams))]
            if all(
                len(self.cache.match(stream, start, length)) == length - start
                for stream, start in zip(streams, starts, strict=True)
            ):
                return length
        return first

    def share_hit(self, group: int, table: BlockTable, stream: TokenBlocks, first: int, hit: int) -> None:
        """A skip before the first block that is shared."""
        needed = self.first_needed(group, hit)
        if needed > first and isinstance(table, WindowedTable):
            gone = table.skip_to(needed * self.block_size)
            self.cache.released(gone)
            first = needed
        found = self.cache.match(stream, first, hit)
        while found:
            self.cache.share(table, found.pop(0), self.block_size)

    def adopt(self, sequence: PagedSequence) -> None:
        """Returns early from whatever leaves nothing to share."""
        first = sequence.num_computed // self.block_size
        stop = sequence.num_shareable // self.block_size
        if not self._may_share(sequence) or stop <= first:
            return
        streams = [sequence.stream_of(group, stop) for group, _ in enumerate(sequence.tables)]
        hit = self.longest_hit(streams, first, stop)
        if hit > first:
            for group, table in enumerate(sequence.tables):
                self.share_hit(group, table, streams[group], first, hit)
            sequence.note_shared(hit * self.block_size - sequence.num_computed)

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Block by block, in the table's places."""
        stop = sequence.num_computed // self.block_size
        for group, table in enumerate(sequence.tables):
            before = first_block(table)
            for index in range(max(start // self.block_size, before), stop):
                tail = sequence.stream_of(group, stop).tail(before)
                self.cache.keep(table, tail, index - before, index - before + 1)

    def adopt_part(self, sequence: PagedSequence) -> None:
        """Share the beginning of one more block in every group, if its next tokens differ."""
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

    def _may_share(self, sequence: PagedSequence) -> bool:
        """Return whether a sequence may share now: as in `PrefixSharing`, for every table."""
        behind_kept = all(not table.blocks or table.blocks[-1] in self.cache for table in sequence.tables)
        return behind_kept and super()._may_share(sequence)
