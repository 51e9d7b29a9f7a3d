"""A cache of named sequences: a view of a pool, an allocator and block tables.

`PagedKVCache(...)` makes its own pool of one layer, enough to try it by itself; `PagedKVCache.of(...)` is a
view of the parts of a running engine. In both cases a sequence's tokens are in the blocks of its table, and
tables may share blocks. Knows nothing of attention, models or scheduling.
"""

import mlx.core as mx

from .paged_attention import BlockCopy, BlockTable


class PagedKVCache:
    def allocate(self, seq_id: str, num_tokens: int) -> list[int]:
        if num_tokens < 0:
            raise ValueError(f"cannot append {num_tokens} tokens")
        table = self.tables.get(seq_id)
        if table is None:
            table = BlockTable(self.allocator, self.pool.block_size)
        copies = table.append_tokens(num_tokens)
        self.pool.copy_blocks(copies)
        self.tables[seq_id] = table
        return table.physical_indices()

    def write_token(self, seq_id: str, token_idx: int, k: mx.array, v: mx.array) -> None:
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
        slots = mx.array(self.tables[seq_id].slots(start_token, start_token + num_tokens), mx.int32)
        keys, values = self.pool.read(self.layer, slots)
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)

    def read_sparse(self, seq_id: str, token_idx: int, window_blocks: int) -> tuple[mx.array, mx.array]:
        if window_blocks < 1:
            raise ValueError(f"a window has at least one block, not {window_blocks}")
        table = self.tables[seq_id]
        self._check_position(table, token_idx)
        first_block = max(0, token_idx // table.block_size - window_blocks + 1)
        start = first_block * table.block_size
        return self.read_blocks(seq_id, start, token_idx + 1 - start)
