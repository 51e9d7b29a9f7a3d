"""Sliding windows over pages: a query sees the last W tokens, and pages that no query can see go back.

Blocks before the window are neither read nor held, so in these layers a sequence of any length costs a
window's memory and traffic. W is the checkpoint's `sliding_window`; a query's own token counts. Source:
Beltagy et al., "Longformer" (2020); Jiang et al., "Mistral 7B" (2023).
"""

import mlx.core as mx

from .grouped_attention import grouped_query_attention
from .paged_kernel import PackedBatch, write_and_attend


def first_visible(position: int, window: int) -> int:
    """Return the first position that the query at `position` sees.

    It sees `window` tokens, its own included, or fewer near the beginning: there is nothing before position
    0. Raises ValueError for a window below 1, at any position.

    >>> first_visible(5, 3), first_visible(1, 3), first_visible(7, 1)
    (3, 0, 7)
    """
    if window < 1:
        raise ValueError(f"a window has at least one token, not {window}")
    return max(0, position - window + 1)


def sliding_window_mask(length: int, total: int, window: int) -> mx.array:
    """Return the additive mask [length, total] for the last `length` of `total` tokens.

    0 where a token may look, -inf elsewhere. Row i is the token at position total - length + i; it sees the
    `window` positions up to its own. A window larger than the text gives the causal mask.

    >>> sliding_window_mask(2, 5, 3).tolist()
    [[-inf, 0.0, 0.0, 0.0, -inf], [-inf, -inf, 0.0, 0.0, 0.0]]
    """
    rows = mx.arange(total - length, total)[:, None]
    columns = mx.arange(total)[None, :]
    visible = (columns <= rows) & (columns > rows - window)
    return mx.where(visible, 0.0, -mx.inf)


class WindowedTable:
    def release_before(self, position: int) -> list[int]:
        """Give back this table's reference to every block that ends at `position` or before.

        Returns these blocks in order, so that a prefix cache can be told. Positions are those of the text.
        Only full blocks go: the last block stays while it is not full, however far `position` is, because the
        next tokens are written there. A last block that is full goes too. The table begins with the next
        block then: `start`, `blocks` and `num_tokens` change together. A position at `start` or before it
        changes nothing.

        >>> table = WindowedTable(BlockAllocator(8), 4)
        >>> copies = table.append_tokens(10)
        >>> len(table.release_before(7)), table.start, table.num_tokens
        (1, 4, 6)
        >>> len(table.release_before(100)), table.start, table.num_tokens
        (1, 8, 2)
        """
        count = max(0, min(position - self.start, self.num_tokens) // self.block_size)
        passed, self.blocks = self.blocks[:count], self.blocks[count:]
        for block in passed:
            self.allocator.free(block)
        self.start += count * self.block_size
        self.num_tokens -= count * self.block_size
        return passed

    def skip_to(self, position: int) -> list[int]:
        """Give back every block and continue, empty, at `position`. Returns the blocks in order.

        A prefix hit may lie so far ahead that the window sees nothing of what the table holds. Raises
        ValueError, with nothing changed, if `position` is no multiple of the block size or lies before the
        end of the table's tokens, start + num_tokens; at the end is allowed. The given `release` empties the
        table and sets `start` to 0.

        >>> table = WindowedTable(BlockAllocator(8), 4)
        >>> copies = table.append_tokens(6)
        >>> len(table.skip_to(12)), table.start, table.num_tokens, table.blocks
        (2, 12, 0, [])
        """
        end = self.start + self.num_tokens
        if position % self.block_size or position < end:
            raise ValueError(f"cannot skip to {position}: not an edge at {end} or behind it")
        blocks = list(self.blocks)
        self.release()
        self.start = position
        return blocks

    def physical_indices(self) -> list[int]:
        """Return the physical block of each of the text's blocks, in order; `NOWHERE` before `start`.

        A kernel looks for position p in place p // block_size of this list and knows nothing of `start`. The
        list is the caller's own.

        >>> table = WindowedTable(BlockAllocator(8), 4)
        >>> copies, passed = table.append_tokens(14), table.release_before(9)
        >>> table.physical_indices() == [NOWHERE, NOWHERE, *table.blocks], len(table.blocks)
        (True, 2)
        """
        return [NOWHERE] * (self.start // self.block_size) + self.blocks


def windowed_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float, window: int
) -> mx.array:
    """Attend with q [1, H, T, D] to the last `window` stored tokens of each sequence -> [1, H, T, D].

    keys and values are one layer of the pool, [N, Hkv, block_size, D]; nothing is written. As
    `paged_attention` of day 3.2: the T queries are those of `batch.spans`, (table, start, stop), one span
    behind the other, and span i reads the blocks in row i of `batch.tables`. But the query at position p sees
    only the positions `first_visible(p, window)` .. p of its sequence.

    Do not read blocks that no query of the span sees: the tables may name anything there, `NOWHERE` or a
    block that another sequence has by now. A weight of 0 does not help, because 0 * NaN is NaN. So reading
    begins with the block of the first position that the span's first query sees, and ends with the span's
    last position. What is read and the span's queries end at the same token, so `sliding_window_mask` needs
    only their two lengths.

    Keys and values may be stored in float16: convert them to q's type. Scores are scaled by `scale`; 0 is a
    scale. `keys[blocks]` with an array of n ids gives [n, Hkv, block_size, D]: swap heads and blocks before
    the reshape to [1, Hkv, tokens, D].

    >>> from tiny_llm.paged_kernel import Span, pack_batch
    >>> table = BlockTable(BlockAllocator(2), 2)
    >>> copies, q = table.append_tokens(4), mx.ones((1, 1, 1, 2))  # D = 2
    >>> values = mx.array([[2.0, 0], [4, 0], [9, 0], [5, 0]]).reshape(2, 1, 2, 2)
    >>> windowed_attention(q, 0 * values, values, pack_batch([Span(table, 3, 4)]), 1.0, window=2).tolist()
    [[[[7.0, 0.0]]]]
    """
    _, num_kv_heads, block_size, size = keys.shape
    outs, row = [], 0
    for index, (_, start, stop) in enumerate(batch.spans):
        length = stop - start
        first = first_visible(start, window) // block_size
        blocks = batch.tables[index, first : -(-stop // block_size)]
        total = stop - first * block_size  # tokens that are read
        k, v = (
            stored[blocks].swapaxes(0, 1).reshape(1, num_kv_heads, -1, size)[:, :, :total].astype(q.dtype)
            for stored in (keys, values)
        )
        mask = sliding_window_mask(length, total, window).astype(q.dtype)
        outs.append(grouped_query_attention(q[:, :, row : row + length], k, v, scale, mask))
        row += length
    return mx.concatenate(outs, axis=2)


class WindowedContext:
    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store k and v [1, Hkv, T, D] of a layer, then attend with q [1, H, T, D] -> [1, H, T, D].

        The model's layers share few arrays: a group writes to blocks of its own, so the first layers of all
        groups are one layer of the pool, the second layers another. `pool.lend(place)` gives the keys and
        values of the layer's place in its group, and `pool.put_back(place, keys, values)` must follow with
        the arrays that the write returned. Write and attend with the group's batch and the scale: a layer
        without a window by `write_and_attend` of day 3.2, another by the given `write_and_attend_window`.
        Before you return the output, call `_compute(layer, attended)` with the `Attended` that came out: MLX
        starts to compute then.

        >>> from tiny_llm.paged_kernel import Span, pack_batch
        >>> pool, table = KVPool(4, 2, 1, 2, dtype=mx.float32), WindowedTable(BlockAllocator(4), 2)
        >>> copies, x = table.append_tokens(3), mx.array([[[[2.0, 0], [4, 0], [9, 0]]]])
        >>> batch, groups = pack_batch([Span(table, 0, 3)]), [LayerGroup((0,), window=2)]
        >>> WindowedContext(pool, groups, [batch], 1.0, None).attend(0, 0 * x, 0 * x, x).tolist()
        [[[[2.0, 0.0], [3.0, 0.0], [6.5, 0.0]]]]
        """
        place, batch, window = self._where[layer]
        keys, values = self._pool.lend(place)
        if window is None:
            attended = write_and_attend(q, k, v, keys, values, batch, self._scale)
        else:
            attended = write_and_attend_window(q, k, v, keys, values, batch, self._scale, window)
        self._pool.put_back(place, attended.keys, attended.values)
        self._compute(layer, attended)
        return attended.out
