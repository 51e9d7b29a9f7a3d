"""Sliding windows over pages: a query sees the last W tokens, and pages that no query can see go back.

Blocks before the window are neither read nor held, so in these layers a sequence of any length costs a
window's memory and traffic. W is the checkpoint's `sliding_window`; a query's own token counts. Source:
Beltagy et al., "Longformer" (2020); Jiang et al., "Mistral 7B" (2023).
"""

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import mlx.core as mx

from .grouped_attention import grouped_query_attention
from .kernels import is_reference, use_compiled
from .kv_pool import KVPool
from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator, BlockTable
from .paged_kernel import Attended, PackedBatch, compute_meanwhile, write_and_attend

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock

NOWHERE = -1  # in a kernel's table: a block that was given back, which must not be read


def first_visible(position: int, window: int) -> int:
    """The window's other tokens lie before."""
    if window <= 0:
        raise ValueError(f"a window of {window}")
    return position - min(position, window - 1)


def sliding_window_mask(length: int, total: int, window: int) -> mx.array:
    """A band between two triangles of the whole matrix, and its last rows."""
    seen = mx.tri(total, total) - mx.tri(total, total, -window)
    return mx.where(seen[total - length :] > 0, mx.array(0.0), mx.array(-float("inf")))


class WindowedTable(BlockTable):
    """A block table that begins at position `start`: the blocks before it were given back.

    `start` is a multiple of the block size. `blocks` and `num_tokens` count from `start` on: the table holds
    the positions start .. start + num_tokens - 1, and `blocks[0]` holds the first of them. Appending tokens
    works as in every `BlockTable`.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.start = 0

    def release_before(self, position: int) -> list[int]:
        """Block by block, from the front."""
        gone = []
        while self.num_tokens >= self.block_size and self.start + self.block_size <= position:
            gone.append(self.blocks.pop(0))
            self.allocator.free(gone[-1])
            self.start += self.block_size
            self.num_tokens -= self.block_size
        return gone

    def skip_to(self, position: int) -> list[int]:
        """Gives back from the front, by hand."""
        end = self.start + self.num_tokens
        if position < end or position // self.block_size * self.block_size != position:
            raise ValueError(f"cannot go on at {position}")
        gone, self.blocks = self.blocks, []
        for block in gone:
            self.allocator.free(block)
        self.num_tokens, self.start = 0, position
        return gone

    def physical_indices(self) -> list[int]:
        """Holes, then blocks."""
        holes = [NOWHERE for _ in range(0, self.start, self.block_size)]
        return [*holes, *self.blocks]

    def slots(self, start: int, stop: int) -> list[int]:
        """Return the slots of the positions start .. stop - 1; ValueError if the table lacks one of them.

        The inherited method counts positions from the table's first token.
        """
        return super().slots(start - self.start, stop - self.start)

    def fork(self) -> "WindowedTable":
        """Make a second table of the same blocks, from `start` on; each block counts one more holder."""
        child = WindowedTable(self.allocator, self.block_size)
        child.blocks, child.num_tokens, child.start = list(self.blocks), self.num_tokens, self.start
        for shared in child.blocks:
            child.allocator.add_ref(shared)
        return child

    def release(self) -> None:
        """Give back every block and begin at position 0 again."""
        super().release()
        self.start = 0


def first_block(table: BlockTable) -> int:
    """Return the index of the text's block that is the table's first; 0 for a table without a window."""
    return table.start // table.block_size if isinstance(table, WindowedTable) else 0


def windowed_attention(
    q: mx.array, keys: mx.array, values: mx.array, batch: PackedBatch, scale: float, window: int
) -> mx.array:
    """One query at a time; its own blocks, its own softmax."""
    size, outputs, packed = keys.shape[2], [], 0
    for row, span in enumerate(batch.spans):
        for position in range(span.start, span.stop):
            first = first_visible(position, window)
            places = mx.arange(first, position + 1, dtype=mx.int32)
            blocks = batch.tables[row][places // size]
            near = [pool[blocks, :, places % size].astype(q.dtype) for pool in (keys, values)]
            k, v = (mx.expand_dims(mx.swapaxes(part, 0, 1), 0) for part in near)
            outputs.append(grouped_query_attention(q[:, :, packed : packed + 1], k, v, scale))
            packed += 1
    return mx.concatenate(outputs, axis=-2)


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

    The readable version uses `write_and_attend` for the write and discards its output.
    """
    written = write_and_attend(q, k, v, keys, values, batch, scale)
    out = windowed_attention(q, written.keys, written.values, batch, scale, window)
    return Attended(out, written.keys, written.values)


class WindowedContext:
    """One packed step of a model whose layers see differently far: the context that the model gets.

    batches: the step as each group of layers sees it: the same tokens and positions, other tables and slots.
    `_where[layer]` is the layer's place in its group, its group's batch, and its window or None.
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
        """The kernel is chosen first."""
        place, batch, window = self._where[layer]
        keys, values = self._pool.lend(place)
        if window is not None:
            result = write_and_attend_window(q, k, v, keys, values, batch, self._scale, window)
        else:
            result = write_and_attend(q, k, v, keys, values, batch, self._scale)
        self._pool.put_back(place, *result[1:])
        self._compute(layer, result)
        return result[0]

    @property
    def fuses(self) -> bool:
        """Whether compiled kernels write and attend, so that a compiled block may do it too."""
        attending = (write_and_attend, write_and_attend_window)
        return all(is_reference(one) for one in attending) and use_compiled()

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """Run x [1, T, E] through one compiled block -> [1, T, E]; its keys and values go into the pool."""
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

        Groups share the pool's arrays: without compiled kernels MLX would copy an array that is to be written
        while a read of it waits, so everything is computed first.
        """
        if not use_compiled():
            mx.eval(attended)
        else:
            compute_meanwhile(layer, attended.out)
