# A second solution, written only from the docstrings and the first hints.
"""Attention over pages: one step's tokens, packed in one row, each attending to its own sequence's blocks.

A packed step holds the tokens of prompt chunks (prefill) and of decodes in one row, [1, T], without padding.
It writes this step's keys and values to the pool first, then reads everything from the pool, in the pool's
type. So the result has the same bits whether an earlier token was computed in this step or in a step before.
"""

from collections.abc import Sequence as Seq

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention


def pack_batch(spans: Seq[Span]) -> PackedBatch:
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
    block_size = keys.shape[2]
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    keys[blocks, :, offsets] = k[0].transpose(1, 0, 2)
    values[blocks, :, offsets] = v[0].transpose(1, 0, 2)
    return Attended(paged_attention(q, keys, values, batch, scale), keys, values)
