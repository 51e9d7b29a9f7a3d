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
    """A pool of `total_blocks` blocks of `block_size` tokens, shared by all sequences.

    num_heads: heads of keys and values (Hkv). keys, values: [total_blocks, Hkv, block_size, D]; a block is a
    `NaiveKVCache` of `block_size` tokens, heads first as there. free_blocks: the ids of the free blocks, a
    set of ints from 0 to total_blocks - 1. All other blocks are held; the allocator does not know by which
    sequences.
    """

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
        """Take `num_blocks` free blocks, whichever; return their ids. For 0 blocks the list is empty.

        Raises `OutOfBlocksError`, and takes none, if fewer are free.

        >>> pool = GlobalAllocator(total_blocks=4, block_size=2, num_heads=1, head_dim=2)
        >>> len(pool.alloc_blocks(3)), len(pool.free_blocks)
        (3, 1)
        """
        if num_blocks > len(self.free_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} blocks asked for, {len(self.free_blocks)} of {self.total_blocks} are free"
            )
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
        held = set(range(self.total_blocks)) - self.free_blocks
        if len(set(block_ids)) < len(block_ids) or not held.issuperset(block_ids):
            raise ValueError(f"of blocks {list(block_ids)} some are free, named twice or not of this pool")
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
        start = run = 0
        for block in range(self.total_blocks):
            if run == num_blocks:
                break
            if block in self.free_blocks:
                run += 1
            else:
                start, run = block + 1, 0
        if run < num_blocks:
            raise OutOfBlocksError(
                f"no {num_blocks} free blocks lie side by side; {len(self.free_blocks)} of "
                f"{self.total_blocks} are free, the longest run has {self.longest_run()}"
            )
        taken = list(range(start, start + num_blocks))
        self.free_blocks.difference_update(taken)
        return taken

    def longest_run(self) -> int:
        """Count the blocks of the longest run of free blocks; 0 if none is free."""
        longest = run = 0
        for is_free in (block in self.free_blocks for block in range(self.total_blocks)):
            run = run + 1 if is_free else 0
            longest = max(longest, run)
        return longest


class DynamicKVCache:
    """One sequence's keys and values of one layer, in blocks of a shared pool.

    seq_id: a name, for messages. blocks: the ids of the blocks that it holds, in the order of the tokens.
    current_len: tokens stored.

    Invariant: token i is in block `blocks[i // block_size]`, at offset i % block_size.
    """

    def __init__(self, allocator: GlobalAllocator, seq_id: str) -> None:
        self.allocator = allocator
        self.seq_id = seq_id
        self.blocks: list[int] = []
        self.current_len = 0

    def allocate_for_prompt(self, prompt_len: int) -> None:
        """Take the blocks that `prompt_len` tokens fill or begin, behind the blocks held already.

        These are always ceil(prompt_len / block_size) new ones, also if blocks held already are empty or not
        full. Stores no token: `current_len` stays. The blocks need not lie side by side. Raises
        `OutOfBlocksError`, and takes none, if too few are free.

        >>> cache = DynamicKVCache(GlobalAllocator(9, block_size=4, num_heads=1, head_dim=2), "a")
        >>> cache.allocate_for_prompt(9)
        >>> len(cache.blocks), cache.current_len
        (3, 0)
        """
        self.blocks += self.allocator.alloc_blocks(-(-prompt_len // self.allocator.block_size))

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
        place, offset = divmod(self.current_len, self.allocator.block_size)
        if place == len(self.blocks):
            self.blocks += self.allocator.alloc_blocks(1)
        block = self.blocks[place]
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
        index = mx.array(self.blocks, mx.int32)
        _, heads, _, size = self.allocator.keys.shape
        pools = (self.allocator.keys, self.allocator.values)
        gathered = (pool[index].swapaxes(0, 1) for pool in pools)  # [Hkv, blocks, block_size, D]
        joined = (blocks.reshape(heads, -1, size) for blocks in gathered)
        return KeysValues(*(tokens[:, : self.current_len] for tokens in joined))

    def free(self) -> None:
        """Give every block back and forget every token; the empty cache may be used or freed again."""
        self.allocator.free_blocks_ids(self.blocks)
        self.blocks, self.current_len = [], 0
