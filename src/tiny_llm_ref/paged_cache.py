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
        """Make room for `num_tokens` more tokens of a sequence, and return all its blocks in order.

        A known sequence grows: it keeps its table, its blocks and its tokens, and the new tokens come behind
        them. An unknown id begins a sequence with an empty `BlockTable`. The returned list is the caller's
        own.

        The table's `append_tokens` returns the copies that a shared last block needs; `pool.copy_blocks`
        makes them. It raises `OutOfBlocksError`, with nothing changed, if too few blocks are free; let that
        error pass. Check yourself that `num_tokens` is not negative, and raise ValueError if it is:
        `append_tokens` does not check. After either error nothing has changed, and a new sequence is not in
        `tables`. 0 tokens are allowed.

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

        token_idx: a position that `allocate` made room for, written before or not. Other sequences never see
        the write: if the block at that position, whichever it is, has more than one holder, this table first
        gets a copy of the whole block, in all layers, in the shared block's place, and gives its reference to
        the shared one back. `pool.copy_blocks([BlockCopy(src, dst, length)])` copies; the length is
        `block_size`, because any of the block's tokens may be needed. A block of its own is written where it
        is, and needs no free block.

        Raises ValueError for a position without a token or for another shape, `OutOfBlocksError` if a copy
        finds no free block. Check before you take a block: after an error nothing has changed.

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
        self._own_block(table, token_idx // table.block_size)
        slot = mx.array(table.slots(token_idx, token_idx + 1), mx.int32)
        self.pool.write(self.layer, slot, k[None], v[None])

    def read_blocks(self, seq_id: str, start_token: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Return keys and values of `num_tokens` tokens from `start_token` on, each [Hkv, num_tokens, D].

        The tokens come in the order of their positions, whatever the order of the block ids. They are copies,
        which later writes do not change. `pool.read` returns [num_tokens, Hkv, D]: the two axes change places
        (`swapaxes`; a `reshape` would keep the order of the numbers and give heads the tokens of others).

        0 tokens give arrays [Hkv, 0, D]. Raises ValueError if the range is not within the sequence's tokens,
        a negative `num_tokens` included: the table's `slots` does that.

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

        The block that holds token `token_idx` is the last of them, and is read only up to that token. With
        blocks of 16, token 500 and 4 blocks these are the tokens 448 .. 500: 53 tokens. Near the beginning
        there are fewer than `window_blocks` blocks, and reading begins with token 0.

        Raises ValueError for a window below 1, or a position that the sequence does not have: 5 tokens have
        the positions 0 .. 4, although the last block has room for more. Check the position first
        (`_check_position`): -1 // 16 is -1 in Python.

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

    def _own_block(self, table: BlockTable, place: int) -> None:
        """Make sure that no other holder has the block at this place: replace a shared one by a copy."""
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
