"""Blocks on demand: a sequence holds as many blocks as its tokens need, and frees them when it ends.

A sequence wastes only the unfilled part of its last block. But if its blocks must be adjacent, free memory
can still be useless: `alloc_contiguous` fails if enough blocks are free but scattered (external
fragmentation). `alloc_blocks`, which takes any blocks, does not fail then.
"""

from collections.abc import Sequence

import mlx.core as mx

from .errors import OutOfBlocksError
from .naive_cache import KeysValues


class GlobalAllocator:
    def alloc_blocks(self, num_blocks: int) -> list[int]:
        if num_blocks > len(self.free_blocks):
            raise OutOfBlocksError(f"{num_blocks} blocks requested, {len(self.free_blocks)} are free")
        return [self.free_blocks.pop() for _ in range(num_blocks)]

    def free_blocks_ids(self, block_ids: Sequence[int]) -> None:
        if len(set(block_ids)) < len(block_ids):
            raise ValueError(f"duplicate block ids: {block_ids}")
        for block in block_ids:
            if not 0 <= block < self.total_blocks:
                raise ValueError(f"block {block} is not in this pool")
            if block in self.free_blocks:
                raise ValueError(f"block {block} is already free")
        self.free_blocks.update(block_ids)

    def alloc_contiguous(self, num_blocks: int) -> list[int]:
        run: list[int] = []
        for block in range(self.total_blocks):
            if block not in self.free_blocks:
                run = []
                continue
            run.append(block)
            if len(run) == num_blocks:
                self.free_blocks.difference_update(run)
                return run
        raise OutOfBlocksError(
            f"{num_blocks} blocks side by side asked for, the longest run is {self.longest_run()}"
        )


class DynamicKVCache:
    def allocate_for_prompt(self, prompt_len: int) -> None:
        block_size = self.allocator.block_size
        self.blocks += self.allocator.alloc_blocks((prompt_len + block_size - 1) // block_size)

    def append_token(self, k: mx.array, v: mx.array) -> None:
        index, offset = divmod(self.current_len, self.allocator.block_size)
        if index == len(self.blocks):
            self.blocks += self.allocator.alloc_blocks(1)
        block = self.blocks[index]
        self.allocator.keys[block, :, offset] = k
        self.allocator.values[block, :, offset] = v
        self.current_len += 1

    def read(self) -> KeysValues:
        block_ids = mx.array(self.blocks, mx.int32)

        def gather(pool: mx.array) -> mx.array:
            _, num_heads, block_size, head_dim = pool.shape
            blocks = pool[block_ids].swapaxes(0, 1)  # [Hkv, blocks, block_size, D]
            tokens = blocks.reshape(num_heads, len(self.blocks) * block_size, head_dim)
            return tokens[:, : self.current_len]

        return KeysValues(gather(self.allocator.keys), gather(self.allocator.values))
