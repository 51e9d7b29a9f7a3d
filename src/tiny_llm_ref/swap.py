"""Preemption by swap: copies a sequence's computed blocks to the host, and back when it runs again.

The host is a second pool of blocks, in host memory. Copying replaces recomputing. Full host blocks are found
by their content, so blocks that several sequences share are on the host once. Plain bookkeeping over ints:
this module plans the copies, and the pools make them. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .paged_attention import BlockAllocator
from .prefix_cache import KeptBlock
from .sequence import PagedSequence, Swapped, SwappedTable
from .sliding_window import WindowedTable, first_block


class SwapCopy(NamedTuple):
    """A copy to make, in either direction, between `block` of the pool and `host_block` of the host."""

    block: int
    host_block: int


class HostBlock(NamedTuple):
    """A host block that a sequence holds. is_new: it is empty, so it must be filled by a copy."""

    block: int
    is_new: bool


class SwapSpace:
    """The blocks on the host: how many sequences hold each of them, and what the full ones contain.

    block_size: tokens in a block. allocator: counts the holders of each host block; a holder is a sequence
    that is swapped out.

    A full block is found by its hash. In a sequence's stream (`stream_of`: its tokens cut into full blocks)
    block i has the hash `hashes[i]`, which covers the tokens 0 .. (i + 1) * block_size - 1. `_held` maps a
    hash to a `KeptBlock`: the host block, its tokens, and the hash of the previous block. `_hash_of` maps the
    host block to the hash. Invariant: both dicts have the same host blocks. A block that is not full is in
    neither dict. Nor is a full block whose hash was already taken by a block of another text.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self._held: dict[bytes, KeptBlock] = {}
        self._hash_of: dict[int, bytes] = {}

    def hold(self, sequence: PagedSequence, index: int, place: int) -> HostBlock | None:
        """Take a reference to a host block for one block of a sequence; None if no block is free for it.

        index: which of the sequence's tables. place: which block of its text, counted from 0, even if the
        table starts later.

        If `_find(sequence, index, place)` returns a host block with the same content, add a reference to it:
        it is not new, and needs neither a free block nor a copy. Otherwise `_take(sequence, index, place)`
        allocates a free one, which is new. `_take` raises if none is free, so check `allocator.num_free`
        first: if it is 0, return None, with nothing changed.

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
        """Free one reference to every host block of these tables.

        A block without holders is free and will get other content. So if it is in `_hash_of`, remove it from
        there, and its hash from `_held`. (It may be in neither, for instance because it is not full.) A block
        that another sequence still holds stays in both dicts.

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
        """Hold host blocks for the computed blocks of a sequence; return the copies to make.

        The copies will be made before the pool is written again. Go through the tables in order, and in each
        through the text's blocks that have a computed token, in order; the last may be partly filled.
        `table.blocks[0]` is the text's block `first_block(table)` (not 0 if a window has passed blocks). The
        table may have more blocks at the end, for tokens that are not computed yet: leave them out. `hold`
        each block; only a new host block needs a copy.

        Then set `sequence.swapped` to a `Swapped`: a `SwappedTable` for each table, and the sequence's
        `num_computed` and `num_cached_tokens`. Do not change the sequence's tables. If `hold` returns None,
        release everything that this call has held, and return None with nothing changed.

        filled_from: `{block: source}` for blocks of the pool whose copy on write has been planned but not
        made. Their content is still in `source`, so copy that one: `SwapCopy(source, host_block)`.

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
        """Return how many blocks of the pool `swap_in(sequence)` would take, called without `at_hand`.

        The sequence may have found its first tokens in the prefix cache again. They count as computed
        (`num_computed`, a multiple of the block size), and their blocks need no copy. Sum over all tables the
        number of host blocks that come after those tokens. In a table's list, `host_blocks[0]` is block
        `first` of the text: if the found tokens end before that block, all of the table's host blocks count.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> sequence = manager.sequence("a")
        >>> _ = space.swap_out(sequence), sequence.release_pages()
        >>> space.blocks_to_swap_in(sequence)
        2
        """
        assert sequence.swapped is not None
        place = sequence.num_computed // self.block_size
        tables = sequence.swapped.tables
        return sum(len(swapped.host_blocks[max(0, place - swapped.first) :]) for swapped in tables)

    def swap_in(self, sequence: PagedSequence, at_hand: Mapping[bytes, int] | None = None) -> list[SwapCopy]:
        """Extend a sequence's tables by the blocks that were swapped out; return the copies to make.

        The caller makes the copies next. `sequence.num_computed` is the number of tokens that the sequence
        has found in the prefix cache since then: call it `found`; it is a multiple of the block size.
        `sequence.swapped.num_computed` is the number when it was swapped out: call it `old`. For each table:

        1. Find the block of the text, `place`, at which the table continues: the first one after the `found`
           tokens, or the `SwappedTable`'s `first` if that is later. If it is later, the table is a
           `WindowedTable` and no longer needs the blocks it holds: call
           `table.skip_to(first * block_size)`, even if it has no host blocks. (Ignore the returned blocks:
           the caller compares the blocks before and after.)
        2. For each host block from `place` on, in order (`host_blocks[0]` is block `first` of the text), add
           a block to the table with `append_tokens`, and plan a `SwapCopy` to it; it is `table.blocks[-1]`.
           Append `block_size` tokens; but the last host block may be partly filled, so at most
           old - (this block's index in the text) * block_size. The caller has made sure that enough blocks
           are free (`blocks_to_swap_in`).

        Example: blocks of 4 tokens, old = 18, and a windowed table has blocks 3 and 4 on the host. If 8
        tokens were found, the table skips to position 12 and continues at block 3. If 12 or 16 were found, it
        skips nothing, and continues at block 3 or 4. Block 4 gets 2 tokens.

        at_hand: full blocks of the pool by their hash, held by other sequences of the same request. If a host
        block has one of these hashes (`_hash_of`), do not copy it: share the pool's block with
        `table.share_block`, with as many tokens. (Hashes suffice here: a client that found two texts with one
        hash would harm only its own request.)

        At the end, after all tables, set `num_computed` and `num_cached_tokens` to the old numbers of
        `sequence.swapped`. Do not release the host blocks: the caller calls `forget` when the copies are
        made, because until then the sequence may be preempted again.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager, space = PagedBatchManager(8, 4, 2), SwapSpace(num_blocks=8, block_size=4)
        >>> _ = manager.add_request([1, 2, 3, 4, 5], "a"), manager.process_batch()
        >>> sequence = manager.sequence("a")
        >>> _ = space.swap_out(sequence), sequence.release_pages()
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
        """Release the host blocks, if any, of a sequence that is in the pool again or has ended."""
        if sequence.swapped is not None:
            self.release(sequence.swapped.tables)
            sequence.swapped = None

    def _find(self, sequence: PagedSequence, index: int, place: int) -> int | None:
        """Return the host block with the same content (the same tokens after the same text, in this table).

        None if there is none, or if the block is not full. `is_block` compares tokens and parent, because two
        texts could have the same hash.
        """
        if (place + 1) * self.block_size > sequence.num_computed:
            return None
        stream = sequence.stream_of(index, place + 1)
        held = self._held.get(stream.hashes[place])
        return None if held is None or not held.is_block(stream, place) else held.block

    def _take(self, sequence: PagedSequence, index: int, place: int) -> int:
        """Allocate a host block for a block of a sequence; `_find` finds it from now on if it is full.

        But if the block's hash is in `_held` already, that entry stays, and `_find` does not find the new
        block. Raises `OutOfBlocksError` if no host block is free.
        """
        host_block = self.allocator.allocate()
        if (place + 1) * self.block_size <= sequence.num_computed:
            stream = sequence.stream_of(index, place + 1)
            digest = stream.hashes[place]
            if digest not in self._held:
                self._held[digest] = KeptBlock(host_block, stream.tokens[place], stream.parent(place))
                self._hash_of[host_block] = digest
        return host_block
