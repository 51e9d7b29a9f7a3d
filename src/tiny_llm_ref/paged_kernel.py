"""Attention over pages: a step's tokens, packed in one row, each attending to its own block table.

A packed step holds prefill chunks and decodes side by side, [1, T], and pads nothing to the longest.
A token's key and value are written first and read back as stored, its own included, so that it makes
no difference in which step a neighbour was written.
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
    """Let MLX compute what is described so far, while Python describes the next layers."""
    if layer % LAYERS_AT_ONCE == 0:
        mx.async_eval(out)  # type: ignore[no-untyped-call]


class Span(NamedTuple):
    """The positions start .. stop - 1 of one table, computed together in one step."""

    table: BlockTable
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """Where the T packed tokens of a step stand, read and write; made once, used by every layer.

    positions [T]: position in the own sequence. slots [T]: where the key and value go.
    tables [S, M]: block ids of each sequence, padded with 0; M is the most that one of them has.
    row_of_token [T]: the token's row in `tables`. spans: the same as plain ints, in packed order.
    All arrays int32.
    """

    positions: mx.array
    slots: mx.array
    tables: mx.array
    row_of_token: mx.array
    spans: tuple[Span, ...]


def pack_batch(spans: Seq[Span]) -> PackedBatch:
    """Lay the tokens of S spans side by side, in order, and note where each stands.

    Row i of `tables` has the `physical_indices` of span i's table, which has room for all its tokens already.
    S is at least 1.
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
    """What a write-and-attend returns: the output and the pool's two arrays after the write."""

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
    """Attend with q [1, H, T, D] to what is stored -> [1, H, T, D]; nothing is written.

    keys, values: one layer of the pool, [num_blocks, Hkv, block_size, D], perhaps of another type. A token
    sees its own sequence's positions 0 .. its own, wherever their blocks lie; nothing else in these counts.
    Query head h reads head h // (H / Hkv). The pool is read when the output is evaluated: let that be before
    the next write.
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
    """Write k and v [1, Hkv, T, D] to their slots, then attend with q [1, H, T, D] -> out [1, H, T, D].

    keys, values: one layer of the pool, [num_blocks, Hkv, block_size, D]; the arrays returned take
    their place, and differ from them in the batch's slots alone. A token sees its own sequence's positions
    0 .. its own as they are stored, its own rounded to the pool's type like the others.
    """
    block_size = keys.shape[2]
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    keys[blocks, :, offsets] = k[0].swapaxes(0, 1).astype(keys.dtype)  # [T, Hkv, D]
    values[blocks, :, offsets] = v[0].swapaxes(0, 1).astype(values.dtype)
    return Attended(paged_attention(q, keys, values, batch, scale), keys, values)


def _gather(pool: mx.array, blocks: mx.array, length: int) -> mx.array:
    """The first `length` tokens of a table: pool [N, Hkv, block_size, D] -> [1, Hkv, length, D]."""
    gathered = pool[blocks].swapaxes(0, 1)  # [Hkv, blocks, block_size, D]
    return gathered.reshape(1, pool.shape[1], -1, pool.shape[3])[:, :, :length]


class PagedContext:
    """A forward pass over one packed step, with keys and values in the pool's pages."""

    def __init__(self, pool: KVPool, batch: PackedBatch, scale: float, logit_rows: mx.array | None) -> None:
        self.positions = batch.positions
        self.logit_rows = logit_rows
        self._pool = pool
        self._batch = batch
        self._scale = scale

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D]; the pool holds k and v afterwards."""
        attended = write_and_attend(q, k, v, *self._pool.lend(layer), self._batch, self._scale)
        self._pool.put_back(layer, attended.keys, attended.values)
        compute_meanwhile(layer, attended.out)
        return attended.out

    @property
    def fuses(self) -> bool:
        """True where the compiled kernels write and attend, so that a compiled block may."""
        return is_reference(write_and_attend) and use_compiled()

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """x [1, T, E] through one block -> [1, T, E]; the pool holds its keys and values afterwards."""
        step, lent = self._batch, self._pool.lend(layer)
        out, *pools = block(x, *lent, step.slots, step.tables, step.row_of_token, step.positions, self._scale)
        self._pool.put_back(layer, *pools)
        compute_meanwhile(layer, out)
        return out
