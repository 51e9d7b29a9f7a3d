"""Pages for keys and values: how many holders each page has, and which pages a sequence uses.

The pages are called blocks here. A block has places for the keys and values of `block_size` tokens; this
module knows only its id. A holder is a block table or the prefix cache (day 3.4). Plain bookkeeping over
ints, no arrays. Knows nothing of the tokens, of the pool's arrays, or of the prefix cache. Source: Kwon et
al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from .errors import DoubleFreeError, OutOfBlocksError, UnknownBlockError


class BlockCopy(NamedTuple):
    """A copy of the first `length` tokens of block `src` to `dst`; make it before new tokens are written."""

    src: int
    dst: int
    length: int


class BlockAllocator:
    """Hands out the block ids 0 .. num_blocks - 1 and counts the holders of each block.

    num_blocks: blocks in the pool, free or not.

    `_free` is a queue of the free ids, and `_ref_counts[block]` is the number of a block's holders.
    Invariant: a block is in `_free` exactly when its count is 0, so free blocks + blocks with a positive
    count = num_blocks. A queue makes `allocate` and `free` O(1) in a pool of any size: neither searches.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return len(self._free)

    def ref_count(self, block: int) -> int:
        """The number of holders of `block`; 0 if it is free.

        Raises `UnknownBlockError` for an id that is not in this pool, such as -1 or `num_blocks`.
        """
        self._check_known(block)
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Take any free block and return its id; its count becomes 1, because the caller now holds it.

        Raises `OutOfBlocksError`, and changes nothing, if no block is free.

        >>> allocator = BlockAllocator(num_blocks=2)
        >>> block = allocator.allocate()
        >>> allocator.ref_count(block), allocator.num_free
        (1, 1)
        """
        if not self._free:
            raise OutOfBlocksError(f"no free block: all {self.num_blocks} are held")
        block = self._free.popleft()
        self._ref_counts[block] = 1
        return block

    def add_ref(self, block: int) -> None:
        """Count one more holder of a block that has at least one; sharing takes no free block.

        Raises, and changes nothing: `DoubleFreeError` if the block is free (it has no holder to share it
        with, and the next `allocate` may return it), `UnknownBlockError` if it is not in this pool.
        """
        self._ref_counts[block] = self._num_holders(block) + 1

    def free(self, block: int) -> None:
        """Count one holder fewer; when the last holder frees the block, it can be allocated again.

        Raises, and changes nothing: `DoubleFreeError` if the block is free already (it would be in the queue
        twice, and two callers would get it), `UnknownBlockError` if it is not in this pool.

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

    def resize(self, num_blocks: int) -> None:
        """Grow or shrink to the ids 0 .. num_blocks - 1, for a pool whose size follows its load.

        Raises ValueError, and changes nothing, if a block beyond the new end is held or num_blocks is 0.
        """
        if num_blocks < 1 or any(self._ref_counts[num_blocks:]):
            raise ValueError(
                f"a pool of {self.num_blocks} blocks cannot be resized to {num_blocks}: at least 1 block "
                "must remain, and no block beyond the new end may be held"
            )
        if num_blocks < self.num_blocks:
            self._free = deque(block for block in self._free if block < num_blocks)
            del self._ref_counts[num_blocks:]
        self._free.extend(range(self.num_blocks, num_blocks))
        self._ref_counts.extend([0] * (num_blocks - self.num_blocks))
        self.num_blocks = num_blocks

    def relocate(self, moved: Mapping[int, int]) -> None:
        """Move held blocks to other ids, {old: new}, for compaction; the new ids must be free.

        The holders must rename the blocks too (`BlockTable.rename_blocks`).
        """
        for old, new in moved.items():
            self._ref_counts[new], self._ref_counts[old] = self._ref_counts[old], 0
        self._free = deque(block for block, count in enumerate(self._ref_counts) if count == 0)

    def _check_known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise UnknownBlockError(f"block {block} is not in this pool of {self.num_blocks} blocks")

    def _num_holders(self, block: int) -> int:
        """Return the number of holders of a held block; raise `DoubleFreeError` for a free one."""
        count = self.ref_count(block)
        if count == 0:
            raise DoubleFreeError(f"block {block} is free: it has no holder")
        return count


class BlockTable:
    """Maps a sequence's positions to blocks of the pool, and is one holder of each of these blocks.

    Token i is in block `blocks[i // block_size]` at offset `i % block_size`. Invariant:
    `len(blocks) == ceil(num_tokens / block_size)`, so an empty table has no block.

    allocator: the allocator of its blocks. block_size: tokens in a block. blocks: the block ids, in the order
    of the tokens. num_tokens: the number of tokens that have a place in the blocks.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.num_tokens = 0

    def blocks_to_append(self, num_new_tokens: int) -> int:
        """Return how many free blocks `append_tokens(num_new_tokens)` would take. Changes nothing.

        num_new_tokens: 0 or more; do not check for a negative number. 0 tokens take no block.

        Count the new blocks for the tokens that do not fit into the last block. Add one for a copy on write,
        if there are new tokens and the last block is partly filled and has another holder. The number of
        blocks that are free does not matter here.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)  # one block is full, the other has two tokens
        >>> table.blocks_to_append(2), table.blocks_to_append(3)
        (0, 1)
        >>> _ = table.fork()  # the last block has two holders now
        >>> table.blocks_to_append(2), table.blocks_to_append(3)
        (1, 2)
        """
        total = self.num_tokens + num_new_tokens
        new_blocks = -(-total // self.block_size) - len(self.blocks)
        return new_blocks + (num_new_tokens > 0 and self._last_block_is_shared())

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        """Add places for new tokens at the end: in the last block first, then in newly allocated blocks.

        Returns the copies that the pool must make before the new tokens are written: at most one, a copy on
        write. It is needed if there are new tokens and the last block is partly filled and has another
        holder: the new tokens' places in that block belong to the other holder too. In that case allocate a
        block, put it in the shared block's place in `blocks`, free this table's reference to the shared
        block, and return the copy from the shared block to the new one. Its length is the number of tokens
        that the table had in the shared block: the old `num_tokens % block_size`. A full block is never
        written again, so it is never copied.

        0 new tokens change nothing; do not check for a negative number. All or nothing: raises
        `OutOfBlocksError`, and changes nothing, if fewer blocks are free than `blocks_to_append` returns.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> table.append_tokens(6), len(table.blocks)
        ([], 2)
        >>> child = table.fork()
        >>> [copy.length for copy in child.append_tokens(1)]
        [2]
        >>> child.blocks[0] == table.blocks[0], child.blocks[1] == table.blocks[1]
        (True, False)
        """
        needed = self.blocks_to_append(num_new_tokens)
        if needed > self.allocator.num_free:
            raise OutOfBlocksError(
                f"{num_new_tokens} more tokens after {self.num_tokens} need {needed} blocks of "
                f"{self.block_size}; {self.allocator.num_free} of {self.allocator.num_blocks} are free"
            )
        copies = []
        if num_new_tokens > 0 and self._last_block_is_shared():
            copies.append(self._copy_on_write())
        self.num_tokens += num_new_tokens
        while len(self.blocks) * self.block_size < self.num_tokens:
            self.blocks.append(self.allocator.allocate())
        return copies

    def remove_tokens(self, num_tokens: int) -> list[int]:
        """Remove the last `num_tokens` tokens; free and return the blocks that hold no other tokens.

        Speculative decoding removes tokens that it had guessed wrong.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)
        >>> len(table.remove_tokens(2)), table.num_tokens, table.allocator.num_free
        (1, 4, 7)
        """
        self.num_tokens -= num_tokens
        kept = -(-self.num_tokens // self.block_size)
        removed, self.blocks = self.blocks[kept:], self.blocks[:kept]
        for block in reversed(removed):
            self.allocator.free(block)
        return removed

    def physical_indices(self) -> list[int]:
        """Return the ids of the table's blocks, in the order of its tokens, as a new list for a kernel.

        A table that has released its first blocks (day 3.5) returns placeholders for them; `blocks` has none.
        """
        return list(self.blocks)

    def slots(self, start: int, stop: int) -> list[int]:
        """Return the slots of the positions start .. stop - 1, in order: `block * block_size + offset`.

        A slot is a token's place in the pool as one number; the block ids are those in `blocks`. Equal start
        and stop give []. Raises ValueError unless 0 <= start <= stop <= num_tokens: a place after the last
        token may hold another sequence's old data.

        >>> table = BlockTable(BlockAllocator(num_blocks=64), block_size=4)
        >>> table.blocks, table.num_tokens = [7, 42], 6
        >>> table.slots(3, 6)
        [31, 168, 169]
        """
        if not 0 <= start <= stop <= self.num_tokens:
            wanted = f"positions {start} to {stop}"
            raise ValueError(f"{wanted} are not within the table's {self.num_tokens} tokens")
        size = self.block_size
        return [self.blocks[position // size] * size + position % size for position in range(start, stop)]

    def share_block(self, block: int, length: int) -> None:
        """Append a block of another holder: its first `length` tokens become this table's next tokens.

        Used by the prefix cache. Raises ValueError if this table's last block is not full, or if `length` is
        not in 1 .. block_size.
        """
        if self.num_tokens % self.block_size or not 1 <= length <= self.block_size:
            raise ValueError(
                f"cannot append {length} tokens of a shared block to a table of {self.num_tokens} tokens: "
                f"the table's last block must be full, and 1 to {self.block_size} tokens can be shared"
            )
        self.allocator.add_ref(block)
        self.blocks.append(block)
        self.num_tokens += length

    def fork(self) -> "BlockTable":
        """Return a second table with the same blocks and tokens; it is one more holder of each block.

        No block is allocated or copied. Afterwards the two tables are independent: tokens appended to one do
        not appear in the other (`append_tokens` copies the block to which both would write).

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)
        >>> child = table.fork()
        >>> child.blocks == table.blocks, child.num_tokens, table.allocator.num_free
        (True, 6, 6)
        >>> [table.allocator.ref_count(block) for block in child.blocks]
        [2, 2]
        """
        child = BlockTable(self.allocator, self.block_size)
        child.blocks, child.num_tokens = list(self.blocks), self.num_tokens
        for shared in child.blocks:
            child.allocator.add_ref(shared)
        return child

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Replace the ids of blocks that have moved in the pool: {old: new}; other blocks keep their ids."""
        self.blocks = [moved.get(block, block) for block in self.blocks]

    def release(self) -> None:
        """Free this table's reference to each of its blocks, and become empty: no blocks, no tokens.

        A block with other holders stays allocated for them. Releasing an empty table does nothing; the table
        can be filled again.

        >>> table = BlockTable(BlockAllocator(num_blocks=8), block_size=4)
        >>> _ = table.append_tokens(6)
        >>> table.release()
        >>> table.blocks, table.num_tokens, table.allocator.num_free
        ([], 0, 8)
        """
        while self.blocks:
            self.allocator.free(self.blocks.pop())
        self.num_tokens = 0

    def _last_block_is_shared(self) -> bool:
        partly_filled = self.num_tokens % self.block_size != 0
        return partly_filled and self.allocator.ref_count(self.blocks[-1]) > 1

    def _copy_on_write(self) -> BlockCopy:
        shared, fresh = self.blocks[-1], self.allocator.allocate()
        self.allocator.free(shared)
        self.blocks[-1] = fresh
        return BlockCopy(src=shared, dst=fresh, length=self.num_tokens % self.block_size)
