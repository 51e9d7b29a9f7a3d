"""Swap: blocks by their positions in the text, instead of slices of the tables."""

from collections.abc import Mapping

from .sequence import PagedSequence, Swapped, SwappedTable
from .sliding_window import WindowedTable, first_block
from .swap import HostBlock, SwapCopy


class SwapSpace:
    """The exercises only."""

    def hold(self, sequence: PagedSequence, index: int, place: int) -> HostBlock | None:
        """The host block that is there, or a free one."""
        there = self._find(sequence, index, place)
        if there is None and self.allocator.num_free == 0:
            return None
        if there is None:
            return HostBlock(self._take(sequence, index, place), True)
        self.allocator.add_ref(there)
        return HostBlock(there, False)

    def release(self, tables: list[SwappedTable]) -> None:
        """The last holder takes the hash away."""
        for table in tables:
            for block in table.host_blocks:
                is_last = self.allocator.ref_count(block) == 1
                self.allocator.free(block)
                digest = self._hash_of.get(block)
                if is_last and digest is not None:
                    self._hash_of.pop(block)
                    self._held.pop(digest)

    def swap_out(
        self, sequence: PagedSequence, filled_from: Mapping[int, int] | None = None
    ) -> list[SwapCopy] | None:
        """Block after block of the text, table after table."""
        sources, done, copies = dict(filled_from or {}), [], []
        stop = (sequence.num_computed + self.block_size - 1) // self.block_size
        for index, table in enumerate(sequence.tables):
            begin, blocks = first_block(table), []
            done.append(SwappedTable(begin, blocks))
            for place in range(begin, stop):
                got = self.hold(sequence, index, place)
                if got is None:
                    self.release(done)
                    return None
                blocks.append(got.block)
                own = table.blocks[place - begin]
                copies += [SwapCopy(sources.get(own, own), got.block)] if got.is_new else []
        sequence.swapped = Swapped(done, sequence.num_computed, sequence.num_cached_tokens)
        return copies

    def blocks_to_swap_in(self, sequence: PagedSequence) -> int:
        """Those that begin at or behind the computed tokens."""
        return sum(
            (table.first + number) * self.block_size >= sequence.num_computed
            for table in sequence.swapped.tables
            for number in range(len(table.host_blocks))
        )

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> list[SwapCopy]:
        """The host blocks that begin at or behind the computed tokens, one after the other."""
        known, was, here = at_hand or {}, sequence.swapped, sequence.num_computed
        copies = []
        for table, kept in zip(sequence.tables, was.tables, strict=True):
            if isinstance(table, WindowedTable) and kept.first * self.block_size > here:
                table.skip_to(kept.first * self.block_size)
            for offset, host_block in enumerate(kept.host_blocks):
                position = (kept.first + offset) * self.block_size
                if position < here:
                    continue
                tokens, digest = (
                    min(self.block_size, was.num_computed - position),
                    self._hash_of.get(host_block),
                )
                if digest is not None and digest in known:
                    table.share_block(known[digest], tokens)
                else:
                    table.append_tokens(tokens)
                    copies.append(SwapCopy(table.blocks[-1], host_block))
        sequence.num_computed = was.num_computed
        sequence.num_cached_tokens = was.num_cached_tokens
        return copies
