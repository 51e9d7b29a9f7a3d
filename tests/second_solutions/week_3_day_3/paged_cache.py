"""A cache of named sequences: a view on a pool, an allocator and block tables.

`PagedKVCache(...)` makes its own pool of one layer, as the lab's cache does; `PagedKVCache.of(...)` is a view
on the parts of a running engine. Either way a sequence's tokens are in the blocks of its table, and tables
may share blocks. Knows nothing of attention, of models, or of when a sequence should run.
"""

import mlx.core as mx

from .paged_attention import BlockCopy, BlockTable


class PagedKVCache:
    def allocate(self, seq_id: str, num_tokens: int) -> list[int]:
        """Make room for `num_tokens` more tokens of a sequence, and return all its blocks in order.

        A known sequence grows: it keeps its table, its blocks and its tokens, and the new tokens come behind
        them. An unknown id begins a sequence with an empty `BlockTable`. The returned list is the caller's
        own.

        The table's `append_tokens` returns the copies that a shared last block needs; `pool.copy_blocks`
        makes them. Raises ValueError for a negative number, and `OutOfBlocksError` if too few blocks are
        free. After either error nothing has changed, and a new sequence is not in `tables`. 0 tokens are
        allowed.

        >>> cache = PagedKVCache(total_blocks=8, block_size=4, num_heads=1, head_dim=2)
        >>> len(cache.allocate("a", 5)), len(cache.allocate("a", 4)), cache.tables["a"].num_tokens
        (2, 3, 9)
        """
        if num_tokens < 0:
            raise ValueError(f"cannot make room for {num_tokens} tokens")
        table = self.tables.get(seq_id)
        if table is None:
            table = BlockTable(self.allocator, self.pool.block_size)
        copies = table.append_tokens(num_tokens)
        self.pool.copy_blocks(copies)
        self.tables[seq_id] = table
        return table.physical_indices()

    def write_token(self, seq_id: str, token_idx: int, k: mx.array, v: mx.array) -> None:
        """Store the key and value of one token, each [Hkv, D]; the pool converts them to its type.

        token_idx: a position that `allocate` made room for, written before or not. Other sequences never see
        the write: if the block at that position, whichever it is, has more than one holder, this table first
        gets a copy of the whole block, in all layers, in the shared block's place, and gives its reference to
        the shared one back. A block of its own is written where it is, and needs no free block.

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
        index = token_idx // table.block_size
        block = table.blocks[index]
        if self.allocator.ref_count(block) > 1:
            own = self.allocator.allocate()
            self.pool.copy_blocks([BlockCopy(block, own, table.block_size)])
            table.blocks[index] = own
            self.allocator.free(block)
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
        slots = mx.array(self.tables[seq_id].slots(start_token, start_token + num_tokens), mx.int32)
        keys, values = self.pool.read(self.layer, slots)
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
            raise ValueError(f"a window has at least one block, not {window_blocks}")
        table = self.tables[seq_id]
        self._check_position(table, token_idx)
        first_block = max(0, token_idx // table.block_size - window_blocks + 1)
        start = first_block * table.block_size
        return self.read_blocks(seq_id, start, token_idx + 1 - start)
