"""Blocks on demand: a sequence holds as many as its tokens need, and gives them back when it ends.

Internal waste shrinks to part of one block. Whether a sequence's blocks must lie side by side decides the
rest: `alloc_contiguous` fails where enough blocks are free but scattered (external fragmentation), where
`alloc_blocks` never does.
"""

from collections.abc import Sequence

import mlx.core as mx

from .errors import OutOfBlocksError
from .naive_cache import KeysValues


class GlobalAllocator:
    """A pool of `total_blocks` blocks of `block_size` tokens, shared by every sequence.

    num_heads: heads of keys and values (Hkv). keys, values: [total_blocks, block_size, Hkv, D]. Knows which
    blocks are free, not whose the others are.
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
        self.keys = mx.zeros((total_blocks, block_size, num_heads, head_dim), dtype)
        self.values = mx.zeros((total_blocks, block_size, num_heads, head_dim), dtype)
        self.free_blocks = set(range(total_blocks))

    def alloc_blocks(self, num_blocks: int) -> list[int]:
        """Take any free blocks. Raises `OutOfBlocksError`, and takes none, where too few are free."""
        if num_blocks > len(self.free_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} blocks asked for, {len(self.free_blocks)} of {self.total_blocks} are free"
            )
        return [self.free_blocks.pop() for _ in range(num_blocks)]

    def free_blocks_ids(self, block_ids: Sequence[int]) -> None:
        """Give blocks back.

        Raises ValueError, and gives none of them back, where one is free, not of this pool, or named twice.
        """
        held = set(range(self.total_blocks)) - self.free_blocks
        if len(set(block_ids)) < len(block_ids) or not held.issuperset(block_ids):
            raise ValueError(f"of blocks {list(block_ids)} some are free, named twice or not of this pool")
        self.free_blocks.update(block_ids)

    def alloc_contiguous(self, num_blocks: int) -> list[int]:
        """Take free blocks that lie side by side: ids that follow each other.

        Raises `OutOfBlocksError`, and takes none, where no run of free blocks is that long, however many are
        free in all.
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
        """How many free blocks lie side by side at most."""
        longest = run = 0
        for is_free in (block in self.free_blocks for block in range(self.total_blocks)):
            run = run + 1 if is_free else 0
            longest = max(longest, run)
        return longest


class DynamicKVCache:
    """One sequence's keys and values of one layer, in blocks of a shared pool.

    seq_id: a name, for messages. blocks: their ids, in the order of the tokens.

    Invariant: token i is in block `blocks[i // block_size]`.
    """

    def __init__(self, allocator: GlobalAllocator, seq_id: str) -> None:
        self.allocator = allocator
        self.seq_id = seq_id
        self.blocks: list[int] = []
        self.current_len = 0

    def allocate_for_prompt(self, prompt_len: int) -> None:
        """Take the blocks that a prompt of so many tokens needs; the tokens are appended afterwards.

        They go behind the blocks that are held already. Raises `OutOfBlocksError`, and takes none, where
        too few are free.
        """
        self.blocks += self.allocator.alloc_blocks(-(-prompt_len // self.allocator.block_size))

    def append_token(self, k: mx.array, v: mx.array) -> None:
        """Store the next token, k and v [Hkv, D]; a new block is taken only when all that are held are full.

        Raises `OutOfBlocksError`, and stores nothing, where a block is needed and none is free.
        """
        place, offset = divmod(self.current_len, self.allocator.block_size)
        if place == len(self.blocks):
            self.blocks += self.allocator.alloc_blocks(1)
        block = self.blocks[place]
        self.allocator.keys[block, offset] = k
        self.allocator.values[block, offset] = v
        self.current_len += 1

    def read(self) -> KeysValues:
        """All stored tokens in their order, as `KeysValues(keys, values)`, [current_len, Hkv, D] each.

        A cache without any token gives arrays of length 0.
        """
        index = mx.array(self.blocks, mx.int32)
        pools = (self.allocator.keys, self.allocator.values)
        gathered = (
            pool[index].reshape(-1, *pool.shape[2:]) for pool in pools
        )  # [blocks * block_size, Hkv, D]
        return KeysValues(*(tokens[: self.current_len] for tokens in gathered))

    def free(self) -> None:
        """Give every block back and forget every token."""
        self.allocator.free_blocks_ids(self.blocks)
        self.blocks, self.current_len = [], 0
