"""Pages for keys and values: who holds which block, and which blocks a sequence's tokens live in.

Plain bookkeeping over ints, without an array in sight. Knows nothing of tokens' values, of the
pool's arrays, or of the prefix cache. Source: Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention" (SOSP 2023).
"""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from .errors import DoubleFreeError, OutOfBlocksError, UnknownBlockError


class BlockCopy(NamedTuple):
    """A copy of one block's first `length` tokens that must happen before the next write."""

    src: int
    dst: int
    length: int


class BlockAllocator:
    """Hands out the ids 0 .. num_blocks - 1 and counts the holders of each.

    Invariant: free blocks + blocks with a positive count = num_blocks. A block costs O(1), however many there
    are.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def ref_count(self, block: int) -> int:
        """How many holders `block` has; 0 when it is free. `UnknownBlockError` for no block of this pool."""
        self._check_known(block)
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Take any free block; its count becomes 1. Raises `OutOfBlocksError` when none is free."""
        if not self._free:
            raise OutOfBlocksError(f"no free block: all {self.num_blocks} are held")
        block = self._free.popleft()
        self._ref_counts[block] = 1
        return block

    def add_ref(self, block: int) -> None:
        """Count one more holder of a held block.

        Raises `DoubleFreeError` when nobody holds it, `UnknownBlockError` when it is no block of
        this pool; both change nothing.
        """
        self._check_held(block)
        self._ref_counts[block] += 1

    def free(self, block: int) -> None:
        """Count one holder less; the last one returns the block to the free queue.

        Raises `DoubleFreeError` when nobody holds it, `UnknownBlockError` when it is no block of
        this pool; both change nothing.
        """
        self._check_held(block)
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free.append(block)

    def resize(self, num_blocks: int) -> None:
        """Grow or shrink to the ids 0 .. num_blocks - 1. ValueError, unchanged, while one behind is held."""
        if num_blocks < 1 or any(self._ref_counts[num_blocks:]):
            raise ValueError(
                f"{self.num_blocks} blocks cannot become {num_blocks}: one behind the end is held"
            )
        if num_blocks < self.num_blocks:
            self._free = deque(block for block in self._free if block < num_blocks)
            del self._ref_counts[num_blocks:]
        self._free.extend(range(self.num_blocks, num_blocks))
        self._ref_counts.extend([0] * (num_blocks - self.num_blocks))
        self.num_blocks = num_blocks

    def relocate(self, moved: Mapping[int, int]) -> None:
        """Let held blocks go on under other, free ids, from old to new; whoever holds them must follow."""
        for old, new in moved.items():
            self._ref_counts[new], self._ref_counts[old] = self._ref_counts[old], 0
        self._free = deque(block for block, count in enumerate(self._ref_counts) if count == 0)

    def _check_known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise UnknownBlockError(f"block {block} is not in this pool of {self.num_blocks} blocks")

    def _check_held(self, block: int) -> None:
        if self.ref_count(block) == 0:
            raise DoubleFreeError(f"block {block} is free: nobody holds it")


class BlockTable:
    """Maps a sequence's logical positions to physical blocks, and owns one reference to each.

    Token i lives in block `blocks[i // block_size]` at offset `i % block_size`. Invariant:
    `len(blocks) == ceil(num_tokens / block_size)`.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.num_tokens = 0

    def blocks_to_append(self, num_new_tokens: int) -> int:
        """Free blocks that `append_tokens(num_new_tokens)` would take, a copy-on-write included.

        Takes none, and does not ask how many are free.
        """
        total = self.num_tokens + num_new_tokens
        new_blocks = -(-total // self.block_size) - len(self.blocks)
        return new_blocks + (num_new_tokens > 0 and self._last_block_is_shared())

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        """Make room for tokens at the end: fill the last block first, then allocate.

        A last block that others hold too and that still has room is copied on write: this table
        gets a fresh block in its place, gives back its reference to the shared one, and returns the
        copy, of the tokens that were there before. Full shared blocks are never copied; no new tokens
        change nothing. All or nothing: raises `OutOfBlocksError`, unchanged, when the pool runs short.
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

    def physical_indices(self) -> list[int]:
        """The physical block of each logical block, in order."""
        return list(self.blocks)

    def slots(self, start: int, stop: int) -> list[int]:
        """The flat addresses of the positions start .. stop - 1: `block * block_size + offset` in the pool.

        Raises ValueError where the range lies outside the table's tokens.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            held = f"the table's {self.num_tokens} tokens"
            raise ValueError(f"positions {start} to {stop} are not within {held}")
        size = self.block_size
        return [self.blocks[position // size] * size + position % size for position in range(start, stop)]

    def share_block(self, block: int, length: int) -> None:
        """Go on with a block that others hold: its first `length` tokens become this table's next ones.

        Raises ValueError where this table's last block still has room, or `length` is not 1 .. block_size.
        """
        if self.num_tokens % self.block_size or not 1 <= length <= self.block_size:
            raise ValueError(
                f"{length} tokens of a shared block after {self.num_tokens}, in blocks of {self.block_size}"
            )
        self.allocator.add_ref(block)
        self.blocks.append(block)
        self.num_tokens += length

    def fork(self) -> "BlockTable":
        """A second table over the same blocks, each of which counts one more holder; nothing is copied.

        Afterwards each table goes on without the other: what one appends, the other never sees.
        """
        child = BlockTable(self.allocator, self.block_size)
        child.blocks, child.num_tokens = list(self.blocks), self.num_tokens
        for shared in child.blocks:
            child.allocator.add_ref(shared)
        return child

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved to other places in the pool: from old ids to new ones."""
        self.blocks = [moved.get(block, block) for block in self.blocks]

    def release(self) -> None:
        """Give back this table's reference to every block, the deepest first, and become empty."""
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
