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
    """A pool of `total_blocks` blocks of `block_size` tokens, shared by all sequences.

    num_heads: heads of keys and values (Hkv). keys, values: [total_blocks, Hkv, block_size, D]; within a
    block, heads come before tokens, as in `NaiveKVCache`. free_blocks: the set of the free blocks' ids, from
    0 to total_blocks - 1. All other blocks are held; the allocator does not know by which sequences.
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
        """Take any `num_blocks` free blocks and return their ids; for 0 blocks the list is empty.

        Raises `OutOfBlocksError`, and takes none, if fewer are free.

        >>> pool = GlobalAllocator(total_blocks=4, block_size=2, num_heads=1, head_dim=2)
        >>> len(pool.alloc_blocks(3)), len(pool.free_blocks)
        (3, 1)
        """
        if num_blocks > len(self.free_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} blocks requested, {len(self.free_blocks)} of {self.total_blocks} are free"
            )
        return [self.free_blocks.pop() for _ in range(num_blocks)]

    def free_blocks_ids(self, block_ids: Sequence[int]) -> None:
        """Free blocks, in any order; an empty list changes nothing.

        Raises ValueError, and frees none of them, if one is free already, is not in this pool (-1, or
        total_blocks and above) or appears twice in the list. Without this check, a bug in a caller could
        later give one block to two sequences, which would overwrite each other's tokens.

        >>> pool = GlobalAllocator(total_blocks=2, block_size=2, num_heads=1, head_dim=2)
        >>> pool.free_blocks_ids(pool.alloc_blocks(2))
        >>> sorted(pool.free_blocks)
        [0, 1]
        """
        held = set(range(self.total_blocks)) - self.free_blocks
        if len(set(block_ids)) < len(block_ids) or not held.issuperset(block_ids):
            raise ValueError(f"some of the blocks {list(block_ids)} are free, repeated or not in this pool")
        self.free_blocks.update(block_ids)

    def alloc_contiguous(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` (1 or more) adjacent free blocks; return their ids, ascending.

        If several runs of free blocks are long enough, take from any of them. Raises `OutOfBlocksError`, and
        takes none, if no run is that long, however many blocks are free in all. The message may contain
        `longest_run()`.

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
                f"no {num_blocks} adjacent blocks are free: {len(self.free_blocks)} of "
                f"{self.total_blocks} are free, and the longest run has {self.longest_run()}"
            )
        taken = list(range(start, start + num_blocks))
        self.free_blocks.difference_update(taken)
        return taken

    def longest_run(self) -> int:
        """Return the length of the longest run of adjacent free blocks; 0 if none is free."""
        longest = run = 0
        for is_free in (block in self.free_blocks for block in range(self.total_blocks)):
            run = run + 1 if is_free else 0
            longest = max(longest, run)
        return longest


class DynamicKVCache:
    """One sequence's keys and values of one layer, in blocks of a shared pool.

    seq_id: a name, for messages. blocks: the ids of the blocks that it holds, in the order of the tokens.
    current_len: the number of stored tokens.

    Invariant: token i is in block `blocks[i // block_size]`, at offset i % block_size.
    """

    def __init__(self, allocator: GlobalAllocator, seq_id: str) -> None:
        self.allocator = allocator
        self.seq_id = seq_id
        self.blocks: list[int] = []
        self.current_len = 0

    def allocate_for_prompt(self, prompt_len: int) -> None:
        """Take blocks for a prompt of `prompt_len` tokens, and append them to the blocks held already.

        Takes ceil(prompt_len / block_size) new blocks, even if the cache already holds blocks that are empty
        or not full. The new blocks need not be adjacent. Stores no token: `current_len` does not change.
        Raises `OutOfBlocksError`, and takes none, if too few are free.

        >>> cache = DynamicKVCache(GlobalAllocator(9, block_size=4, num_heads=1, head_dim=2), "a")
        >>> cache.allocate_for_prompt(9)
        >>> len(cache.blocks), cache.current_len
        (3, 0)
        """
        self.blocks += self.allocator.alloc_blocks(-(-prompt_len // self.allocator.block_size))

    def append_token(self, k: mx.array, v: mx.array) -> None:
        """Store the next token, k and v [Hkv, D], at its place in the pool's `keys` and `values`.

        Takes a new block only if all held blocks are full. After `allocate_for_prompt` several may be empty:
        they are filled in order. Raises `OutOfBlocksError` if a block is needed and none is free; then
        nothing has changed, and the token can be appended later.

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

        Copies blocks from all over the pool into one array. The paged kernel (week 3) avoids that: it reads
        the blocks where they are. A cache without tokens gives [Hkv, 0, D], whether or not it holds blocks.
        An index array must be of an integer type: `mx.array([])` is float32 unless you pass a dtype.

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
        """Free every block and forget every token; the empty cache can be used, or freed, again."""
        self.allocator.free_blocks_ids(self.blocks)
        self.blocks, self.current_len = [], 0
