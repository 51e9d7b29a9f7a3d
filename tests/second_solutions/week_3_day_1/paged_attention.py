"""Blocks from a stack, tokens placed one by one, slots cut out of all slots."""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from .errors import DoubleFreeError, OutOfBlocksError, UnknownBlockError


class BlockCopy(NamedTuple):
    """A copy of the first `length` tokens of block `src` to block `dst`, to be made before the next write."""

    src: int
    dst: int
    length: int


class BlockAllocator:
    """Hands out the block ids 0 .. num_blocks - 1 and counts the holders of each block."""

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
        """The number of holders of `block`; 0 if it is free."""
        self._check_known(block)
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Take a free block, any of them, and return its id."""
        if self.num_free == 0:
            raise OutOfBlocksError(f"none of {self.num_blocks} blocks is free")
        block = self._free.pop()
        self._ref_counts[block] += 1
        return block

    def add_ref(self, block: int) -> None:
        """Count one more holder of a block that has one already; sharing takes no free block."""
        self._ref_counts[block] = self._num_holders(block) + 1

    def free(self, block: int) -> None:
        """Count one holder less; when the last holder frees the block, it can be allocated again."""
        if self.ref_count(block) < 1:
            raise DoubleFreeError(f"block {block} is free")
        left = self._ref_counts[block] - 1
        self._ref_counts[block] = left
        if not left:
            self._free.appendleft(block)

    def resize(self, num_blocks: int) -> None:
        """Grow or shrink to the ids 0 .. num_blocks - 1, for a pool whose size follows its load."""
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
        """Give held blocks other ids, which must be free: {old: new}, for compaction."""
        for old, new in moved.items():
            self._ref_counts[new], self._ref_counts[old] = self._ref_counts[old], 0
        self._free = deque(block for block, count in enumerate(self._ref_counts) if count == 0)

    def _check_known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise UnknownBlockError(f"block {block} is not in this pool of {self.num_blocks} blocks")

    def _num_holders(self, block: int) -> int:
        """The number of holders of a held block; `DoubleFreeError` for a free one."""
        count = self.ref_count(block)
        if count == 0:
            raise DoubleFreeError(f"block {block} is free: it has no holder")
        return count


class BlockTable:
    """Maps a sequence's positions to blocks of the pool, and is one holder of each of these blocks."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.num_tokens = 0

    def blocks_to_append(self, num_new_tokens: int) -> int:
        """The number of free blocks that `append_tokens(num_new_tokens)` would take. Changes nothing."""
        if num_new_tokens == 0:
            return 0
        room = len(self.blocks) * self.block_size - self.num_tokens
        blocks, rest = divmod(max(0, num_new_tokens - room), self.block_size)
        if rest:
            blocks += 1
        if room and self.allocator.ref_count(self.blocks[-1]) >= 2:
            blocks += 1
        return blocks

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        """Add places for new tokens at the end: in the last block first, then in newly allocated blocks."""
        if self.blocks_to_append(num_new_tokens) > self.allocator.num_free:
            raise OutOfBlocksError(f"{num_new_tokens} tokens do not fit")
        copies = []
        used = self.num_tokens % self.block_size
        if num_new_tokens and used and self.allocator.ref_count(self.blocks[-1]) > 1:
            old = self.blocks.pop()
            self.blocks.append(self.allocator.allocate())
            self.allocator.free(old)
            copies = [BlockCopy(old, self.blocks[-1], used)]
        for _ in range(num_new_tokens):
            if self.num_tokens == len(self.blocks) * self.block_size:
                self.blocks += [self.allocator.allocate()]
            self.num_tokens += 1
        return copies

    def physical_indices(self) -> list[int]:
        """The ids of the table's blocks, in the order of its tokens; a new list, for a kernel."""
        return list(self.blocks)

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of the positions start .. stop - 1, in order: `block * block_size + offset` for each."""
        if start < 0 or stop < start or stop > self.num_tokens:
            raise ValueError(f"{start} to {stop} of {self.num_tokens} tokens")
        size = self.block_size
        every = [slot for block in self.blocks for slot in range(block * size, (block + 1) * size)]
        return every[start:stop]

    def share_block(self, block: int, length: int) -> None:
        """Continue with a block of another holder."""
        if self.num_tokens % self.block_size or not 1 <= length <= self.block_size:
            raise ValueError(
                f"{length} tokens of a shared block after {self.num_tokens}, in blocks of {self.block_size}"
            )
        self.allocator.add_ref(block)
        self.blocks.append(block)
        self.num_tokens += length

    def fork(self) -> "BlockTable":
        """Return a second table with the same blocks and tokens; each block counts one more holder."""
        other = BlockTable(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.add_ref(block)
            other.blocks.append(block)
        other.num_tokens = self.num_tokens
        return other

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Use the new ids of blocks that have moved in the pool: {old: new}; other blocks keep theirs."""
        self.blocks = [moved.get(block, block) for block in self.blocks]

    def release(self) -> None:
        """Free this table's reference to each of its blocks, and become empty: no blocks, no tokens."""
        blocks, self.blocks, self.num_tokens = self.blocks, [], 0
        for block in blocks:
            self.allocator.free(block)
