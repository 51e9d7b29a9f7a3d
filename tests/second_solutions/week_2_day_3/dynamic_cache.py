"""Blocks on demand: the highest ids first, runs from the end of the pool, blocks read one by one."""

import math
from collections.abc import Sequence

import mlx.core as mx

from .errors import OutOfBlocksError
from .naive_cache import KeysValues


class GlobalAllocator:
    """A pool of blocks."""

    def __init__(
        self,
        total_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        dtype: mx.Dtype = mx.bfloat16,
    ) -> None:
        self.block_size = block_size
        self.total_blocks = total_blocks
        self.keys = mx.zeros((total_blocks, num_heads, block_size, head_dim), dtype)
        self.values = mx.zeros((total_blocks, num_heads, block_size, head_dim), dtype)
        self.free_blocks = set(range(total_blocks))

    def alloc_blocks(self, num_blocks: int) -> list[int]:
        """The highest ids."""
        if len(self.free_blocks) < num_blocks:
            raise OutOfBlocksError(f"{len(self.free_blocks)} free, {num_blocks} asked for")
        taken = sorted(self.free_blocks, reverse=True)[:num_blocks]
        self.free_blocks -= set(taken)
        return taken

    def free_blocks_ids(self, block_ids: Sequence[int]) -> None:
        """Each id is looked at."""
        given: set[int] = set()
        for block in block_ids:
            if block in given or block in self.free_blocks or not 0 <= block < self.total_blocks:
                raise ValueError(f"block {block} is not held")
            given.add(block)
        self.free_blocks |= given

    def alloc_contiguous(self, num_blocks: int) -> list[int]:
        """Every run that there could be, from the end of the pool."""
        for start in reversed(range(self.total_blocks - num_blocks + 1)):
            run = range(start, start + num_blocks)
            if self.free_blocks.issuperset(run):
                self.free_blocks -= set(run)
                return list(run)
        raise OutOfBlocksError(f"no run of {num_blocks}, the longest has {self.longest_run()}")

    def longest_run(self) -> int:
        """Of free blocks."""
        longest = run = 0
        for block in range(self.total_blocks):
            run = run + 1 if block in self.free_blocks else 0
            longest = max(longest, run)
        return longest


class DynamicKVCache:
    """One sequence's blocks."""

    def __init__(self, allocator: GlobalAllocator, seq_id: str) -> None:
        self.allocator = allocator
        self.seq_id = seq_id
        self.blocks: list[int] = []
        self.current_len = 0

    def allocate_for_prompt(self, prompt_len: int) -> None:
        """Rounded up."""
        self.blocks.extend(self.allocator.alloc_blocks(math.ceil(prompt_len / self.allocator.block_size)))

    def append_token(self, k: mx.array, v: mx.array) -> None:
        """A block when all places are taken."""
        pool = self.allocator
        if self.current_len == pool.block_size * len(self.blocks):
            self.blocks.extend(pool.alloc_blocks(1))
        block, offset = self.blocks[self.current_len // pool.block_size], self.current_len % pool.block_size
        for array, new in ((pool.keys, k), (pool.values, v)):
            array[block, :, offset, :] = new
        self.current_len += 1

    def read(self) -> KeysValues:
        """Block after block."""
        found = []
        for pool in (self.allocator.keys, self.allocator.values):
            parts = [pool[0][:, :0], *(pool[block] for block in self.blocks)]
            found.append(mx.concatenate(parts, axis=1)[:, : self.current_len])
        return KeysValues(*found)

    def free(self) -> None:
        """Nothing is held."""
        self.allocator.free_blocks_ids(self.blocks)
        self.blocks, self.current_len = [], 0
