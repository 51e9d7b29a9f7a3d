"""A cache of named sequences: a view of a pool, an allocator and block tables.

`PagedKVCache(...)` makes its own pool of one layer, enough to try the cache by itself; `PagedKVCache.of(...)`
is a view of the parts of a running engine. In both cases a sequence's tokens are in the blocks of its table,
and tables may share blocks. Knows nothing of attention, models or scheduling.
"""

from typing import Self

import mlx.core as mx

from .kv_pool import KVPool
from .paged_attention import BlockAllocator, BlockCopy, BlockTable
from .slot_mapping import flat_slots


class PagedKVCache:
    """Keys and values of one layer, read and written by sequence id and position.

    total_blocks: blocks in the pool, of block_size tokens each. num_heads: key and value heads (Hkv). tables:
    the block table of each sequence by its id. To share blocks, store a fork of a table under another id.

    Every method that takes a sequence id raises KeyError for an id that is not in `tables`, except
    `allocate`, which starts a new sequence.
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
        pool = KVPool(total_blocks, block_size, num_heads, head_dim, dtype=dtype)
        self._set_parts(pool, allocator, {}, 0)

    @classmethod
    def of(
        cls, pool: KVPool, allocator: BlockAllocator, tables: dict[str, BlockTable], layer: int = 0
    ) -> Self:
        """Make a view of one layer of an existing pool, for instance a running engine's.

        tables: by sequence id, for instance `{s.seq_id: s.table for s in manager.running}`. Nothing is
        copied: writing and freeing through this view changes the engine's pool and tables. Raises ValueError
        if pool, allocator and tables do not belong together, and IndexError for a layer that the pool lacks.
        """
        _check_same_pool(pool, allocator, tables)
        cache = cls.__new__(cls)
        cache._set_parts(pool, allocator, tables, layer)
        return cache

    def _set_parts(
        self, pool: KVPool, allocator: BlockAllocator, tables: dict[str, BlockTable], layer: int
    ) -> None:
        self.pool = pool
        self.allocator = allocator
        self.tables = tables
        self.layer = layer
        no_tokens, _ = pool.read(layer, mx.array([], mx.int32))  # [0, Hkv, D]
        self._token_shape = no_tokens.shape[1:]

    def allocate(self, seq_id: str, num_tokens: int) -> list[int]:
        """Add places for `num_tokens` (0 or more) tokens to a sequence, and return all its blocks in order.

        If the sequence is in `tables`, it keeps its table, blocks and tokens, and the new tokens follow them.
        Otherwise it starts with an empty `BlockTable`. The returned list is a copy that the caller may
        change.

        The table's `append_tokens` returns the copies that a shared last block needs; make them with
        `pool.copy_blocks`. It raises `OutOfBlocksError`, with nothing changed, if too few blocks are free; do
        not catch that error. It does not check for a negative `num_tokens`: raise ValueError for one
        yourself. After either error nothing has changed, and a new sequence is not in `tables`.

        >>> cache = PagedKVCache(total_blocks=8, block_size=4, num_heads=1, head_dim=2)
        >>> len(cache.allocate("a", 5)), len(cache.allocate("a", 4)), cache.tables["a"].num_tokens
        (2, 3, 9)
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, not {num_tokens}")
        table = self.tables.get(seq_id, BlockTable(self.allocator, self.pool.block_size))
        copies = table.append_tokens(num_tokens)
        self.pool.copy_blocks(copies)
        self.tables[seq_id] = table
        return table.physical_indices()

    def write_token(self, seq_id: str, token_idx: int, k: mx.array, v: mx.array) -> None:
        """Store the key and value of one token, each [Hkv, D]; the pool converts them to its type.

        token_idx: any position of the sequence, written before or not. Other sequences never see the write.
        If the position's block, which need not be the last, has more than one holder, first give this table a
        copy: allocate a block, copy the whole shared block into it in all layers, put its id in the shared
        block's place in the table, and free this table's reference to the shared block.
        `pool.copy_blocks([BlockCopy(src, dst, length)])` copies; the length is `block_size`, because any of
        the block's tokens may be needed. A block that no other table holds is written in place, and takes no
        free block.

        Raises ValueError for a position that the sequence does not have, or if k or v has another shape;
        `OutOfBlocksError` if a copy is needed and no block is free. Check the arguments before you take a
        block: after an error nothing has changed.

        >>> cache = PagedKVCache(8, 4, num_heads=1, head_dim=2)
        >>> shared = cache.allocate("a", 6)
        >>> cache.tables["b"] = cache.tables["a"].fork()
        >>> cache.write_token("b", 1, mx.ones((1, 2)), mx.ones((1, 2)))
        >>> cache.tables["a"].blocks == shared, cache.tables["b"].blocks[0] == shared[0]
        (True, False)
        """
        table = self.tables[seq_id]
        self._check_position(table, token_idx)
        self._check_token(k, v)
        self._copy_if_shared(table, token_idx // table.block_size)
        slot = mx.array(table.slots(token_idx, token_idx + 1), mx.int32)
        self.pool.write(self.layer, slot, k[None], v[None])

    def read_blocks(self, seq_id: str, start_token: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Return keys and values of `num_tokens` tokens from `start_token` on, each [Hkv, num_tokens, D].

        The tokens are in the order of their positions, whatever the order of the block ids. The arrays are
        copies, which later writes do not change. `pool.read` returns [num_tokens, Hkv, D]: exchange the two
        axes with `swapaxes` (a `reshape` would mix the heads' numbers).

        0 tokens give arrays [Hkv, 0, D]. Raises ValueError if the range is not within the sequence's tokens
        or `num_tokens` is negative: the table's `slots` does that.

        >>> cache = PagedKVCache(8, 4, num_heads=1, head_dim=2)
        >>> blocks = cache.allocate("a", 6)
        >>> cache.write_token("a", 5, mx.ones((1, 2)), 2 * mx.ones((1, 2)))
        >>> keys, values = cache.read_blocks("a", 4, 2)
        >>> keys.shape, values[0, 1].tolist()
        ((1, 2, 2), [2.0, 2.0])
        """
        slots = self.tables[seq_id].slots(start_token, start_token + num_tokens)
        keys, values = self.pool.read(self.layer, mx.array(slots, mx.int32))  # [num_tokens, Hkv, D]
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)

    def read_sparse(self, seq_id: str, token_idx: int, window_blocks: int) -> tuple[mx.array, mx.array]:
        """Return keys and values of the last `window_blocks` blocks up to a token, each [Hkv, tokens, D].

        The last block is the one that holds token `token_idx`, and is read only up to that token. With blocks
        of 16, token 500 and 4 blocks, these are the tokens 448 .. 500: 53 tokens. Near the start of the
        sequence there are fewer than `window_blocks` blocks, and reading starts at token 0.

        Raises ValueError for a window below 1, and for a position that the sequence does not have: 5 tokens
        have the positions 0 .. 4, even if the last block has places for more. Check the position first
        (`_check_position`): in Python -1 // 16 is -1.

        >>> cache = PagedKVCache(8, 4, num_heads=1, head_dim=2)
        >>> blocks = cache.allocate("a", 14)
        >>> cache.read_sparse("a", 13, 2)[0].shape, cache.read_sparse("a", 2, 2)[0].shape
        ((1, 6, 2), (1, 3, 2))
        """
        if window_blocks < 1:
            raise ValueError(f"window_blocks must be at least 1, not {window_blocks}")
        table = self.tables[seq_id]
        self._check_position(table, token_idx)
        first_block = max(0, token_idx // table.block_size - window_blocks + 1)
        start = first_block * table.block_size
        return self.read_blocks(seq_id, start, token_idx + 1 - start)

    def free_sequence(self, seq_id: str) -> None:
        """Remove a sequence and free its references to its blocks; other holders keep a shared block.

        An unknown id raises KeyError, because ignoring it would hide a bug: the sequence was freed before,
        or its id is misspelt and its blocks would stay allocated.
        """
        self.tables.pop(seq_id).release()

    def build_flat_slot_mapping(self, sequences: list[tuple[str, int]]) -> mx.array:
        """Return the slots of each sequence's first tokens, sequence after sequence: int32 [total].

        sequences: pairs of an id and a number of tokens, counted from the first. A token's key and value have
        the same slot, in separate arrays. Raises ValueError if a number is more than the sequence has.
        """
        return flat_slots([self.tables[seq_id] for seq_id, _ in sequences], [n for _, n in sequences])

    def _copy_if_shared(self, table: BlockTable, place: int) -> None:
        """Replace the block at this index of the table by a copy, if it has another holder."""
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
        raise ValueError(
            f"the allocator has {allocator.num_blocks} blocks, but the pool has {pool.num_blocks}"
        )
    for seq_id, table in tables.items():
        if table.allocator is not allocator or table.block_size != pool.block_size:
            whose = "this" if table.allocator is allocator else "another"
            raise ValueError(
                f"the table of {seq_id!r} must have blocks of {pool.block_size} tokens from this allocator, "
                f"not blocks of {table.block_size} from {whose} allocator"
            )
