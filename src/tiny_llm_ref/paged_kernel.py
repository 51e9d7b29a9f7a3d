"""Attention over pages: one step's tokens, packed in one row, each attending to its own sequence's blocks.

A packed step holds the tokens of prompt chunks (prefill) and of decodes in one row, [1, T], without padding.
It writes this step's keys and values to the pool first, then reads everything from the pool, in the pool's
type. So the result has the same bits whether an earlier token was computed in this step or in an earlier one.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention
from .kernels import accelerated, compiled_kernel, is_reference, use_compiled
from .kv_pool import KVPool
from .paged_attention import BlockTable

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock

LAYERS_PER_EVAL = 2


def start_computing(layer: int, out: mx.array) -> None:
    """Let MLX compute the layers so far, while Python builds the graph of the next ones."""
    if layer % LAYERS_PER_EVAL == 0:
        mx.async_eval(out)  # type: ignore[no-untyped-call]


class Span(NamedTuple):
    """The positions start .. stop - 1 of one block table: the tokens of a sequence that a step computes."""

    table: BlockTable
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """The layout of a step's T packed tokens; made once per step, used by every layer. All arrays are int32.

    positions: [T], each token's position in its own sequence. slots: [T], the slot in the pool to which each
    token's key and value are written. tables: [number of spans, M]; row i has all block ids of span i's
    table, padded with 0 to M, the number of blocks of the longest table. row_of_token: [T], each token's row
    in `tables`, which is the number of its span. spans: the spans, in packed order.

    Read from the blocks in `tables`, not from those in `span.table`: the ids may differ.
    """

    positions: mx.array
    slots: mx.array
    tables: mx.array
    row_of_token: mx.array
    spans: tuple[Span, ...]


def pack_batch(spans: Seq[Span]) -> PackedBatch:
    """Pack the tokens of all spans (at least 1) one after the other, in order, as a `PackedBatch`.

    Each span has at least one token, and its table already has places for all of them. The positions of a
    span start at its `start`. Slots come from `table.slots(start, stop)`. Block ids come from
    `table.physical_indices()`: all of them, including blocks after `stop`. `mx.array(numbers, mx.int32)`
    makes an int32 array.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> one, other = (BlockTable(BlockAllocator(8), block_size=4) for _ in range(2))
    >>> one.blocks, one.num_tokens, other.blocks, other.num_tokens = [5, 1, 3], 9, [7], 2
    >>> batch = pack_batch([Span(one, 7, 9), Span(other, 0, 2)])
    >>> batch.positions.tolist(), batch.slots.tolist()
    ([7, 8, 0, 1], [7, 12, 28, 29])
    >>> batch.row_of_token.tolist(), batch.tables.tolist()
    ([0, 0, 1, 1], [[5, 1, 3], [7, 0, 0]])
    """
    positions: list[int] = []
    slot_of_token: list[int] = []
    row_of_token: list[int] = []
    for row, (table, start, stop) in enumerate(spans):
        positions.extend(range(start, stop))
        slot_of_token.extend(table.slots(start, stop))
        row_of_token.extend([row] * (stop - start))
    tables = [span.table.physical_indices() for span in spans]
    longest = max(map(len, tables))
    return PackedBatch(
        positions=mx.array(positions, mx.int32),
        slots=mx.array(slot_of_token, mx.int32),
        tables=mx.array([row + [0] * (longest - len(row)) for row in tables], mx.int32),
        row_of_token=mx.array(row_of_token, mx.int32),
        spans=tuple(spans),
    )


class Attended(NamedTuple):
    """The result of `write_and_attend`.

    out: the output [1, H, T, D]. keys: the pool's array of keys after the write. values: the pool's array of
    values after the write.
    """

    out: mx.array
    keys: mx.array
    values: mx.array


def _compiled_read(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> mx.array:
    kernel = compiled_kernel("paged_attention")
    out: mx.array = kernel(q, keys, values, batch.tables, batch.row_of_token, batch.positions, scale)
    return out


@accelerated(compiled=_compiled_read)
def paged_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> mx.array:
    """Attend with the packed queries q [1, H, T, D] to the tokens in the pool -> [1, H, T, D], both float32.

    keys, values: one layer of the pool, [num_blocks, Hkv, block_size, D], float32, float16 or bfloat16;
    nothing is written. The queries are packed in the order of `batch.spans`. A query at position p sees
    exactly the positions 0 .. p of its own sequence: no later token, no other sequence, and no old data in
    the places after the last token. Leave old data out: it may be NaN, which a weight of 0 does not hide.
    Position p of span i is in block `batch.tables[i, p // block_size]` at offset p % block_size. Take the ids
    from `batch.tables`, not from `span.table`: `page_block.paged_attention_kernel` (3.2.6, the next part)
    passes a batch with other ids. Query head h reads key and value head h // (H / Hkv), as in
    `grouped_query_attention`. A Python loop over the spans is fine here; the engine runs a compiled kernel
    instead.

    MLX is lazy: it reads the pool when the output is evaluated. If the next write to the pool comes before
    that, MLX keeps both versions, which costs a copy of the whole pool.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(3), block_size=1)
    >>> table.blocks, table.num_tokens = [2, 0], 2
    >>> values = mx.array([6.0, 0, 30, 0, 4, 0]).reshape(3, 1, 1, 2)  # in the table: 4, then 6, but not 30
    >>> q, keys, batch = mx.ones((1, 1, 2, 2)), mx.zeros_like(values), pack_batch([Span(table, 0, 2)])
    >>> paged_attention(q, keys, values, batch, scale=1.0).tolist()  # equal keys: means of 4, and of 4 and 6
    [[[[4.0, 0.0], [5.0, 0.0]]]]
    """
    outputs, packed = [], 0
    for row, (_, start, stop) in enumerate(batch.spans):
        blocks_of_row = batch.tables[row, : -(-stop // keys.shape[2])]
        past_k, past_v = (_gather(pool, blocks_of_row, stop).astype(q.dtype) for pool in (keys, values))
        rows = q[:, :, packed : packed + stop - start]
        mask = causal_mask(stop - start, stop)
        outputs.append(grouped_query_attention(rows, past_k, past_v, scale, mask))
        packed += stop - start
    return mx.concatenate(outputs, axis=2)


def _compiled(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> Attended:
    kernel = compiled_kernel("write_and_attend")
    where = (batch.slots, batch.tables, batch.row_of_token, batch.positions)
    return Attended(*kernel(q, k, v, keys, values, *where, scale))


@accelerated(compiled=_compiled)
def write_and_attend(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> Attended:
    """Write k and v [1, Hkv, T, D] to the slots of the batch, then attend with q [1, H, T, D] to the pool.

    q, k, v and the output are float32; keys, values: one layer of the pool, as in `paged_attention`. Slot s
    is block s // block_size, offset s % block_size. The returned keys and values have the pool's type, and
    differ from the given ones only in the batch's slots. You may write to the given arrays: the caller uses
    only the returned ones afterwards.

    First write this step's keys and values to the pool, then read all tokens from the pool. So a token sees
    every token of its sequence, including itself, as it is stored: in a float16 pool, rounded to float16.
    (MLX rounds when a float32 array is assigned to part of a float16 array; no `astype` is needed.)

    If two indices are arrays of T numbers, `keys[blocks, :, offsets]` has the shape [T, Hkv, D]: MLX, like
    NumPy, puts the axis of the index arrays first.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(3), block_size=1)
    >>> table.blocks, table.num_tokens = [2, 0], 2
    >>> kv, pool = mx.array([[[[4.0, 1.0], [6.0, 1.0]]]]), mx.zeros((3, 1, 1, 2))
    >>> batch = pack_batch([Span(table, 0, 2)])
    >>> other = pool + 0  # a second array: keys and values must not be the same one
    >>> out, keys, values = write_and_attend(kv, kv, kv, pool, other, batch, scale=0.0)
    >>> out.tolist(), values.flatten().tolist()  # a scale of 0: each token gets the mean so far
    ([[[[4.0, 1.0], [5.0, 1.0]]]], [6.0, 1.0, 0.0, 0.0, 4.0, 1.0])
    """
    block_size = keys.shape[2]
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    keys[blocks, :, offsets] = k[0].swapaxes(0, 1)  # [T, Hkv, D], rounded to the pool's type
    values[blocks, :, offsets] = v[0].swapaxes(0, 1)
    return Attended(paged_attention(q, keys, values, batch, scale), keys, values)


def _gather(pool: mx.array, blocks: mx.array, length: int) -> mx.array:
    """Read the first `length` tokens of some blocks: pool [N, Hkv, block_size, D] -> [1, Hkv, length, D]."""
    gathered = pool[blocks].swapaxes(0, 1)  # [Hkv, blocks, block_size, D]
    return gathered.reshape(1, pool.shape[1], -1, pool.shape[3])[:, :, :length]


class PagedContext:
    """The context of a forward pass over one packed step, with keys and values in the pool."""

    def __init__(self, pool: KVPool, batch: PackedBatch, scale: float, logit_rows: mx.array | None) -> None:
        self.positions = batch.positions
        self.logit_rows = logit_rows
        self._pool = pool
        self._batch = batch
        self._scale = scale

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Write k and v [1, Hkv, T, D] to the pool, then attend with q [1, H, T, D] -> [1, H, T, D]."""
        attended = write_and_attend(q, k, v, *self._pool.lend(layer), self._batch, self._scale)
        self._pool.put_back(layer, attended.keys, attended.values)
        start_computing(layer, attended.out)
        return attended.out

    @property
    def fuses(self) -> bool:
        """True if compiled kernels write and attend, so that a compiled block may do both."""
        return is_reference(write_and_attend) and use_compiled()

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """Run x [1, T, E] through one block -> [1, T, E]; its keys and values are written to the pool."""
        step, lent = self._batch, self._pool.lend(layer)
        rows = self.logit_rows if layer == self._pool.num_layers - 1 else None
        where = (step.slots, step.tables, step.row_of_token, step.positions)
        out, *pools = block(x, *lent, *where, self._scale, out_rows=rows)
        self._pool.put_back(layer, *pools)
        start_computing(layer, out)
        return out
