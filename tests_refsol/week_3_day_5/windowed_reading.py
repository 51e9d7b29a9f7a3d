"""Day 3.5, tasks 6 and 7: attention that reads only the blocks in its window."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_kernel import Attended, PackedBatch, Span, pack_batch
from tiny_llm.sliding_window import NO_BLOCK, WindowedContext, WindowedTable, windowed_attention

from common.blocks import table_of as plain_table
from common.toy_arrays import EMPTY, floats, numbers, queries
from week_3_day_5.windowed_tables import seen_from

# Task 6: windowed_attention


def seen_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None
) -> np.ndarray:
    """The last L of S tokens in float64, one query at a time: q [H, L, D], k, v [Hkv, S, D] -> [H, L, D]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group, before = q.shape[0] // k.shape[0], k.shape[1] - q.shape[1]
    out = np.zeros_like(q)
    for h, i in np.ndindex(q.shape[:2]):
        seen = seen_from(before + i, window or k.shape[1])
        scores = k[h // group, seen] @ q[h, i] * scale
        weights = np.exp(scores - scores.max())
        out[h, i] = weights / weights.sum() @ v[h // group, seen]
    return out


def packed(
    spans: Sequence[tuple[list[int], int, int]], block_size: int, holes: Sequence[int] = ()
) -> PackedBatch:
    """A packed step of spans (blocks, start, stop); the first `holes[i]` blocks of row i are placeholders."""
    batch = pack_batch(
        [Span(plain_table(blocks, stop, block_size), start, stop) for blocks, start, stop in spans]
    )
    rows = [
        [NO_BLOCK] * gone + row[gone:] for gone, row in zip(holes, batch.tables.tolist(), strict=bool(holes))
    ]
    return replace(batch, tables=mx.array(rows, mx.int32)) if holes else batch


def test_task_6_a_token_attends_to_the_last_two_tokens_in_scattered_blocks() -> None:
    """Oracle: by hand: 2, 4, 9 and 5 are in blocks 2 and 0; with equal keys each output is the mean of two.

    Without a window the outputs are 2, 3, 5 and 5; a window that is too large changes the fourth.
    """
    values = numbers(9, 5, EMPTY, EMPTY, 2, 4)
    out = windowed_attention(
        queries(1, 4), mx.zeros_like(values), values, packed([([2, 0], 0, 4)], 2), 1.0, 2
    )
    assert out.shape == (1, 1, 4, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 6.5, 7], rtol=1e-6)


def test_task_6_only_the_tokens_of_the_span_are_queries() -> None:
    """Oracle: by hand: the last of four tokens, with windows of 1 to 5."""
    values, batch = numbers(9, 5, EMPTY, EMPTY, 2, 4), packed([([2, 0], 3, 4)], 2)
    found = [
        windowed_attention(queries(1, 1), mx.zeros_like(values), values, batch, 1.0, window)[
            0, 0, 0, 0
        ].item()
        for window in (1, 2, 3, 4, 5)
    ]
    np.testing.assert_allclose(found, [5, 7, 6, 5, 5], rtol=1e-6)


def test_task_6_every_span_attends_only_to_the_window_of_its_own_sequence() -> None:
    """Oracle: by hand: 6 is in one sequence, 1, 3 and 8 in another; the last two of these are queries."""
    values = numbers(1, 3, 6, EMPTY, 8, EMPTY)
    batch = packed([([1], 0, 1), ([0, 2], 1, 3)], 2)
    out = windowed_attention(queries(1, 3), mx.zeros_like(values), values, batch, 1.0, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [6, 2, 5.5], rtol=1e-6)


@pytest.mark.parametrize("hole", [NO_BLOCK, 3], ids=["placeholder", "block_of_another_sequence"])
def test_task_6_a_block_outside_the_window_is_not_read(hole: int) -> None:
    """Oracle: by hand: block 3 belongs to another sequence and holds NaN; it is the last, so -1 finds it too.

    Common mistake: reading everything and giving invisible tokens a weight of 0, since 0 * NaN is NaN.
    """
    nan = float("nan")
    values = numbers(9, 5, EMPTY, EMPTY, 2, 4, nan, nan)
    batch = packed([([1, 2, 0], 4, 6)], 2)
    batch = replace(batch, tables=mx.array([[hole, 2, 0]], mx.int32))
    out = windowed_attention(queries(1, 2), values, values, batch, 0.0, 3)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [5, 6], rtol=1e-6)


def test_task_6_a_chunk_reads_the_window_of_its_first_token() -> None:
    """Oracle: by hand: 1, 2, 4, 8, 16 with a window of 2.

    The last three are queries, and the last one sees less.
    """
    values = numbers(1, 2, 4, 8, 16, EMPTY)
    out = windowed_attention(
        queries(1, 3), mx.zeros_like(values), values, packed([([0, 1, 2], 2, 5)], 2), 1.0, 2
    )
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [3, 6, 12], rtol=1e-6)


SHAPES = {
    "blocks_of_one_token": {"totals": [5, 1, 9], "block_size": 1},
    "only_full_blocks": {"totals": [8, 4, 12]},
    "one_token_in_the_last_block": {"totals": [9, 5, 1]},
    "blocks_larger_than_the_sequence": {"totals": [3, 1, 30], "block_size": 32},
    "blocks_of_seven_tokens": {"totals": [23, 2, 14], "block_size": 7},
    "three_query_heads_per_kv_head": {"totals": [9, 6], "heads": (9, 3)},
    "one_kv_head": {"totals": [9, 6], "heads": (4, 1)},
    "heads_of_20": {"totals": [9, 6], "size": 20},
    "stored_in_float16": {"totals": [9, 6, 17], "dtype": mx.float16},
    "stored_in_bfloat16": {"totals": [9, 6, 17], "dtype": mx.bfloat16},
    "long_sequences": {"totals": [100, 1, 65], "block_size": 16},
}


@dataclass
class Pool:
    """Sequences in interleaved blocks, one layer of keys and values, and contiguous copies.

    The last block of the pool belongs to another sequence and holds NaN.
    """

    totals: Sequence[int]
    heads: tuple[int, int] = (4, 2)
    size: int = 8
    block_size: int = 4
    dtype: mx.Dtype = mx.float32
    blocks: list[list[int]] = field(init=False)
    streams: list[np.ndarray] = field(init=False)  # keys and values [2, Hkv, tokens, D], rounded as stored
    stored: tuple[mx.array, mx.array] = field(init=False)

    def __post_init__(self) -> None:
        rng, kv_heads = np.random.default_rng(0), self.heads[1]
        lengths = [-(-total // self.block_size) for total in self.totals]
        ids = iter((1 + rng.permutation(sum(lengths))).tolist())
        self.blocks = [[next(ids) for _ in range(length)] for length in lengths]
        layer = np.full((2, sum(lengths) + 2, kv_heads, self.block_size, self.size), EMPTY, np.float32)
        layer[:, -1] = np.nan
        self.streams = []
        for total, blocks in zip(self.totals, self.blocks, strict=True):
            tokens = floats(mx.array(rng.normal(size=(2, kv_heads, total, self.size)), self.dtype))
            for position in range(total):
                block, offset = blocks[position // self.block_size], position % self.block_size
                layer[:, block, :, offset] = tokens[:, :, position]
            self.streams.append(tokens)
        self.stored = (mx.array(layer[0], self.dtype), mx.array(layer[1], self.dtype))

    def check(self, spans: Sequence[tuple[int, int, int]], window: int, scale: float = 0.4) -> None:
        """Assert that attention of these spans (sequence, start, stop) matches dense attention.

        Blocks that no token of a span sees are placeholders.
        """
        length = sum(stop - start for _, start, stop in spans)
        q = mx.random.normal((1, self.heads[0], length, self.size), key=mx.random.key(7))
        holes = [seen_from(start, window)[0] // self.block_size for _, start, _ in spans]
        batch = packed([(self.blocks[i], start, stop) for i, start, stop in spans], self.block_size, holes)
        out = windowed_attention(q, *self.stored, batch, scale, window)
        assert (out.shape, out.dtype) == (q.shape, mx.float32)
        expected, row = [], 0
        for i, start, stop in spans:
            keys, values = self.streams[i][:, :, :stop]
            rows = floats(q)[0, :, row : row + stop - start]
            expected.append(seen_attention(rows, keys, values, scale, window))
            row += stop - start
        np.testing.assert_allclose(np.array(out)[0], np.concatenate(expected, axis=1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, 4, 7, 33, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_6_prompts_chunks_and_decodes_in_one_step_match_numpy(shape: dict, window: int) -> None:
    """Oracle: dense attention of each sequence, NumPy in float64, one query at a time.

    Windows of one token, smaller than, equal to and larger than a block, and larger than the sequence. First
    blocks may be released.
    """
    pool = Pool(**shape)
    ends = list(enumerate(shape["totals"]))
    pool.check([(i, 0, total) for i, total in ends], window)
    pool.check([(i, total - 1, total) for i, total in ends], window)
    pool.check([(i, i * total // (i + 1), total) for i, total in ends], window)
    pool.check([(i, total // 3, total // 3 + 1) for i, total in reversed(ends)], window)


@pytest.mark.parametrize("scale", [0.0, 0.125, 1.7])
def test_task_6_scores_are_multiplied_by_the_scale(scale: float) -> None:
    """Oracle: NumPy in float64."""
    Pool([9, 6]).check([(0, 2, 9), (1, 3, 6)], 3, scale)


def test_task_6_attention_does_not_change_the_pool() -> None:
    """Oracle: the pool before the call."""
    pool = Pool([9, 6])
    before = [np.array(x) for x in pool.stored]
    pool.check([(0, 2, 9), (1, 3, 6)], 3)
    for now, was in zip(pool.stored, before, strict=True):
        np.testing.assert_array_equal(np.array(now), was)


# Task 7: WindowedContext.attend


def test_task_7_each_layer_uses_the_window_of_its_group() -> None:
    """Oracle: by hand: 2, 4, 9 and 5 with equal keys: means of two in layer 0, of all in layer 1.

    Both groups write to the only layer of the pool, each to its own blocks.
    """
    groups = (LayerGroup((1,), None), LayerGroup((0,), 2))
    pool, allocator = KVPool(4, 2, 1, 2, dtype=mx.float32), BlockAllocator(4)
    tables = [BlockTable(allocator, 2), WindowedTable(allocator, 2)]
    for table in tables:
        table.append_tokens(4)
    context = WindowedContext(pool, groups, [pack_batch([Span(table, 0, 4)]) for table in tables], 1.0, None)
    k, v = mx.zeros((1, 1, 4, 2)), mx.array([[[[2.0, 0], [4, 0], [9, 0], [5, 0]]]])
    first = np.array(context.attend(0, queries(1, 4), k, v))
    second = np.array(context.attend(1, queries(1, 4), k, v))
    np.testing.assert_allclose(first[0, 0, :, 0], [2, 3, 6.5, 7], rtol=1e-6)
    np.testing.assert_allclose(second[0, 0, :, 0], [2, 3, 5, 5], rtol=1e-6)


class CopyingPool(KVPool):
    """A pool that lends copies, so writes are lost unless the arrays are put back."""

    def lend(self, layer: int) -> tuple[mx.array, mx.array]:
        """Copies of a layer's keys and values."""
        keys, values = (array + 0 for array in super().lend(layer))
        mx.eval(keys, values)
        return keys, values


def test_task_7_a_layer_writes_to_its_index_in_the_group() -> None:
    """Oracle: by hand: layers 2 and 0 are the first and second of their group, layers 1 and 3 of theirs.

    The pool has two layers for four. Common mistakes: using the layer's or the group's number as the index,
    not putting the arrays back.
    """
    groups = (LayerGroup((2, 0), None), LayerGroup((1, 3), 2))
    pool, allocator = CopyingPool(2, 2, 1, 2, num_layers=2, dtype=mx.float32), BlockAllocator(2)
    tables = [BlockTable(allocator, 2), WindowedTable(allocator, 2)]
    for table in tables:
        table.append_tokens(2)
    context = WindowedContext(pool, groups, [pack_batch([Span(table, 0, 2)]) for table in tables], 1.0, None)
    for layer in range(4):
        x = mx.full((1, 1, 2, 2), float(layer + 1))
        mx.eval(context.attend(layer, queries(1, 2), x, -x))
    for table, group in zip(tables, groups, strict=True):
        for index, layer in enumerate(group.layers):
            keys, values = pool.read(index, mx.array(table.slots(0, 2), mx.int32))
            assert keys.tolist() == (-values).tolist() == np.full((2, 1, 2), layer + 1).tolist()


class RecordingContext(WindowedContext):
    """A context that records the calls of `_compute` and evaluates nothing."""

    computed: tuple[tuple[int, Attended], ...] = ()

    def _compute(self, layer: int, attended: Attended) -> None:
        self.computed += ((layer, attended),)


def test_task_7_each_layer_is_computed_once_with_the_arrays_of_its_write() -> None:
    """Oracle: by count, and by hand: layers 0 and 3 have full attention and layer 2 has a window of two.

    Without the call the outputs are the same, but nothing is computed before the last layer.
    """
    groups = (LayerGroup((0, 3), None), LayerGroup((2,), 2))
    pool, allocator = KVPool(4, 2, 1, 2, num_layers=2, dtype=mx.float32), BlockAllocator(4)
    tables = [BlockTable(allocator, 2), WindowedTable(allocator, 2)]
    for table in tables:
        table.append_tokens(4)
    batches = [pack_batch([Span(table, 0, 4)]) for table in tables]
    context, x = RecordingContext(pool, groups, batches, 1.0, None), numbers(2, 4, 9, 5).reshape(1, 1, 4, 2)
    outputs = [context.attend(layer, queries(1, 4), x, x) for layer in (3, 2, 0)]
    assert [layer for layer, _ in context.computed] == [3, 2, 0]
    for (_, attended), out in zip(context.computed, outputs, strict=True):
        assert attended.out.tolist() == out.tolist()
        assert attended.keys.shape == attended.values.shape == (4, 1, 2, 2)


MIXED = (LayerGroup((1, 4), None), LayerGroup((0, 2), 3), LayerGroup((3,), 6), LayerGroup((5, 6), 1))


def overwrite(pool: KVPool, block: int) -> None:
    """Overwrite a whole block, as another sequence would."""
    slots = mx.arange(block * pool.block_size, (block + 1) * pool.block_size)
    others = mx.full((pool.block_size, 2, 8), EMPTY)
    for layer in range(2):
        pool.write(layer, slots, others, others)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
def test_task_7_sequences_grow_while_passed_blocks_are_released(block_size: int, dtype: mx.Dtype) -> None:
    """Oracle: dense attention of each sequence, NumPy in float64, on keys as stored.

    Two sequences in chunks of 1 to 4 tokens, seven layers in four groups; blocks that a window has passed are
    released and overwritten at once. The pool is too small for all tokens.
    """
    rng, lengths = np.random.default_rng(1), (33, 20)
    needed = sum(group.max_blocks(n, block_size, 4) for group in MIXED for n in lengths)
    pool = KVPool(needed, block_size, 2, 8, num_layers=2, dtype=dtype)
    allocator, texts = BlockAllocator(needed), rng.normal(size=(2, 7, 3, 4, 33, 8)).astype(np.float32)
    texts[:, :, 1:] = floats(mx.array(texts[:, :, 1:], dtype))
    layout = PageLayout(MIXED, block_size, 4)
    tables, done = [layout.tables(allocator) for _ in lengths], [0, 0]
    while done != list(lengths):
        stops = [min(n, now + int(rng.integers(1, 5))) for n, now in zip(lengths, done, strict=True)]
        steps = [
            (i, start, stop) for i, (start, stop) in enumerate(zip(done, stops, strict=True)) if stop > start
        ]
        for i, start, stop in steps:
            for table in tables[i]:
                table.append_tokens(stop - start)
        batches = [
            pack_batch([Span(tables[i][g], start, stop) for i, start, stop in steps]) for g in range(4)
        ]
        context = WindowedContext(pool, MIXED, batches, 0.4, None)
        for group in MIXED:
            for layer in group.layers:
                q, k, v = (
                    np.concatenate(
                        [texts[i, layer, part, :heads, start:stop] for i, start, stop in steps], axis=1
                    )
                    for part, heads in enumerate((4, 2, 2))
                )
                out = np.array(context.attend(layer, *(mx.array(x[None]) for x in (q, k, v))))[0]
                parts, row = [], 0
                for i, start, stop in steps:
                    keys, values = texts[i, layer, 1:, :2, :stop]
                    rows = q[:, row : row + stop - start]
                    parts.append(seen_attention(rows, keys, values, 0.4, group.window))
                    row += stop - start
                np.testing.assert_allclose(out, np.concatenate(parts, axis=1), rtol=0, atol=2e-5)
        for i, _, stop in steps:
            for block in layout.release_passed(tables[i], stop):
                overwrite(pool, block)
        done = stops
