"""Preemption by swap: a sequence's computed blocks are copied to the host, and back when it runs again.

Copies blocks instead of computing them again. Full host blocks are found by their content, so what several
sequences share is on the host once. Plain bookkeeping over ints: copies are planned here, and the pools make
them. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Mapping

from .sequence import PagedSequence, Swapped, SwappedTable
from .sliding_window import WindowedTable, first_block


class SwapSpace:
    def hold(self, sequence: PagedSequence, index: int, place: int) -> HostBlock | None:
        """Take a reference to a host block for one block of a sequence; None, unchanged, where none is free.

        index: which of the sequence's tables. place: which block of its text, counted from 0, whatever the
        table begins with. `_find` gives the host block that has the same content already, if there is one:
        add a reference to it; no free block is needed, and no copy. Otherwise `_take` allocates a free one,
        which must exist.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> [space.hold(manager.sequence("a"), 0, 0).is_new for _ in range(2)]
        [True, False]
        """
        found = self._find(sequence, index, place)
        if found is not None:
            self.allocator.add_ref(found)
            return HostBlock(found, is_new=False)
        if self.allocator.num_free == 0:
            return None
        return HostBlock(self._take(sequence, index, place), is_new=True)

    def release(self, tables: list[SwappedTable]) -> None:
        """Give back one reference to every host block of these tables.

        A block with no holder left is free, and will get other content: if it was full, its hash must no
        longer lead to it, so take it out of `_hash_of` and the hash out of `_held`. A block that another
        sequence still holds stays in both.

        >>> space = SwapSpace(num_blocks=8, block_size=4)
        >>> host_block = space.allocator.allocate()
        >>> space.release([SwappedTable(first=0, host_blocks=[host_block])])
        >>> space.allocator.num_free
        8
        """
        for table in tables:
            for block in table.host_blocks:
                self.allocator.free(block)
                if self.allocator.ref_count(block) == 0 and block in self._hash_of:
                    del self._held[self._hash_of.pop(block)]

    def swap_out(
        self, sequence: PagedSequence, filled_from: Mapping[int, int] | None = None
    ) -> list[SwapCopy] | None:
        """Hold host blocks for what a sequence has computed; the copies to make before the pool is written.

        Every block with a computed token is held (`hold`), in every table, in the order of the text; the last
        one may be partly filled. A table may have blocks beyond these, for tokens that are not computed yet:
        leave them out. A windowed table begins with block `first_block(table)` of the text: that one is
        `table.blocks[0]`. Only new host blocks need a copy.

        Afterwards `sequence.swapped` has a `SwappedTable` for each table, and the sequence's `num_computed`
        and `num_cached_tokens`. The sequence itself keeps its tables. Where the host has no block left, all
        that was held for this call is released, nothing has changed, and the result is None.

        filled_from: blocks of the pool that still wait for a copy on write, each with the block that it will
        be copied from: until then the content is there, so that is the block to copy.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> space.swap_out(manager.sequence("a"))
        [SwapCopy(block=0, host_block=0), SwapCopy(block=1, host_block=1)]
        """
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
        """Blocks of the pool that `swap_in` would take for a swapped sequence, if none are at hand.

        The sequence may have found its first tokens in the prefix cache by now: they are computed
        (`num_computed`, a multiple of the block size), and their blocks need no copy. The sum over all tables
        of the host blocks behind those tokens. `host_blocks[0]` is block `first` of the text: if the tokens
        found end before that, all of the table's host blocks count.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> sequence = manager.sequence("a")
        >>> _ = space.swap_out(sequence), sequence.give_up_pages()
        >>> space.blocks_to_swap_in(sequence)
        2
        """
        found = sequence.num_computed // self.block_size
        return sum(
            max(0, len(table.host_blocks) - max(0, found - table.first)) for table in sequence.swapped.tables
        )

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> list[SwapCopy]:
        """Let a sequence's tables hold what they held when it was swapped out; the copies to make at once.

        Tokens that it has found in the prefix cache (`num_computed`, a multiple of the block size) stay, and
        every table goes on behind them. Where a `WindowedTable` has its first host block later than that,
        it goes on there: `skip_to(position)` releases what it holds. From that place on, each host block
        gets a free block of the pool (`append_tokens`, then it is `table.blocks[-1]`) and a copy; the pool
        has enough of them (`blocks_to_swap_in`). The last host block may be partly filled: append only as
        many tokens as were computed.

        at_hand: full blocks of the pool by their hash. A host block with one of these hashes (`_hash_of`)
        needs no copy: the table shares the pool's block instead (`share_block`).

        Afterwards `num_computed` and `num_cached_tokens` are as they were when the sequence was swapped out.
        The host blocks stay the sequence's until `forget`: it may lose its blocks again before the copies
        are made.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> sequence = manager.sequence("a")
        >>> _ = space.swap_out(sequence), sequence.give_up_pages()
        >>> [copy.host_block for copy in space.swap_in(sequence)], sequence.num_computed
        ([0, 1], 5)
        """
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
