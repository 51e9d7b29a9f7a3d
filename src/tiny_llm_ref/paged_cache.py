"""A cache of named sequences: a view on a pool, an allocator and block tables, which it does not replace.

Made by itself it has a pool of one layer, as the lab's cache has; `of` looks at a running engine's parts.
Either way a sequence's tokens are in the blocks of its table, and tables may share blocks. Knows nothing of
attention, of models, or of when a sequence should run.
"""

from typing import Self

import mlx.core as mx

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy, BlockTable
from .slot_mapping import flat_slots


class PagedKVCache:
    """Keys and values of one layer, read and written by sequence id and position.

    total_blocks: blocks in the pool, of block_size tokens. num_heads: heads of keys and values (Hkv).
    tables: each sequence's block table. To share blocks put a fork of a table under another id.

    Every method that takes a sequence id raises KeyError for one that is not in `tables`, but `allocate`,
    which begins it.
    """

    def __init__(
        self,
        total_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        dtype: mx.Dtype = mx.bfloat16,
    ) -> None:
        allocator = BlockAllocator(total_blocks)
        self._look_at(KVPool(total_blocks, block_size, num_heads, head_dim, dtype=dtype), allocator, {}, 0)

    @classmethod
    def of(
        cls, pool: KVPool, allocator: BlockAllocator, tables: dict[str, BlockTable], layer: int = 0
    ) -> Self:
        """Look at one layer of a pool that others fill, for instance a running engine's.

        tables: by sequence id, for instance `{s.seq_id: s.table for s in manager.running}`. They are the
        engine's own: what is written or freed through this view is written or freed there. Raises ValueError
        where pool, allocator and tables do not belong together, IndexError for a layer that the pool has not.
        """
        _check_same_pool(pool, allocator, tables)
        cache = cls.__new__(cls)
        cache._look_at(pool, allocator, tables, layer)
        return cache

    def _look_at(
        self, pool: KVPool, allocator: BlockAllocator, tables: dict[str, BlockTable], layer: int
    ) -> None:
        self.pool = pool
        self.allocator = allocator
        self.tables = tables
        self.layer = layer
        no_tokens, _ = pool.read(layer, mx.array([], mx.int32))  # [0, Hkv, D]
        self._token_shape = no_tokens.shape[1:]

    def allocate(self, seq_id: str, num_tokens: int) -> list[int]:
        """Make room for `num_tokens` more tokens of a sequence -> all its blocks, in order.

        A sequence that is here already grows behind its tokens; its blocks stay its own. A last block with
        room that others share is copied, and the copy takes its place. Raises `OutOfBlocksError`, and changes
        nothing, where too few blocks are free; ValueError for a negative number.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, not {num_tokens}")
        table = self.tables.get(seq_id, BlockTable(self.allocator, self.pool.block_size))
        copies = table.append_tokens(num_tokens)
        self.pool.copy_blocks(copies)
        self.tables[seq_id] = table
        return table.physical_indices()

    def write_token(self, seq_id: str, token_idx: int, k: mx.array, v: mx.array) -> None:
        """Store the key and value of one token, each [Hkv, D], in the pool's type.

        token_idx: a position that `allocate` made room for, written before or not. Others never see the
        write: a block that they share is copied first, and the copy takes its place in this table. Raises
        ValueError for another position or shape, `OutOfBlocksError` where a copy finds no free block; nothing
        is changed then.
        """
        table = self.tables[seq_id]
        self._check_position(table, token_idx)
        self._check_token(k, v)
        self._own_block(table, token_idx // table.block_size)
        slot = mx.array(table.slots(token_idx, token_idx + 1), mx.int32)
        self.pool.write(self.layer, slot, k[None], v[None])

    def read_blocks(self, seq_id: str, start_token: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the positions from `start_token` on, each [Hkv, num_tokens, D].

        Copies, which later writes do not change. Raises ValueError where the range leaves the sequence's
        tokens.
        """
        slots = self.tables[seq_id].slots(start_token, start_token + num_tokens)
        keys, values = self.pool.read(self.layer, mx.array(slots, mx.int32))  # [num_tokens, Hkv, D]
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)

    def free_sequence(self, seq_id: str) -> None:
        """Forget a sequence and give its blocks back; a block that others hold too stays theirs.

        Raises KeyError for an unknown id: it is a sequence that was freed before, or a misspelt one whose
        blocks would stay taken for good, and neither should pass in silence.
        """
        self.tables.pop(seq_id).release()

    def build_flat_slot_mapping(self, sequences: list[tuple[str, int]]) -> mx.array:
        """The slots of each sequence's first tokens, one sequence after the other: int32 [total].

        sequences: ids, each with the number of tokens wanted. A token's key and value have the same slot, in
        arrays of their own. Raises ValueError where a number is more than the sequence has.
        """
        return flat_slots([self.tables[seq_id] for seq_id, _ in sequences], [n for _, n in sequences])

    def read_sparse(self, seq_id: str, token_idx: int, window_blocks: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the last `window_blocks` blocks up to token `token_idx`, each [Hkv, tokens, D].

        The block that holds the token is the last of them, and is read up to the token: nothing behind it.
        With blocks of 16, token 500 and 4 blocks that is 448 .. 500, 53 tokens; there are fewer near the
        beginning. Raises ValueError for a position that the sequence has not, or a window below 1.
        """
        if window_blocks < 1:
            raise ValueError(f"window_blocks must be at least 1, not {window_blocks}")
        table = self.tables[seq_id]
        self._check_position(table, token_idx)
        first_block = max(0, token_idx // table.block_size - window_blocks + 1)
        start = first_block * table.block_size
        return self.read_blocks(seq_id, start, token_idx + 1 - start)

    def _own_block(self, table: BlockTable, place: int) -> None:
        """Give the table a copy of a block that others hold too, in its place."""
        shared = table.blocks[place]
        if self.allocator.ref_count(shared) == 1:
            return
        fresh = self.allocator.allocate()
        self.pool.copy_blocks([BlockCopy(shared, fresh, table.block_size)])
        self.allocator.free(shared)
        table.blocks[place] = fresh

    def _check_position(self, table: BlockTable, token_idx: int) -> None:
        if not 0 <= token_idx < table.num_tokens:
            raise ValueError(f"position {token_idx} is not within the sequence's {table.num_tokens} tokens")

    def _check_token(self, k: mx.array, v: mx.array) -> None:
        if not k.shape == v.shape == self._token_shape:
            raise ValueError(f"k and v must have shape {self._token_shape}, not {k.shape} and {v.shape}")


def _check_same_pool(pool: KVPool, allocator: BlockAllocator, tables: dict[str, BlockTable]) -> None:
    if allocator.num_blocks != pool.num_blocks:
        raise ValueError(f"the allocator has {allocator.num_blocks} blocks, the pool {pool.num_blocks}")
    for seq_id, table in tables.items():
        if table.allocator is not allocator or table.block_size != pool.block_size:
            raise ValueError(
                f"the table of {seq_id!r} has blocks of {table.block_size} tokens of "
                f"{'this' if table.allocator is allocator else 'another'} allocator, the pool has blocks of "
                f"{pool.block_size}"
            )
