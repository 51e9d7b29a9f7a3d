"""A cache of named sequences: a view on a pool, an allocator and block tables.

`PagedKVCache(...)` makes its own pool of one layer, as the lab's cache does; `PagedKVCache.of(...)` is a view
on the parts of a running engine. Either way a sequence's tokens are in the blocks of its table, and tables
may share blocks. Knows nothing of attention, of models, or of when a sequence should run.
"""

from typing import Self

import mlx.core as mx

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy, BlockTable
from .slot_mapping import flat_slots


class PagedKVCache:
    """Keys and values of one layer, read and written by sequence id and position.

    total_blocks: blocks in the pool, of block_size tokens each. num_heads: key and value heads (Hkv). tables:
    the block table of each sequence by its id. To share blocks, put a fork of a table under another id.

    Every method that takes a sequence id raises KeyError for an id that is not in `tables`, except
    `allocate`, which begins a new sequence.
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
        """Make a view on one layer of a pool that others fill, for instance a running engine's.

        tables: by sequence id, for instance `{s.seq_id: s.table for s in manager.running}`. They stay the
        engine's: what is written or freed through this view is written or freed there. Raises ValueError if
        pool, allocator and tables do not belong together, IndexError for a layer that the pool does not have.
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
        """A new table enters `tables` after the allocator has agreed."""
        if num_tokens <= -1:
            raise ValueError(f"{num_tokens} tokens")
        table = self.tables.get(seq_id)
        if table is None:
            table = BlockTable(self.allocator, self.pool.block_size)
        if copies := table.append_tokens(num_tokens):
            self.pool.copy_blocks(copies)
        self.tables.update({seq_id: table})
        return [*table.blocks]

    def write_token(self, seq_id: str, token_idx: int, k: mx.array, v: mx.array) -> None:
        """The slot is computed by hand."""
        table = self.tables[seq_id]
        self._check_token(k, v)
        self._check_position(table, token_idx)
        place, offset = divmod(token_idx, self.pool.block_size)
        before = table.blocks[place]
        if self.allocator.ref_count(before) > 1:
            table.blocks[place] = self.allocator.allocate()
            self.pool.copy_blocks([BlockCopy(before, table.blocks[place], self.pool.block_size)])
            self.allocator.free(before)
        slot = table.blocks[place] * self.pool.block_size + offset
        self.pool.write(self.layer, mx.array([slot], mx.int32), mx.expand_dims(k, 0), mx.expand_dims(v, 0))

    def read_blocks(self, seq_id: str, start_token: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Axes moved, not swapped."""
        slots = self.tables[seq_id].slots(start_token, start_token + num_tokens)
        keys, values = self.pool.read(self.layer, mx.array(slots, dtype=mx.int32))
        return mx.moveaxis(keys, 1, 0), mx.transpose(values, (1, 0, 2))

    def read_sparse(self, seq_id: str, token_idx: int, window_blocks: int) -> tuple[mx.array, mx.array]:
        """Counted from the end."""
        self._check_position(self.tables[seq_id], token_idx)
        if window_blocks <= 0:
            raise ValueError(f"a window of {window_blocks} blocks")
        stop = token_idx + 1
        blocks = -(-stop // self.pool.block_size)
        start = self.pool.block_size * max(blocks - window_blocks, 0)
        return self.read_blocks(seq_id, start, stop - start)

    def free_sequence(self, seq_id: str) -> None:
        """Forget a sequence and give its blocks back; a block with other holders stays theirs.

        An unknown id is an error (KeyError): it is a sequence that was freed before, or a misspelt one whose
        blocks would stay taken for good.
        """
        self.tables.pop(seq_id).release()

    def build_flat_slot_mapping(self, sequences: list[tuple[str, int]]) -> mx.array:
        """Return the slots of each sequence's first tokens, one sequence after the other: int32 [total].

        sequences: ids, each with the number of its first tokens that are wanted. A token's key and value have
        the same slot, in arrays of their own. Raises ValueError if a number is more than the sequence has.
        """
        return flat_slots([self.tables[seq_id] for seq_id, _ in sequences], [n for _, n in sequences])

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
