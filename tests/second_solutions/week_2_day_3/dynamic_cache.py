"""Blocks on demand: a sequence holds as many as its tokens need, and gives them back when it ends.

What a sequence wastes shrinks to part of one block. The rest depends on whether its blocks must lie side by
side: `alloc_contiguous` fails if enough blocks are free but scattered (external fragmentation),
`alloc_blocks` never does.
"""

from collections.abc import Sequence

import mlx.core as mx

from .errors import OutOfBlocksError
from .naive_cache import KeysValues


class GlobalAllocator:
    def alloc_blocks(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, whichever; return their ids. For 0 blocks the list is empty.

        Raises `OutOfBlocksError`, and takes none, if fewer are free.

        >>> pool = GlobalAllocator(total_blocks=4, block_size=2, num_heads=1, head_dim=2)
        >>> len(pool.alloc_blocks(3)), len(pool.free_blocks)
        (3, 1)
        """
        if num_blocks > len(self.free_blocks):
            raise OutOfBlocksError(f"{num_blocks} blocks asked for, {len(self.free_blocks)} are free")
        return [self.free_blocks.pop() for _ in range(num_blocks)]

    def free_blocks_ids(self, block_ids: Sequence[int]) -> None:
        """Give blocks back, in any order; an empty list changes nothing.

        Raises ValueError, and gives back none of them, if one is free already, is not of this pool (-1, or
        total_blocks and above) or is named twice. Otherwise a bug in a caller would give one block to two
        sequences later, which overwrite each other's tokens.

        >>> pool = GlobalAllocator(total_blocks=2, block_size=2, num_heads=1, head_dim=2)
        >>> pool.free_blocks_ids(pool.alloc_blocks(2))
        >>> sorted(pool.free_blocks)
        [0, 1]
        """
        if len(set(block_ids)) < len(block_ids):
            raise ValueError(f"a block is named twice: {block_ids}")
        for block in block_ids:
            if not 0 <= block < self.total_blocks:
                raise ValueError(f"block {block} is not of this pool")
            if block in self.free_blocks:
                raise ValueError(f"block {block} is free already")
        self.free_blocks.update(block_ids)

    def alloc_contiguous(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` (1 or more) free blocks that lie side by side; return their ids, ascending.

        If there are several such runs, any of them will do. Raises `OutOfBlocksError`, and takes none, if no
        run of free blocks is that long, however many are free in all. `longest_run` may go into the message.

        >>> pool = GlobalAllocator(total_blocks=5, block_size=2, num_heads=1, head_dim=2)
        >>> pool.free_blocks = {0, 2, 3}
        >>> pool.alloc_contiguous(2), pool.free_blocks
        ([2, 3], {0})
        """
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
        """Take the blocks that `prompt_len` tokens fill or begin, behind the blocks held already.

        Stores no token: `current_len` stays. The blocks need not lie side by side. A prompt of 0 tokens takes
        none. Raises `OutOfBlocksError`, and takes none, if too few are free.

        >>> cache = DynamicKVCache(GlobalAllocator(9, block_size=4, num_heads=1, head_dim=2), "a")
        >>> cache.allocate_for_prompt(9)
        >>> len(cache.blocks), cache.current_len
        (3, 0)
        """
        block_size = self.allocator.block_size
        self.blocks += self.allocator.alloc_blocks((prompt_len + block_size - 1) // block_size)

    def append_token(self, k: mx.array, v: mx.array) -> None:
        """Store the next token, k and v [Hkv, D], in its place in the pool's `keys` and `values`.

        Takes a new block only if all blocks held are full; after `allocate_for_prompt` several may be empty,
        and are filled from the first. Raises `OutOfBlocksError` if a block is needed and none is free; then
        nothing is stored, and the token may be appended later.

        >>> cache = DynamicKVCache(GlobalAllocator(9, block_size=4, num_heads=1, head_dim=2), "a")
        >>> cache.append_token(mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0]]))
        >>> len(cache.blocks), cache.allocator.keys[cache.blocks[0], :, 0].tolist()
        (1, [[1.0, 2.0]])
        """
        index, offset = divmod(self.current_len, self.allocator.block_size)
        if index == len(self.blocks):
            self.blocks += self.allocator.alloc_blocks(1)
        block = self.blocks[index]
        self.allocator.keys[block, :, offset] = k
        self.allocator.values[block, :, offset] = v
        self.current_len += 1

    def read(self) -> KeysValues:
        """Gather all stored tokens in their order: `KeysValues(keys, values)`, [Hkv, current_len, D] each.

        Copies blocks from all over the pool into one array, which the paged kernel (week 3) avoids: it reads
        them where they are. A cache without tokens gives [Hkv, 0, D], whether or not it holds blocks. An
        index array must hold ints: `mx.array([])` is float32 unless a dtype is given.

        >>> cache = DynamicKVCache(GlobalAllocator(9, block_size=2, num_heads=1, head_dim=1), "a")
        >>> for number in (1.0, 2.0, 3.0):
        ...     cache.append_token(mx.array([[number]]), mx.array([[-number]]))
        >>> cache.read().values.tolist()
        [[[-1.0], [-2.0], [-3.0]]]
        """
        block_ids = mx.array(self.blocks, mx.int32)

        def gather(pool: mx.array) -> mx.array:
            _, num_heads, block_size, head_dim = pool.shape
            blocks = pool[block_ids].swapaxes(0, 1)  # [Hkv, blocks, block_size, D]
            tokens = blocks.reshape(num_heads, len(self.blocks) * block_size, head_dim)
            return tokens[:, : self.current_len]

        return KeysValues(gather(self.allocator.keys), gather(self.allocator.values))
