"""Pages for keys and values: how many holders each block has, and which blocks a sequence's tokens are in.

A block is a place for the keys and values of `block_size` tokens; this module knows only its id. A holder
is a block table or the prefix cache. Plain bookkeeping over ints, no arrays. Knows nothing of tokens' values,
of the pool's arrays, or of the prefix cache. Source: Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention" (SOSP 2023).
"""

from .errors import OutOfBlocksError


class BlockAllocator:
    def allocate(self) -> int:
        """Take a free block, any of them, and return its id; its count becomes 1: the caller is its holder.

        Raises `OutOfBlocksError`, and changes nothing, if no block is free.

        >>> allocator = BlockAllocator(num_blocks=2)
        >>> block = allocator.allocate()
        >>> allocator.ref_count(block), allocator.num_free
        (1, 1)
        """
        if not self._free:
            raise OutOfBlocksError(f"none of the {self.num_blocks} blocks is free")
        block = self._free.popleft()
        self._ref_counts[block] = 1
        return block

    def free(self, block: int) -> None:
        """Count one holder less; when the last holder frees the block, it can be allocated again.

        Raises, and changes nothing: `DoubleFreeError` if the block is free already (it would be in the queue
        twice, and get two owners), `UnknownBlockError` if it is not in this pool.

        >>> allocator = BlockAllocator(num_blocks=2)
        >>> block = allocator.allocate()
        >>> allocator.add_ref(block)  # two holders
        >>> allocator.free(block)
        >>> allocator.ref_count(block), allocator.num_free
        (1, 1)
        """
        self._ref_counts[block] = self._num_holders(block) - 1
        if self._ref_counts[block] == 0:
            self._free.append(block)


class BlockTable:
    def blocks_to_append(self, num_new_tokens: int) -> int:
        """The number of free blocks that `append_tokens(num_new_tokens)` would take. Changes nothing.

        These are the blocks for the tokens that the last block has no place for, and one more for a copy on
        write: new tokens go to the last block, and it is partly filled and has another holder too. No new
        tokens take no block. How many blocks are free does not matter here.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)  # one block is full, the other has two tokens
        >>> table.blocks_to_append(2), table.blocks_to_append(3)
        (0, 1)
        >>> _ = table.fork()  # the last block has two holders now
        >>> table.blocks_to_append(2), table.blocks_to_append(3)
        (1, 2)
        """
        if num_new_tokens == 0:
            return 0
        num_blocks = -(-(self.num_tokens + num_new_tokens) // self.block_size)
        return num_blocks - len(self.blocks) + int(self._must_copy())

    def _must_copy(self) -> bool:
        """Whether a write to the last block needs a copy first: partly filled, and not ours alone."""
        if self.num_tokens % self.block_size == 0:
            return False
        return self.allocator.ref_count(self.blocks[-1]) > 1

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        """Add places for new tokens at the end: in the last block first, then in newly allocated blocks.

        Returns the copies to make before the new tokens are written: at most one. It is a copy on write: the
        last block is partly filled and has another holder too, and a write would change that holder's tokens.
        So this table frees its reference to the shared block, has a newly allocated block in its place, and
        returns the copy from the one to the other, of the tokens that were in it before:
        `num_tokens % block_size`. A full shared block is never written to again, and so never copied. No new
        tokens change nothing.

        All or nothing: raises `OutOfBlocksError`, and changes nothing, if fewer blocks are free than
        `blocks_to_append` says.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> table.append_tokens(6), len(table.blocks)
        ([], 2)
        >>> child = table.fork()
        >>> [copy.length for copy in child.append_tokens(1)]
        [2]
        >>> child.blocks[0] == table.blocks[0], child.blocks[1] == table.blocks[1]
        (True, False)
        """
        if num_new_tokens == 0:
            return []
        needed = self.blocks_to_append(num_new_tokens)
        if needed > self.allocator.num_free:
            raise OutOfBlocksError(f"{needed} blocks are needed, {self.allocator.num_free} are free")
        copies = []
        if self._must_copy():
            src, dst = self.blocks[-1], self.allocator.allocate()
            self.allocator.free(src)
            self.blocks[-1] = dst
            copies.append(BlockCopy(src, dst, self.num_tokens % self.block_size))
            needed -= 1
        self.blocks += [self.allocator.allocate() for _ in range(needed)]
        self.num_tokens += num_new_tokens
        return copies

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of the positions start .. stop - 1, in order: `block * block_size + offset` for each.

        A slot is a token's place in the pool as one number; the ids are those in `blocks`. Equal start and
        stop give []. Raises ValueError unless 0 <= start <= stop <= num_tokens: a place without a token holds
        what another sequence left there.

        >>> table = BlockTable(BlockAllocator(num_blocks=64), block_size=4)
        >>> table.blocks, table.num_tokens = [7, 42], 6
        >>> table.slots(3, 6)
        [31, 168, 169]
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"positions {start} .. {stop} are not within the {self.num_tokens} tokens")
        size = self.block_size
        return [self.blocks[i // size] * size + i % size for i in range(start, stop)]

    def fork(self) -> "BlockTable":
        """Return a second table with the same blocks and tokens; each block counts one more holder.

        No block is taken or copied. Afterwards the two tables are independent: what one appends, the other
        never sees (`append_tokens` copies the block in which both would write).

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)
        >>> child = table.fork()
        >>> child.blocks == table.blocks, child.num_tokens, table.allocator.num_free
        (True, 6, 6)
        >>> [table.allocator.ref_count(block) for block in child.blocks]
        [2, 2]
        """
        child = BlockTable(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.add_ref(block)
        child.blocks = list(self.blocks)
        child.num_tokens = self.num_tokens
        return child

    def release(self) -> None:
        """Free this table's reference to each of its blocks, and become empty: no blocks, no tokens.

        Blocks with other holders stay theirs. Releasing again does nothing; the table can be filled again.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)
        >>> table.release()
        >>> table.blocks, table.num_tokens, table.allocator.num_free
        ([], 0, 8)
        """
        for block in self.blocks:
            self.allocator.free(block)
        self.blocks = []
        self.num_tokens = 0
