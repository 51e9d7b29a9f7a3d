"""Sliding windows over pages: a query sees the last W tokens, and blocks that no query can see are freed.

Blocks before the window are neither read nor held, so in these layers a sequence of any length needs only the
memory of one window, and a query reads only one window. W is the checkpoint's `sliding_window`; it includes
the query's own token. Sources: Beltagy et al., "Longformer" (2020); Jiang et al., "Mistral 7B" (2023).
"""

import mlx.core as mx

from .grouped_attention import grouped_query_attention
from .paged_kernel import PackedBatch, write_and_attend


def first_visible(position: int, window: int) -> int:
    if window < 1:
        raise ValueError(f"a window has at least one token, not {window}")
    return max(0, position - window + 1)


def sliding_window_mask(length: int, total: int, window: int) -> mx.array:
    rows = mx.arange(total - length, total)[:, None]
    columns = mx.arange(total)[None, :]
    visible = (columns <= rows) & (columns > rows - window)
    return mx.where(visible, 0.0, -mx.inf)


class WindowedTable:
    def release_before(self, position: int) -> list[int]:
        count = max(0, min(position - self.start, self.num_tokens) // self.block_size)
        passed, self.blocks = self.blocks[:count], self.blocks[count:]
        for block in passed:
            self.allocator.free(block)
        self.start += count * self.block_size
        self.num_tokens -= count * self.block_size
        return passed

    def skip_to(self, position: int) -> list[int]:
        end = self.start + self.num_tokens
        if position % self.block_size or position < end:
            raise ValueError(f"cannot skip to {position}: not a block boundary at or after {end}")
        blocks = list(self.blocks)
        self.release()
        self.start = position
        return blocks

    def physical_indices(self) -> list[int]:
        return [NO_BLOCK] * (self.start // self.block_size) + self.blocks


def windowed_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float, window: int
) -> mx.array:
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
        place, batch, window = self._where[layer]
        keys, values = self._pool.lend(place)
        if window is None:
            attended = write_and_attend(q, k, v, keys, values, batch, self._scale)
        else:
            attended = write_and_attend_window(q, k, v, keys, values, batch, self._scale, window)
        self._pool.put_back(place, attended.keys, attended.values)
        self._compute(layer, attended)
        return attended.out
