# A second solution, written from the docstrings and the first hints.
"""Attention over pages: one step's tokens, packed in one row, each attending to its own sequence's blocks.

A packed step has prefill chunks and decodes side by side, [1, T], without padding to the longest. Write this
step's keys and values to the pool first, then read everything from the pool, in the pool's type: so the
result has the same bits whether the token before came in this step or in an earlier one.
"""

from collections.abc import Sequence as Seq

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention


def pack_batch(spans: Seq[Span]) -> PackedBatch:
    """Put the tokens of S spans (at least 1) side by side, in order, as a `PackedBatch`.

    Each span's table has places for all tokens of the span already. Positions begin anew in each span, at its
    `start`; slots are the table's own (`BlockTable.slots`), block ids its `physical_indices`. `mx.array`
    makes int32 of Python ints if it is told to: `mx.array(numbers, mx.int32)`.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> one, other = (BlockTable(BlockAllocator(8), block_size=4) for _ in range(2))
    >>> one.blocks, one.num_tokens, other.blocks, other.num_tokens = [5, 1, 3], 9, [7], 2
    >>> batch = pack_batch([Span(one, 7, 9), Span(other, 0, 2)])
    >>> batch.positions.tolist(), batch.slots.tolist()
    ([7, 8, 0, 1], [7, 12, 28, 29])
    >>> batch.row_of_token.tolist(), batch.tables.tolist()
    ([0, 0, 1, 1], [[5, 1, 3], [7, 0, 0]])
    """
    positions, slots, rows, tables = [], [], [], []
    for row, span in enumerate(spans):
        positions.extend(range(span.start, span.stop))
        slots.extend(span.table.slots(span.start, span.stop))
        rows.extend([row] * (span.stop - span.start))
        tables.append(span.table.physical_indices())
    longest = max(len(table) for table in tables)
    padded = [table + [0] * (longest - len(table)) for table in tables]
    return PackedBatch(
        mx.array(positions, mx.int32),
        mx.array(slots, mx.int32),
        mx.array(padded, mx.int32),
        mx.array(rows, mx.int32),
        tuple(spans),
    )


def _gather(pool: mx.array, blocks: mx.array, length: int) -> mx.array:
    """The first `length` tokens in the blocks of these ids, as float32 [1, Hkv, length, D]."""
    _, heads, _, size = pool.shape
    pages = pool[blocks].transpose(1, 0, 2, 3).reshape(1, heads, -1, size)
    return pages[:, :, :length].astype(mx.float32)


def paged_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> mx.array:
    """Attend with the packed queries q [1, H, T, D] to the tokens in the pool -> [1, H, T, D], both float32.

    keys, values: one layer of the pool, [num_blocks, Hkv, block_size, D], float32, float16 or bfloat16;
    nothing is written. The queries of the spans follow one another in the order of `batch.spans`. A query at
    position p sees the positions 0 .. p of its own sequence, and nothing else: no later token, no other
    sequence, and not what is left in the places behind the last token. Position p of span i is in block
    `batch.tables[i, p // block_size]` at offset p % block_size. Take the ids from `batch.tables`, not from
    `span.table`: `paged_attention_kernel` below gives a batch other tables. Query head h reads key and value
    head h // (H / Hkv), as `grouped_query_attention` does.

    MLX computes late: the pool is read when the output is evaluated. If that comes after the next write to
    the pool, MLX keeps both versions, which costs a copy of the whole pool.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(3), block_size=1)
    >>> table.blocks, table.num_tokens = [2, 0], 2
    >>> values = mx.array([6.0, 0, 30, 0, 4, 0]).reshape(3, 1, 1, 2)  # ours are 4, then 6; 30 is not
    >>> q, keys, batch = mx.ones((1, 1, 2, 2)), mx.zeros_like(values), pack_batch([Span(table, 0, 2)])
    >>> paged_attention(q, keys, values, batch, scale=1.0).tolist()  # equal keys: the means so far
    [[[[4.0, 0.0], [5.0, 0.0]]]]
    """
    block_size = keys.shape[2]
    outputs, done = [], 0
    for row, span in enumerate(batch.spans):
        length = span.stop - span.start
        blocks = batch.tables[row, : -(-span.stop // block_size)]
        k, v = (_gather(pool, blocks, span.stop) for pool in (keys, values))
        mask = causal_mask(length, span.stop)
        outputs.append(grouped_query_attention(q[:, :, done : done + length], k, v, scale, mask))
        done += length
    return mx.concatenate(outputs, axis=2)


def write_and_attend(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> Attended:
    """Write k and v [1, Hkv, T, D] to the slots of the batch, then attend with q [1, H, T, D] to the pool.

    q, k, v and the output are float32; keys, values: one layer of the pool, as in `paged_attention`. Slot s
    is block s // block_size, offset s % block_size. The returned keys and values keep the pool's type, and
    differ from the given ones in the batch's slots only. A token sees the tokens of its sequence as they are
    stored, itself too: in a float16 pool all of them are rounded to float16. (MLX rounds when a float32 array
    is assigned to part of a float16 array; no `astype` is needed.)

    With arrays of ids in two places, `keys[blocks, :, offsets]` is [T, Hkv, D]: MLX, like NumPy, puts the
    axis of the ids in front.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(3), block_size=1)
    >>> table.blocks, table.num_tokens = [2, 0], 2
    >>> kv, pool = mx.array([[[[4.0, 1.0], [6.0, 1.0]]]]), mx.zeros((3, 1, 1, 2))
    >>> batch = pack_batch([Span(table, 0, 2)])
    >>> out, keys, values = write_and_attend(kv, kv, kv, pool, pool + 0, batch, scale=0.0)
    >>> out.tolist(), values.flatten().tolist()  # a scale of 0: the means so far
    ([[[[4.0, 1.0], [5.0, 1.0]]]], [6.0, 1.0, 0.0, 0.0, 4.0, 1.0])
    """
    block_size = keys.shape[2]
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    keys[blocks, :, offsets] = k[0].transpose(1, 0, 2)
    values[blocks, :, offsets] = v[0].transpose(1, 0, 2)
    return Attended(paged_attention(q, keys, values, batch, scale), keys, values)
