"""Sliding windows over pages: a query sees the last W tokens, and what no query can see goes back.

Blocks behind the window are neither read nor kept, so a sequence of any length costs a window's memory and
traffic in these layers. Source: Beltagy et al., "Longformer" (2020); Jiang et al., "Mistral 7B" (2023). The
window is the checkpoint's: `sliding_window` tokens, a query's own included.
"""

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import mlx.core as mx

from .grouped_attention import grouped_query_attention
from .kernels import accelerated, compiled_kernel, is_reference, use_compiled
from .kv_pool import KVPool
from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator, BlockTable
from .paged_kernel import Attended, PackedBatch, compute_meanwhile, write_and_attend

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock

NOWHERE = -1  # in a kernel's table: a block that was let go, which nothing may read


def first_visible(position: int, window: int) -> int:
    """The first position that a query at `position` sees: it sees `window` tokens, its own included.

    Raises ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, not {window}")
    return max(0, position - window + 1)


def sliding_window_mask(length: int, total: int, window: int) -> mx.array:
    """Additive mask [length, total] for the last `length` of `total` tokens: 0 where a token may look.

    Row i is the token at position `total - length + i`: it sees the `window` positions up to its own, and the
    rest is -inf.
    """
    positions = mx.arange(total - length, total)[:, None]
    others = mx.arange(total)[None, :]
    is_visible = (others <= positions) & (others > positions - window)
    return mx.where(is_visible, 0.0, -mx.inf)


class WindowedTable(BlockTable):
    """A block table that begins at position `start`, a block's edge: what came before was let go.

    `blocks` and `num_tokens` count from `start` on.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.start = 0

    def let_go(self, position: int) -> list[int]:
        """Give back the reference to every block that ends at `position` or before; which, in order.

        A last block that is not full stays. The table begins with the next block then.
        """
        count = min(max(0, position - self.start), self.num_tokens) // self.block_size
        passed, self.blocks = self.blocks[:count], self.blocks[count:]
        for block in passed:
            self.allocator.free(block)
        self.start += count * self.block_size
        self.num_tokens -= count * self.block_size
        return passed

    def skip_to(self, position: int) -> list[int]:
        """Let go of everything and go on at `position`, a block's edge not before the end; which blocks.

        Raises ValueError, unchanged, for another position.
        """
        if position % self.block_size or position < self.start + self.num_tokens:
            raise ValueError(f"{position} is no edge of a block after {self.start + self.num_tokens} tokens")
        blocks = list(self.blocks)
        self.release()
        self.start = position
        return blocks

    def slots(self, start: int, stop: int) -> list[int]:
        """The flat addresses of the positions start .. stop - 1; ValueError where not all are the table's."""
        return super().slots(start - self.start, stop - self.start)

    def physical_indices(self) -> list[int]:
        """The physical block of each logical block, in order; `NOWHERE` for those that were let go."""
        return [NOWHERE] * (self.start // self.block_size) + self.blocks

    def fork(self) -> "WindowedTable":
        """A second table over the same blocks, from the same `start` on; each counts one more holder."""
        child = WindowedTable(self.allocator, self.block_size)
        child.blocks, child.num_tokens, child.start = list(self.blocks), self.num_tokens, self.start
        for shared in child.blocks:
            child.allocator.add_ref(shared)
        return child

    def release(self) -> None:
        """Give back every block, and begin at position 0 again."""
        super().release()
        self.start = 0


def first_block(table: BlockTable) -> int:
    """Which of a sequence's blocks is the first that a table has."""
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
    """Attend with q [1, H, T, D] to the last `window` stored tokens -> [1, H, T, D]; nothing is written.

    As `paged_attention`, but a token at position p sees its own sequence's positions `first_visible(p,
    window)` .. p. Blocks that no token of a span sees are not read: the batch's tables may name anything
    there.
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
    """The first `length` tokens of some blocks: pool [N, Hkv, block_size, D] -> [1, Hkv, length, D]."""
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

    As `write_and_attend`, whose own output is thrown away here.
    """
    written = write_and_attend(q, k, v, keys, values, batch, scale)
    out = windowed_attention(q, written.keys, written.values, batch, scale, window)
    return Attended(out, written.keys, written.values)


class WindowedContext:
    """A forward pass over one packed step of a model whose layers see differently far.

    batches: the step as each group of layers sees it: the same tokens and positions, other tables and slots.
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
            layer: (place, batch, group.window)
            for group, batch in zip(groups, batches, strict=True)
            for place, layer in enumerate(group.layers)
        }

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D], as far as the layer's window goes.

        The pool holds k and v afterwards: a layer's place in its group is the pool's layer that it writes to.
        """
        place, batch, window = self._where[layer]
        lent = self._pool.lend(place)
        if window is None:
            attended = write_and_attend(q, k, v, *lent, batch, self._scale)
        else:
            attended = write_and_attend_window(q, k, v, *lent, batch, self._scale, window)
        self._pool.put_back(place, attended.keys, attended.values)
        self._compute(layer, attended)
        return attended.out

    @property
    def fuses(self) -> bool:
        """True where the compiled kernels write and attend, so that a compiled block may."""
        attending = (write_and_attend, write_and_attend_window)
        return all(is_reference(one) for one in attending) and use_compiled()

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """x [1, T, E] through one block -> [1, T, E]; the pool holds its keys and values afterwards."""
        in_pool, step, window = self._where[layer]
        lent = self._pool.lend(in_pool)
        out, *pools = block(
            x, *lent, step.slots, step.tables, step.row_of_token, step.positions, self._scale, window
        )
        self._pool.put_back(in_pool, *pools)
        compute_meanwhile(layer, out)
        return out

    def _compute(self, layer: int, attended: Attended) -> None:
        """Let MLX compute while Python describes the next layers.

        Groups share the pool's arrays. MLX would copy them for a write while a read waits.
        """
        if not use_compiled():
            mx.eval(attended)
        else:
            compute_meanwhile(layer, attended.out)
