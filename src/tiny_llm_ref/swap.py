"""Preemption by swap: a sequence's computed blocks are copied to the host, and back when it runs again.

Copies blocks instead of computing them again. Full host blocks are found by their content, so what several
sequences share is on the host once. Plain bookkeeping over ints: copies are planned here, and the pools make
them. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .paged_attention import BlockAllocator
from .prefix_cache import KeptBlock
from .sequence import PagedSequence, Swapped, SwappedTable
from .sliding_window import WindowedTable, first_block


class SwapCopy(NamedTuple):
    """A copy to make, out or in, between `block` of the pool and `host_block` of the swap space."""

    block: int
    host_block: int


class HostBlock(NamedTuple):
    """A host block that a sequence holds. is_new: nothing is in it yet, so it needs a copy."""

    block: int
    is_new: bool


class SwapSpace:
    """The blocks on the host: which sequences hold them, and what the full ones contain.

    block_size: tokens in a block. allocator: counts the holders of each host block; one for each sequence
    that waits for it. The content of a full block is found by its hash: in a sequence's stream
    (`stream_of`: its tokens cut into full blocks) block i has the hash `hashes[i]`, which stands for the
    tokens 0 .. (i + 1) * block_size - 1.

    `_held` has a `KeptBlock` by its hash: a host block, its tokens, and the hash of the block before, which
    `is_block` compares with a stream's. `_hash_of` has that hash by the host block. Invariant: both have the
    same host blocks. They are full, but not every full block is among them: if a block of another text has
    the same hash already, the later one is in neither. Nor is a block that is not full.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self._held: dict[bytes, KeptBlock] = {}
        self._hash_of: dict[int, bytes] = {}

    def hold(self, sequence: PagedSequence, index: int, place: int) -> HostBlock | None:
        """Take a reference to a host block for one block of a sequence; None, unchanged, where none is free.

        index: which of the sequence's tables. place: which block of its text, counted from 0, whatever the
        table begins with. `_find` gives the host block that has the same content already, if there is one:
        add a reference to it; no free block is needed, and no copy. Otherwise `_take` allocates a free one;
        it raises where there is none, so look at `allocator.num_free` before.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> [space.hold(manager.sequence("a"), 0, 0).is_new for _ in range(2)]
        [True, False]
        """
        host_block = self._find(sequence, index, place)
        if host_block is not None:
            self.allocator.add_ref(host_block)
            return HostBlock(host_block, is_new=False)
        if not self.allocator.num_free:
            return None
        return HostBlock(self._take(sequence, index, place), is_new=True)

    def release(self, tables: list[SwappedTable]) -> None:
        """Give back one reference to every host block of these tables.

        A block with no holder left is free, and will get other content: if it is in `_hash_of`, its hash must
        no longer lead to it, so take it out of `_hash_of` and the hash out of `_held`. Not every full block
        is there: if a block of another text had the same hash first, only that one is, and it stays found. A
        block that another sequence still holds stays in both.

        >>> space = SwapSpace(num_blocks=8, block_size=4)
        >>> host_block = space.allocator.allocate()
        >>> space.release([SwappedTable(first=0, host_blocks=[host_block])])
        >>> space.allocator.num_free
        8
        """
        for host_block in (block for table in tables for block in table.host_blocks):
            self.allocator.free(host_block)
            if self.allocator.ref_count(host_block) == 0 and host_block in self._hash_of:
                del self._held[self._hash_of.pop(host_block)]

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
        be copied from, `{block: source}`. Until then the content is still in the block it is copied from, so
        copy that one: `SwapCopy(source, host_block)`.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> space.swap_out(manager.sequence("a"))
        [SwapCopy(block=0, host_block=0), SwapCopy(block=1, host_block=1)]
        """
        filled_from, tables, copies = filled_from or {}, [], []
        num_blocks = -(-sequence.num_computed // self.block_size)
        for index, table in enumerate(sequence.tables):
            first = first_block(table)
            swapped = SwappedTable(first, [])
            tables.append(swapped)
            for place in range(first, num_blocks):
                held = self.hold(sequence, index, place)
                if held is None:
                    self.release(tables)
                    return None
                if held.is_new:
                    block = table.blocks[place - first]
                    copies.append(SwapCopy(filled_from.get(block, block), held.block))
                swapped.host_blocks.append(held.block)
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
        assert sequence.swapped is not None
        place = sequence.num_computed // self.block_size
        tables = sequence.swapped.tables
        return sum(len(swapped.host_blocks[max(0, place - swapped.first) :]) for swapped in tables)

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> list[SwapCopy]:
        """Let a sequence's tables hold what they held when it was swapped out; the copies to make at once.

        Two numbers count computed tokens. `sequence.num_computed` is today's, a multiple of the block size:
        the tokens that it has found in the prefix cache since. `sequence.swapped.num_computed` is the old
        one, of when it was swapped out.

        For each table: the tokens found stay, and the table goes on behind them, at block `place` of the
        text. If the `first` of a `WindowedTable` lies behind those tokens, call
        `table.skip_to(first * block_size)` before, and go on at `first`: what the table holds by then is no
        longer visible. (Ignore what it returns: the caller compares the blocks before and after.) Of 18
        tokens, in blocks of 4, a windowed table has blocks 3 and 4 on the host. If 8 tokens were found, it
        holds their two blocks, skips to position 12, and goes on at block 3; if 12 or 16 were found, it skips
        nothing, and goes on at block 3 or 4.

        From there on each host block, in order, gets a free block of the pool and a copy: `append_tokens`
        takes that block, which is `table.blocks[-1]` then, and the pool has enough (`blocks_to_swap_in`).
        Append `block_size` tokens for each; the last host block may be partly filled, so never more than the
        old `num_computed - place * block_size`, where `place` is that block's. In the example block 4 has 2
        tokens. A windowed table may have no `host_blocks` at all, because the next token saw none of its
        blocks: it skips to its `first` all the same.

        at_hand: full blocks of the pool by their hash, of the request's other sequences: a client that found
        two texts with one hash would deceive only itself. A host block with one of these hashes (`_hash_of`)
        needs no copy: the table shares the pool's block instead (`share_block`, with as many tokens).

        Afterwards both numbers, `num_computed` and `num_cached_tokens`, are the old ones. Every table starts
        from today's `num_computed`, so change it last. The host blocks stay the sequence's until `forget`: it
        may lose its blocks again before the copies are made.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> sequence = manager.sequence("a")
        >>> _ = space.swap_out(sequence), sequence.give_up_pages()
        >>> [copy.host_block for copy in space.swap_in(sequence)], sequence.num_computed
        ([0, 1], 5)
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
        """Release the host blocks of a sequence that is in the pool again, or has ended; if it has any."""
        if sequence.swapped is not None:
            self.release(sequence.swapped.tables)
            sequence.swapped = None

    def _find(self, sequence: PagedSequence, index: int, place: int) -> int | None:
        """The host block with the same content: the same tokens after the same text, in the same table.

        None where there is none, and for a block that is not full. A stream is a table's tokens, cut into
        full blocks; `stream_of` cuts as many as are asked for. `is_block` compares tokens and parent, so that
        two texts with the same hash would not be mixed up.
        """
        if (place + 1) * self.block_size > sequence.num_computed:
            return None
        stream = sequence.stream_of(index, place + 1)
        held = self._held.get(stream.hashes[place])
        return None if held is None or not held.is_block(stream, place) else held.block

    def _take(self, sequence: PagedSequence, index: int, place: int) -> int:
        """Allocate a host block, one of which must be free; `_find` finds it from now on if it is full.

        Where its hash has a block in `_held` already, that one stays, and the new block is not found. A
        `KeptBlock` is the block, its tokens, and its parent: the hash of the block before.
        """
        host_block = self.allocator.allocate()
        if (place + 1) * self.block_size <= sequence.num_computed:
            stream = sequence.stream_of(index, place + 1)
            digest = stream.hashes[place]
            if digest not in self._held:
                self._held[digest] = KeptBlock(host_block, stream.tokens[place], stream.parent(place))
                self._hash_of[host_block] = digest
        return host_block
