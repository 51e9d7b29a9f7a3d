"""Attention that gathers token by token, not block by block."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .attention import causal_mask
from .grouped_attention import grouped_query_attention
from .kernels import is_reference, use_compiled
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
    """Where the T packed tokens of a step are."""

    positions: mx.array
    slots: mx.array
    tables: mx.array
    row_of_token: mx.array
    spans: tuple[Span, ...]


def pack_batch(spans: Seq[Span]) -> PackedBatch:
    """Put the tokens of S spans (at least 1) side by side, in order, as a `PackedBatch`."""
    lists = [span.table.physical_indices() for span in spans]
    width = max(len(one) for one in lists)
    for one in lists:
        one.extend([0] * (width - len(one)))
    tokens = [
        (position, slot, row)
        for row, span in enumerate(spans)
        for position, slot in zip(
            range(span.start, span.stop), span.table.slots(span.start, span.stop), strict=True
        )
    ]
    positions, slots, rows = (mx.array([token[i] for token in tokens], mx.int32) for i in range(3))
    return PackedBatch(positions, slots, mx.array(lists, mx.int32), rows, tuple(spans))


class Attended(NamedTuple):
    """What `write_and_attend` returns: the output [1, H, T, D], and the pool's two arrays after the write."""

    out: mx.array
    keys: mx.array
    values: mx.array


def paged_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> mx.array:
    """Attend with the packed queries q [1, H, T, D] to the tokens in the pool -> [1, H, T, D]."""
    size, parts, at = keys.shape[2], [], 0
    for row, span in enumerate(batch.spans):
        count, seen = span.stop - span.start, mx.arange(span.stop)
        blocks = mx.take(batch.tables[row], seen // size)
        k, v = (x[blocks, :, seen % size].swapaxes(0, 1)[None] for x in (keys, values))
        mask = causal_mask(count, span.stop)
        parts.append(grouped_query_attention(q[:, :, at : at + count], k, v, scale, mask))
        at += count
    return mx.concatenate(parts, 2)


def write_and_attend(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float
) -> Attended:
    """Write k and v [1, Hkv, T, D] to the slots of the batch, then attend with q [1, H, T, D] to the pool."""
    size = keys.shape[2]
    b, o = batch.slots // size, batch.slots % size
    keys[b, :, o] = k[0].transpose(1, 0, 2)
    values[b, :, o] = v[0].transpose(1, 0, 2)
    return Attended(out=paged_attention(q, keys, values, batch, scale), keys=keys, values=values)


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
