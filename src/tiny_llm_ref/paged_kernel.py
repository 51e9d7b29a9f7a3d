"""Attention over pages: one step's tokens, packed in one row, each attending to its own sequence's blocks.

A packed step has prefill chunks and decodes side by side, [1, T], without padding to the longest. Write this
step's keys and values to the pool first, then read everything from the pool, in the pool's type: so the
result has the same bits whether the token before came in this step or in an earlier one.
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

LAYERS_AT_ONCE = 2


def compute_meanwhile(layer: int, out: mx.array) -> None:
    """Let MLX compute the layers described so far, while Python describes the next ones."""
    if layer % LAYERS_AT_ONCE == 0:
        mx.async_eval(out)  # type: ignore[no-untyped-call]


class Span(NamedTuple):
    """The positions start .. stop - 1 of one block table: tokens that are computed together in one step."""

    table: BlockTable
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """Where the T packed tokens of a step are; made once a step, used by every layer. All arrays are int32.

    positions [T]: each token's position in its own sequence. slots [T]: the place in the pool that its key
    and value are written to. tables [number of spans, M]: row i has all block ids of span i's table, filled
    up with 0 to M, the largest number of blocks of one table. row_of_token [T]: the token's row in `tables`,
    its span's number. spans: the spans, in packed order.

    Block ids to read from are those in `tables`: a batch may have other ids there than `span.table` has.
    """

    positions: mx.array
    slots: mx.array
    tables: mx.array
    row_of_token: mx.array
    spans: tuple[Span, ...]


def pack_batch(spans: Seq[Span]) -> PackedBatch:
    """Put the tokens of all spans (at least 1) side by side, in order, as a `PackedBatch`.

    Each span has at least one token, and its table has places for all of them already. Positions begin anew
    in each span, at its `start`; slots are the table's own (`table.slots(start, stop)`), block ids its
    `physical_indices()`: all of them, those behind `stop` too. `mx.array` makes int32 of Python ints if it is
    told to: `mx.array(numbers, mx.int32)`.

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
    """What `write_and_attend` returns.

    out: the output [1, H, T, D]. keys, values: the pool's two arrays after the write.
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
    nothing is written. The queries of the spans follow one another in the order of `batch.spans`. A query at
    position p sees the positions 0 .. p of its own sequence, and nothing else: no later token, no other
    sequence, and not what is left in the places behind the last token. Position p of span i is in block
    `batch.tables[i, p // block_size]` at offset p % block_size. Take the ids from `batch.tables`, not from
    `span.table`: `page_block.paged_attention_kernel` (3.2.6, the next part) gives a batch other tables. Query
    head h reads key and value head h // (H / Hkv), as `grouped_query_attention` does. A Python loop over the
    spans is fine here; the compiled kernel that the engine runs in its place has none.

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
    is block s // block_size, offset s % block_size. The returned keys and values keep the pool's type, and
    differ from the given ones in the batch's slots only. The given arrays may be written to: the caller uses
    the returned ones from now on. A token sees the tokens of its sequence as they are stored, itself too: in
    a float16 pool all of them are rounded to float16. (MLX rounds when a float32 array is assigned to part of
    a float16 array; no `astype` is needed.)

    With arrays of ids in two places, `keys[blocks, :, offsets]` is [T, Hkv, D]: MLX, like NumPy, puts the
    axis of the ids in front.

    >>> from tiny_llm.paged_attention import BlockAllocator
    >>> table = BlockTable(BlockAllocator(3), block_size=1)
    >>> table.blocks, table.num_tokens = [2, 0], 2
    >>> kv, pool = mx.array([[[[4.0, 1.0], [6.0, 1.0]]]]), mx.zeros((3, 1, 1, 2))
    >>> batch = pack_batch([Span(table, 0, 2)])
    >>> other = pool + 0  # an array of its own: keys and values are two
    >>> out, keys, values = write_and_attend(kv, kv, kv, pool, other, batch, scale=0.0)
    >>> out.tolist(), values.flatten().tolist()  # a scale of 0: the means so far
    ([[[[4.0, 1.0], [5.0, 1.0]]]], [6.0, 1.0, 0.0, 0.0, 4.0, 1.0])
    """
    block_size = keys.shape[2]
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    keys[blocks, :, offsets] = k[0].swapaxes(0, 1)  # [T, Hkv, D], rounded to the pool's type
    values[blocks, :, offsets] = v[0].swapaxes(0, 1)
    return Attended(paged_attention(q, keys, values, batch, scale), keys, values)


def _gather(pool: mx.array, blocks: mx.array, length: int) -> mx.array:
    """The first `length` tokens of a table: pool [N, Hkv, block_size, D] -> [1, Hkv, length, D]."""
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
        """Write k and v [1, Hkv, T, D] to the pool, attend with q [1, H, T, D] -> [1, H, T, D]."""
        attended = write_and_attend(q, k, v, *self._pool.lend(layer), self._batch, self._scale)
        self._pool.put_back(layer, attended.keys, attended.values)
        compute_meanwhile(layer, attended.out)
        return attended.out

    @property
    def fuses(self) -> bool:
        """True if the compiled kernels write and attend, so that a compiled block may do it too."""
        return is_reference(write_and_attend) and use_compiled()

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """Run x [1, T, E] through one block -> [1, T, E]; its keys and values are written to the pool."""
        step, lent = self._batch, self._pool.lend(layer)
        out, *pools = block(x, *lent, step.slots, step.tables, step.row_of_token, step.positions, self._scale)
        self._pool.put_back(layer, *pools)
        compute_meanwhile(layer, out)
        return out
