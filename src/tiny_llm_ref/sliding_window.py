"""Sliding windows over pages: a query sees the last W tokens, and blocks that no query can see are freed.

Blocks before the window are neither read nor held, so in these layers a sequence of any length needs only the
memory of one window, and a query reads only one window. W is the checkpoint's `sliding_window`; it includes
the query's own token. Sources: Beltagy et al., "Longformer" (2020); Jiang et al., "Mistral 7B" (2023).
"""

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import mlx.core as mx

from .grouped_attention import grouped_query_attention
from .kernels import accelerated, compiled_kernel, is_reference, use_compiled
from .kv_pool import KVPool
from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator, BlockTable
from .paged_kernel import Attended, PackedBatch, start_computing, write_and_attend

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock

NO_BLOCK = -1  # in a kernel's table: a block that was released, which must not be read


def first_visible(position: int, window: int) -> int:
    """Return the first position that the query at `position` sees.

    The query sees `window` tokens, including its own; near the start of the text there are fewer, so the
    result is never below 0. Raises ValueError for a window below 1, at any position.

    >>> first_visible(5, 3), first_visible(1, 3), first_visible(7, 1)
    (3, 0, 7)
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, not {window}")
    return max(0, position - window + 1)


def sliding_window_mask(length: int, total: int, window: int) -> mx.array:
    """Return the mask [length, total] for the last `length` of `total` tokens, to be added to scores.

    Row i belongs to the token at position total - length + i, which sees the `window` positions up to its
    own: there the mask is 0, elsewhere -inf. A window larger than the text gives the causal mask.

    >>> sliding_window_mask(2, 5, 3).tolist()
    [[-inf, 0.0, 0.0, 0.0, -inf], [-inf, -inf, 0.0, 0.0, 0.0]]
    """
    positions = mx.arange(total - length, total)[:, None]
    others = mx.arange(total)[None, :]
    is_visible = (others <= positions) & (others > positions - window)
    return mx.where(is_visible, 0.0, -mx.inf)


class WindowedTable(BlockTable):
    """A block table that starts at position `start` of the text: the blocks before it were released.

    `start` is a multiple of the block size. `blocks` and `num_tokens` count from `start` on: the table holds
    the positions start .. start + num_tokens - 1, and `blocks[0]` holds the first of them. Appending tokens
    works as in every `BlockTable`.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.start = 0

    def release_before(self, position: int) -> list[int]:
        """Free this table's reference to every block whose tokens are all before `position` of the text.

        Returns these blocks in order, for the prefix cache. `start`, `blocks` and `num_tokens` change
        together: the table then starts with the next block. Only full blocks are released, including a full
        last block; a last block that is not full stays, however large `position` is, because the next tokens
        are written there. A position at or before `start` changes nothing.

        >>> table = WindowedTable(BlockAllocator(8), 4)
        >>> copies = table.append_tokens(10)
        >>> len(table.release_before(7)), table.start, table.num_tokens
        (1, 4, 6)
        >>> len(table.release_before(100)), table.start, table.num_tokens
        (1, 8, 2)
        """
        count = min(max(0, position - self.start), self.num_tokens) // self.block_size
        passed, self.blocks = self.blocks[:count], self.blocks[count:]
        for block in passed:
            self.allocator.free(block)
        self.start += count * self.block_size
        self.num_tokens -= count * self.block_size
        return passed

    def skip_to(self, position: int) -> list[int]:
        """Free every block and continue, empty, at `position`. Return the released blocks in order.

        This is for a prefix hit that ends so far ahead that the window sees none of the table's tokens.
        Raises ValueError, and changes nothing, if `position` is not a multiple of the block size, or is
        before the end of the table's tokens, start + num_tokens (the end itself is allowed). The given
        `release` frees the blocks, empties the list `blocks`, and sets `start` to 0.

        >>> table = WindowedTable(BlockAllocator(8), 4)
        >>> copies = table.append_tokens(6)
        >>> len(table.skip_to(12)), table.start, table.num_tokens, table.blocks
        (2, 12, 0, [])
        """
        if position % self.block_size or position < self.start + self.num_tokens:
            end = self.start + self.num_tokens
            raise ValueError(
                f"position must be a multiple of {self.block_size} and at least {end}, not {position}"
            )
        blocks = list(self.blocks)
        self.release()
        self.start = position
        return blocks

    def physical_indices(self) -> list[int]:
        """Return one block id for each of the text's blocks, in order; `NO_BLOCK` for those before `start`.

        A kernel looks up position p at index p // block_size of this list, and knows nothing of `start`.
        Return a new list, which the caller may change.

        >>> table = WindowedTable(BlockAllocator(8), 4)
        >>> copies, passed = table.append_tokens(14), table.release_before(9)
        >>> table.physical_indices() == [NO_BLOCK, NO_BLOCK, *table.blocks], len(table.blocks)
        (True, 2)
        """
        return [NO_BLOCK] * (self.start // self.block_size) + self.blocks

    def slots(self, start: int, stop: int) -> list[int]:
        """Return the slots of the text's positions start .. stop - 1; ValueError if the table lacks one.

        The inherited method counts positions from the table's first token.
        """
        return super().slots(start - self.start, stop - self.start)

    def fork(self) -> "WindowedTable":
        """Return a table with the same start, blocks and tokens; it is one more holder of each block."""
        child = WindowedTable(self.allocator, self.block_size)
        child.blocks, child.num_tokens, child.start = list(self.blocks), self.num_tokens, self.start
        for shared in child.blocks:
            child.allocator.add_ref(shared)
        return child

    def release(self) -> None:
        """Free this table's reference to each of its blocks, and start at position 0 again."""
        super().release()
        self.start = 0


def first_block(table: BlockTable) -> int:
    """Return which of the text's blocks is the table's first; 0 for a table without a window."""
    return table.start // table.block_size if isinstance(table, WindowedTable) else 0


def _compiled_read(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float, window: int
) -> mx.array:
    kernel = compiled_kernel("paged_attention")
    out: mx.array = kernel(q, keys, values, batch.tables, batch.row_of_token, batch.positions, scale, window)
    return out


@accelerated(compiled=_compiled_read)
def windowed_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float, window: int
) -> mx.array:
    """Attend with q [1, H, T, D] to the last `window` stored tokens -> [1, H, T, D], both float32.

    keys and values are one layer of the pool, [N, Hkv, block_size, D], float32, float16 or bfloat16; nothing
    is written. As in `paged_attention` of day 3.2, the T queries are packed in the order of `batch.spans`,
    each (table, start, stop), and span i reads the blocks in row i of `batch.tables`. But the query at
    position p sees only the positions `first_visible(p, window)` .. p of its sequence.

    Do not read blocks that no query of the span sees: the table may have any id there, such as `NO_BLOCK` or
    a block that another sequence holds by now. Hiding them with the mask is not enough, because 0 * NaN is
    NaN. So read from the start of the block that holds the first position that the span's first query sees,
    up to the span's last position. The tokens read and the span's queries end at the same token, so
    `sliding_window_mask` needs only their two lengths: its `total` is the number of tokens read, not of the
    text.

    Scores are multiplied by `scale`, which may be 0. `keys[blocks]` with an array of n ids gives
    [n, Hkv, block_size, D]: exchange heads and blocks before the reshape to [1, Hkv, tokens, D].

    >>> from tiny_llm.paged_kernel import Span, pack_batch
    >>> table = BlockTable(BlockAllocator(2), 2)
    >>> copies, q = table.append_tokens(4), mx.ones((1, 1, 1, 2))  # D = 2
    >>> values = mx.array([[2.0, 0], [4, 0], [9, 0], [5, 0]]).reshape(2, 1, 2, 2)
    >>> windowed_attention(q, 0 * values, values, pack_batch([Span(table, 3, 4)]), 1.0, window=2).tolist()
    [[[[7.0, 0.0]]]]
    """
    block_size, outputs, packed = keys.shape[2], [], 0
    for row, (_, start, stop) in enumerate(batch.spans):
        first = first_visible(start, window) // block_size
        blocks = batch.tables[row, first : -(-stop // block_size)]
        length = stop - first * block_size
        near_k, near_v = (_gather(pool, blocks, length).astype(q.dtype) for pool in (keys, values))
        rows = q[:, :, packed : packed + stop - start]
        mask = sliding_window_mask(stop - start, length, window)
        outputs.append(grouped_query_attention(rows, near_k, near_v, scale, mask))
        packed += stop - start
    return mx.concatenate(outputs, axis=2)


def _gather(pool: mx.array, blocks: mx.array, length: int) -> mx.array:
    """Read the first `length` tokens of some blocks: pool [N, Hkv, block_size, D] -> [1, Hkv, length, D]."""
    gathered = pool[blocks].swapaxes(0, 1)  # [Hkv, blocks, block_size, D]
    return gathered.reshape(1, pool.shape[1], -1, pool.shape[3])[:, :, :length]


def _compiled(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: PackedBatch,
    scale: float,
    window: int,
) -> Attended:
    kernel = compiled_kernel("write_and_attend")
    where = (batch.slots, batch.tables, batch.row_of_token, batch.positions)
    return Attended(*kernel(q, k, v, keys, values, *where, scale, window))


@accelerated(compiled=_compiled)
def write_and_attend_window(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: PackedBatch,
    scale: float,
    window: int,
) -> Attended:
    """Write k and v [1, Hkv, T, D] to their slots, then attend with q to the last `window` tokens.

    This readable version uses `write_and_attend` only for the write, and ignores its output.
    """
    written = write_and_attend(q, k, v, keys, values, batch, scale)
    out = windowed_attention(q, written.keys, written.values, batch, scale, window)
    return Attended(out, written.keys, written.values)


class WindowedContext:
    """The context of a packed step of a model whose layers have different windows.

    batches: one for each group of layers, with the same tokens and positions but different tables and slots.
    `_where[layer]` is the layer's index in its group, the group's batch, and the window or None.
    """

    def __init__(
        self,
        pool: KVPool,
        groups: Seq[LayerGroup],
        batches: Seq[PackedBatch],
        scale: float,
        logit_rows: mx.array | None,
    ) -> None:
        self.positions = batches[0].positions
        self.logit_rows = logit_rows
        self._pool = pool
        self._scale = scale
        self._where = {
            layer: (index, batch, group.window)
            for group, batch in zip(groups, batches, strict=True)
            for index, layer in enumerate(group.layers)
        }

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store k and v [1, Hkv, T, D] of a layer, then attend with q [1, H, T, D] -> [1, H, T, D].

        The first layers of all groups share the pool's layer 0, the second layers share its layer 1, and so
        on; the groups write to different blocks, so they never overwrite each other. The pool's layer is
        therefore `index`, the layer's index in its group, which `_where` has:

        1. `pool.lend(index)` returns the pool's keys and values.
        2. Write and attend, with the group's batch and the scale: `write_and_attend` (day 3.2) for a layer
           without a window, the given `write_and_attend_window` for any other. Both return an `Attended`.
        3. `pool.put_back(index, keys, values)`, with the arrays of the `Attended`.
        4. `_compute(layer, attended)`: lets MLX start to compute.
        5. Return the output.

        >>> from tiny_llm.paged_kernel import Span, pack_batch
        >>> pool, table = KVPool(4, 2, 1, 2, dtype=mx.float32), WindowedTable(BlockAllocator(4), 2)
        >>> copies, x = table.append_tokens(3), mx.array([[[[2.0, 0], [4, 0], [9, 0]]]])
        >>> batch, groups = pack_batch([Span(table, 0, 3)]), [LayerGroup((0,), window=2)]
        >>> WindowedContext(pool, groups, [batch], 1.0, None).attend(0, 0 * x, 0 * x, x).tolist()
        [[[[2.0, 0.0], [3.0, 0.0], [6.5, 0.0]]]]
        """
        index, batch, window = self._where[layer]
        lent = self._pool.lend(index)
        if window is None:
            attended = write_and_attend(q, k, v, *lent, batch, self._scale)
        else:
            attended = write_and_attend_window(q, k, v, *lent, batch, self._scale, window)
        self._pool.put_back(index, attended.keys, attended.values)
        self._compute(layer, attended)
        return attended.out

    @property
    def fuses(self) -> bool:
        """True if compiled kernels write and attend, so that a compiled block may do both."""
        attending = (write_and_attend, write_and_attend_window)
        return all(is_reference(one) for one in attending) and use_compiled()

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """Run x [1, T, E] through one compiled block -> [1, T, E]; write its keys and values to the pool."""
        pool_layer, step, window = self._where[layer]
        lent = self._pool.lend(pool_layer)
        rows = self.logit_rows if layer == len(self._where) - 1 else None
        where = (step.slots, step.tables, step.row_of_token, step.positions)
        out, *pools = block(x, *lent, *where, self._scale, window, out_rows=rows)
        self._pool.put_back(pool_layer, *pools)
        start_computing(layer, out)
        return out

    def _compute(self, layer: int, attended: Attended) -> None:
        """Let MLX compute while Python builds the graph of the next layers.

        Without compiled kernels, compute everything now: groups share the pool's arrays, and MLX copies an
        array that is written while an unevaluated read of it exists.
        """
        if not use_compiled():
            mx.eval(attended)
        else:
            start_computing(layer, attended.out)
