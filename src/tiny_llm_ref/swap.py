"""Preemption by swap: what a sequence has computed waits in blocks on the host, and comes back as it was.

Copies blocks instead of computing them again. Full blocks are known by what they hold, so that what sequences
share is on the host once, however many of them wait there. Plain bookkeeping over ints: copies are planned
here, and the pools make them. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .paged_attention import BlockAllocator
from .prefix_cache import KeptBlock
from .sequence import PagedSequence, Swapped, SwappedTable
from .sliding_window import WindowedTable, first_block


class SwapCopy(NamedTuple):
    """A block's way, out or in: `block` of the pool and `host_block` of the swap space."""

    block: int
    host_block: int


class SwapSpace:
    """Blocks on the host, and what is in the full ones.

    Invariant: the allocator counts a host block once for each sequence that waits for it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self._held: dict[bytes, KeptBlock] = {}  # every full block, by its hash
        self._hash_of: dict[int, bytes] = {}  # and the other way round

    def swap_out(
        self, sequence: PagedSequence, filled_from: Mapping[int, int] | None = None
    ) -> list[SwapCopy] | None:
        """Take host blocks for what a sequence has computed, and note them in `sequence.swapped`.

        Returns the copies to make before the pool is written to again; a full block whose tokens are on the
        host already is held once more, and not copied. The sequence keeps its tables. None, and nothing
        changed, where the host runs out of blocks. filled_from: blocks that wait for a copy on write, and its
        source.
        """
        filled_from, tables, copies = filled_from or {}, [], []
        num_blocks = -(-sequence.num_computed // self.block_size)
        for index, table in enumerate(sequence.tables):
            first = first_block(table)
            swapped = SwappedTable(first, [])
            tables.append(swapped)
            for place in range(first, num_blocks):
                host_block = self._find(sequence, index, place)
                if host_block is not None:
                    self.allocator.add_ref(host_block)
                elif self.allocator.num_free:
                    host_block = self._take(sequence, index, place)
                    block = table.blocks[place - first]
                    copies.append(SwapCopy(filled_from.get(block, block), host_block))
                else:
                    self._give_back(tables)
                    return None
                swapped.host_blocks.append(host_block)
        sequence.swapped = Swapped(tables, sequence.num_computed, sequence.num_cached_tokens)
        return copies

    def blocks_to_swap_in(self, sequence: PagedSequence) -> int:
        """Blocks that `swap_in` would take from the pool, if none are at hand."""
        assert sequence.swapped is not None
        place = sequence.num_computed // self.block_size
        tables = sequence.swapped.tables
        return sum(len(swapped.host_blocks[max(0, place - swapped.first) :]) for swapped in tables)

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> list[SwapCopy]:
        """Let a sequence's tables hold what they held when it was swapped out; the copies to make at once.

        What they hold already, up to a block's edge, stays. at_hand: full blocks of the pool by their hash,
        which are shared and not copied. The blocks that are taken must be free. The host blocks stay the
        sequence's until `forget`, so that it can be swapped out again before the copies are made.
        """
        assert sequence.swapped is not None
        at_hand, copies = at_hand or {}, []
        tables, num_computed, num_cached_tokens = sequence.swapped
        for table, swapped in zip(sequence.tables, tables, strict=True):
            place = max(sequence.num_computed // self.block_size, swapped.first)
            if isinstance(table, WindowedTable) and place * self.block_size > sequence.num_computed:
                table.skip_to(place * self.block_size)
            for host_block in swapped.host_blocks[place - swapped.first :]:
                length = min(self.block_size, num_computed - place * self.block_size)
                block = at_hand.get(self._hash_of.get(host_block, b""))
                if block is None:
                    table.append_tokens(length)
                    copies.append(SwapCopy(table.blocks[-1], host_block))
                else:
                    table.share_block(block, length)
                place += 1
        sequence.num_computed, sequence.num_cached_tokens = num_computed, num_cached_tokens
        return copies

    def forget(self, sequence: PagedSequence) -> None:
        """Give back the host blocks of a sequence that is in the pool again, or has ended."""
        if sequence.swapped is not None:
            self._give_back(sequence.swapped.tables)
            sequence.swapped = None

    def _find(self, sequence: PagedSequence, table: int, place: int) -> int | None:
        """The host block with the same tokens and the same before them; None for a block that is not full."""
        if (place + 1) * self.block_size > sequence.num_computed:
            return None
        stream = sequence.stream_of(table, place + 1)
        held = self._held.get(stream.hashes[place])
        return None if held is None or not held.is_block(stream, place) else held.block

    def _take(self, sequence: PagedSequence, table: int, place: int) -> int:
        """A free host block, which is found from now on if it is to be full."""
        host_block = self.allocator.allocate()
        if (place + 1) * self.block_size <= sequence.num_computed:
            stream = sequence.stream_of(table, place + 1)
            digest = stream.hashes[place]
            if digest not in self._held:
                self._held[digest] = KeptBlock(host_block, stream.tokens[place], stream.parent(place))
                self._hash_of[host_block] = digest
        return host_block

    def _give_back(self, tables: list[SwappedTable]) -> None:
        for host_block in (block for table in tables for block in table.host_blocks):
            self.allocator.free(host_block)
            if self.allocator.ref_count(host_block) == 0 and host_block in self._hash_of:
                del self._held[self._hash_of.pop(host_block)]
