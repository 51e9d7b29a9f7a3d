"""Preemption by swap: copies a sequence's computed blocks to the host, and back when it runs again.

The host is a second pool of blocks, in host memory. Copying replaces recomputing. Full host blocks are found
by their content, so blocks that several sequences share are on the host once. Plain bookkeeping over ints:
this module plans the copies, and the pools make them. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Mapping

from .sequence import PagedSequence, Swapped, SwappedTable
from .sliding_window import WindowedTable, first_block


class SwapSpace:
    def hold(self, sequence: PagedSequence, index: int, place: int) -> HostBlock | None:
        found = self._find(sequence, index, place)
        if found is not None:
            self.allocator.add_ref(found)
            return HostBlock(found, is_new=False)
        if self.allocator.num_free == 0:
            return None
        return HostBlock(self._take(sequence, index, place), is_new=True)

    def release(self, tables: list[SwappedTable]) -> None:
        for table in tables:
            for block in table.host_blocks:
                self.allocator.free(block)
                if self.allocator.ref_count(block) == 0 and block in self._hash_of:
                    del self._held[self._hash_of.pop(block)]

    def swap_out(
        self, sequence: PagedSequence, filled_from: Mapping[int, int] | None = None
    ) -> list[SwapCopy] | None:
        filled_from = filled_from or {}
        num_blocks = -(-sequence.num_computed // self.block_size)
        tables: list[SwappedTable] = []
        copies: list[SwapCopy] = []
        for index, table in enumerate(sequence.tables):
            first = first_block(table)
            tables.append(SwappedTable(first, []))
            for place in range(first, num_blocks):
                held = self.hold(sequence, index, place)
                if held is None:
                    self.release(tables)
                    return None
                tables[-1].host_blocks.append(held.block)
                if held.is_new:
                    block = table.blocks[place - first]
                    copies.append(SwapCopy(filled_from.get(block, block), held.block))
        sequence.swapped = Swapped(tables, sequence.num_computed, sequence.num_cached_tokens)
        return copies

    def blocks_to_swap_in(self, sequence: PagedSequence) -> int:
        found = sequence.num_computed // self.block_size
        return sum(
            max(0, len(table.host_blocks) - max(0, found - table.first)) for table in sequence.swapped.tables
        )

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> list[SwapCopy]:
        at_hand = at_hand or {}
        swapped = sequence.swapped
        found = sequence.num_computed // self.block_size
        copies = []
        for table, (first, host_blocks) in zip(sequence.tables, swapped.tables, strict=True):
            if isinstance(table, WindowedTable) and first > found:
                table.skip_to(first * self.block_size)
            start = max(first, found)
            for place, host_block in enumerate(host_blocks[start - first :], start):
                length = min(self.block_size, swapped.num_computed - place * self.block_size)
                digest = self._hash_of.get(host_block)
                if digest in at_hand:
                    table.share_block(at_hand[digest], length)
                else:
                    table.append_tokens(length)
                    copies.append(SwapCopy(table.blocks[-1], host_block))
        sequence.num_computed = swapped.num_computed
        sequence.num_cached_tokens = swapped.num_cached_tokens
        return copies
