"""Day 3.2, tasks 1 to 3: packing a step's tokens into one row, and attention over scattered pages."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.paged_attention import BlockAllocator
from tiny_llm.paged_kernel import Span, pack_batch, paged_attention, write_and_attend

from common.blocks import filled, table_of
from common.examples import quick
from common.numpy_oracles import causal_attention
from common.paged_pools import SHAPES, Pool, pool_of, shaped_pool
from common.toy_arrays import EMPTY, floats, numbers, queries

# Task 1: pack_batch


def test_task_1_tokens_of_all_spans_are_packed_in_order() -> None:
    """Oracle: by hand: the last 2 of 9 tokens, then 2 from the start, then one in the middle of 4."""
    spans = [
        Span(table_of([5, 1, 3], 9), 7, 9),
        Span(table_of([7], 2), 0, 2),
        Span(table_of([2], 4), 1, 2),
    ]
    batch = pack_batch(spans)
    assert batch.positions.tolist() == [7, 8, 0, 1, 1]
    assert batch.row_of_token.tolist() == [0, 0, 1, 1, 2]
    assert batch.slots.tolist() == [1 * 4 + 3, 3 * 4, 28, 29, 9]
    assert list(batch.spans) == spans


def test_task_1_each_span_has_a_padded_row_of_blocks() -> None:
    """Oracle: by hand: one table has 3 blocks and the other has 1, padded with 0."""
    batch = pack_batch([Span(table_of([7], 2), 0, 2), Span(table_of([5, 1, 3], 9), 8, 9)])
    assert batch.tables.tolist() == [[7, 0, 0], [5, 1, 3]]


def test_task_1_a_row_of_the_tables_includes_blocks_after_its_span() -> None:
    """Oracle: by hand: all 3 blocks of the table, although the span needs only one."""
    batch = pack_batch([Span(table_of([5, 1, 3], 9), 0, 2), Span(table_of([7, 2], 8), 0, 8)])
    assert batch.tables.tolist() == [[5, 1, 3], [7, 2, 0]]


def test_task_1_all_arrays_are_int32() -> None:
    """Oracle: the docstring of `PackedBatch`: the kernels read int32."""
    batch = pack_batch([Span(table_of([1, 0], 5), 0, 5)])
    arrays = (batch.positions, batch.slots, batch.row_of_token, batch.tables)
    assert {array.dtype for array in arrays} == {mx.int32}
    assert [array.shape for array in arrays] == [(5,), (5,), (5,), (1, 2)]


@settings(quick, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=1, max_size=5), st.integers(1, 5))
def test_task_1_every_token_finds_its_slot_through_its_row(
    spans: list[tuple[int, int, int]], block_size: int
) -> None:
    """Oracle: the definition of a slot: the block that the token's own row names, and the offset in it."""
    allocator, packed = BlockAllocator(100), []
    for total, start, length in spans:
        table = filled(allocator, total, block_size)
        packed.append(Span(table, start % total, min(total, start % total + length)))
    batch = pack_batch(packed)
    length = sum(span.stop - span.start for span in packed)
    assert batch.positions.size == batch.row_of_token.size == batch.slots.size == length
    for position, row, slot in zip(
        batch.positions.tolist(), batch.row_of_token.tolist(), batch.slots.tolist(), strict=True
    ):
        block, offset = divmod(slot, block_size)
        assert offset == position % block_size
        assert batch.tables[row, position // block_size].item() == block


# Task 2: paged_attention


def test_task_2_a_token_attends_to_earlier_tokens_in_scattered_blocks() -> None:
    """Oracle: by hand: 2, 4 and 9 are in blocks 2 and 0; with equal keys the running means are 2, 3 and 5."""
    values = numbers(9, EMPTY, EMPTY, EMPTY, 2, 4)
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 0, 3)])
    out = paged_attention(queries(1, 3), mx.zeros_like(values), values, batch, 1.0)
    assert out.shape == (1, 1, 3, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


def test_task_2_blocks_come_from_the_tables_of_the_batch() -> None:
    """Oracle: by hand: the batch's row names the blocks [0, 1] of a smaller pool, the span's table [2, 7].

    Common mistake: using `span.table`, whose block 7 is not in the pool.
    """
    values = numbers(2, 4, 9, EMPTY, EMPTY, EMPTY)
    batch = pack_batch([Span(table_of([2, 7], 3, block_size=2), 0, 3)])
    batch = replace(batch, tables=mx.array([[0, 1]], mx.int32))
    out = paged_attention(queries(1, 3), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


def test_task_2_each_span_has_its_own_row_of_tables() -> None:
    """Oracle: by hand: two spans of one table, whose rows were replaced by the blocks 1 and 0."""
    values, table = numbers(2, 4, 6, 8), table_of([5], 2, block_size=2)
    batch = replace(
        pack_batch([Span(table, 0, 2), Span(table, 1, 2)]), tables=mx.array([[1, 0], [0, 0]], mx.int32)
    )
    out = paged_attention(queries(1, 3), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [6, 7, 3], rtol=1e-6)


def test_task_2_only_the_tokens_of_the_span_are_queries() -> None:
    """Oracle: by hand: the last two of three tokens; the first was computed before."""
    values = numbers(9, EMPTY, EMPTY, EMPTY, 2, 4)
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 1, 3)])
    out = paged_attention(queries(1, 2), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [3, 5], rtol=1e-6)


def test_task_2_later_tokens_of_the_sequence_are_masked() -> None:
    """Oracle: by hand: 9 and 7 are later tokens of the same sequence, after the two of this step."""
    values = numbers(9, 7, EMPTY, EMPTY, 2, 4)
    batch = pack_batch([Span(table_of([2, 0], 4, block_size=2), 0, 2)])
    out = paged_attention(queries(1, 2), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3], rtol=1e-6)


def test_task_2_old_data_may_be_nan() -> None:
    """Oracle: by hand: 2, 4 and 9; the place after the last token holds NaN, as after an overflow.

    Common mistake: hiding old data with a mask or a weight of 0: NaN - inf and 0 * NaN are NaN. Leave it out.
    """
    nan = float("nan")
    values, keys = numbers(9, nan, EMPTY, EMPTY, 2, 4), numbers(0, nan, EMPTY, EMPTY, 0, 0)
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 0, 3)])
    out = paged_attention(queries(1, 3), 0 * keys, values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


def test_task_2_every_span_attends_only_to_its_own_sequence() -> None:
    """Oracle: by hand: 6 is in one sequence, 1, 3 and 8 in another; the step has 1 and 2 tokens of them."""
    values = numbers(1, 3, 6, EMPTY, 8, EMPTY)
    spans = [Span(table_of([1], 1, block_size=2), 0, 1), Span(table_of([0, 2], 3, block_size=2), 1, 3)]
    out = paged_attention(queries(1, 3), mx.zeros_like(values), values, pack_batch(spans), 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [6, 2, 4], rtol=1e-6)


def test_task_2_neighbouring_query_heads_share_a_head_of_keys_and_values() -> None:
    """Oracle: by hand: query heads 0, 1 and 2 of 6 read the first of two heads. Common mistake: h % Hkv."""
    values = mx.array([[[[5.0, 0]], [[70.0, 0]]]])  # one block of one token, two heads
    batch = pack_batch([Span(table_of([0], 1, block_size=1), 0, 1)])
    out = paged_attention(queries(6, 1), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, :, 0, 0], [5, 5, 5, 70, 70, 70], rtol=1e-6)


def test_task_2_two_heads_and_two_sequences_give_the_means_worked_out_by_hand() -> None:
    """Oracle: by hand: keys are equal, so outputs are running means of the values, [n, -n] for each token.

    One sequence has 2, 4 and 9 in the first head and ten times that in the second; the other has 6 and 8.
    Common mistakes: heads and block offsets swapped, a reshape before the swap of axes.
    """
    first = [
        [[9, EMPTY], [90, EMPTY]],
        [[6, 8], [60, 80]],
        [[2, 4], [20, 40]],
    ]  # blocks, heads, offsets
    numbers = mx.array(first)
    values = mx.stack([numbers, -numbers], axis=-1)
    spans = [Span(table_of([2, 0], 3, block_size=2), 1, 3), Span(table_of([1], 2, block_size=2), 1, 2)]
    out = paged_attention(queries(2, 3), mx.zeros_like(values), values, pack_batch(spans), 1.0)
    assert out.shape == (1, 2, 3, 2), "the output must have the shape of q, [1, H, T, D]"
    found = np.array(out)
    for packed, (span, position, mean) in enumerate([(0, 1, 3), (0, 2, 5), (1, 1, 7)]):
        for head, expected in enumerate([mean, 10 * mean]):
            assert found[0, head, packed].tolist() == pytest.approx([expected, -expected]), (
                f"span {span}, token at position {position}, head {head}"
            )


def packed_queries(spans: Sequence[Span], heads: int, size: int) -> mx.array:
    """Random queries for all tokens of a step, [1, H, T, D]."""
    length = sum(span.stop - span.start for span in spans)
    return mx.random.normal((1, heads, length, size), key=mx.random.key(7))


def expected_of(pool: Pool, spans: Sequence[Span], q: mx.array, scale: float) -> np.ndarray:
    """Dense attention for every span, [1, H, T, D] in float64."""
    parts, row = [], 0
    for table, start, stop in spans:
        keys, values = (x[:, :stop] for x in pool.streams[pool.tables.index(table)])
        parts.append(causal_attention(floats(q)[0, :, row : row + stop - start], keys, values, scale))
        row += stop - start
    return np.concatenate(parts, axis=1)[None]


def check_attention(pool: Pool, spans: list[Span], heads: int, scale: float) -> None:
    """Assert that paged attention of these spans matches dense attention of each sequence."""
    q = packed_queries(spans, heads, pool.keys.shape[-1])
    out = paged_attention(q, pool.keys, pool.values, pack_batch(spans), scale)
    assert (out.shape, out.dtype) == (q.shape, mx.float32)
    np.testing.assert_allclose(np.array(out), expected_of(pool, spans, q, scale), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_2_prompts_chunks_and_decodes_in_one_step_match_numpy(shape: dict) -> None:
    """Oracle: dense attention of each sequence, NumPy in float64, on keys and values as stored."""
    pool, heads = shaped_pool(shape)
    ends = [(table, table.num_tokens) for table in pool.tables]
    for spans in (
        [Span(table, 0, total) for table, total in ends],
        [Span(table, total - 1, total) for table, total in ends],
        [Span(table, row * total // (row + 1), total) for row, (table, total) in enumerate(ends)],
        [Span(table, total // 3, total // 3 + 1) for table, total in reversed(ends)],
    ):
        check_attention(pool, spans, heads, 0.4)


@pytest.mark.parametrize("scale", [0.0, 0.125, 1.7])
def test_task_2_scores_are_multiplied_by_the_scale(scale: float) -> None:
    """Oracle: NumPy in float64."""
    pool = pool_of([9, 6])
    check_attention(pool, [Span(table, 2, table.num_tokens) for table in pool.tables], 4, scale)


def test_task_2_forks_read_the_blocks_that_they_share() -> None:
    """Oracle: dense attention of the sequence: both spans read the same blocks."""
    pool = pool_of([6])
    [table] = pool.tables
    first, q = table.fork(), packed_queries([Span(table, 5, 6)], 4, 8)
    twice = [Span(table, 5, 6), Span(first, 5, 6)]
    both = mx.concatenate([q, q], axis=2)
    out = np.array(paged_attention(both, pool.keys, pool.values, pack_batch(twice), 0.4))
    np.testing.assert_array_equal(out[:, :, 0], out[:, :, 1])
    np.testing.assert_allclose(out[:, :, :1], expected_of(pool, twice[:1], q, 0.4), atol=2e-5)


def test_task_2_attention_does_not_change_the_pool() -> None:
    """Oracle: the pool before the call."""
    pool = pool_of([9, 6])
    before = np.array(pool.keys), np.array(pool.values)
    spans = [Span(table, 2, table.num_tokens) for table in pool.tables]
    mx.eval(paged_attention(packed_queries(spans, 4, 8), pool.keys, pool.values, pack_batch(spans), 0.4))
    np.testing.assert_array_equal(np.array(pool.keys), before[0])
    np.testing.assert_array_equal(np.array(pool.values), before[1])


# Task 3: write_and_attend


def empty(
    num_blocks: int, kv_heads: int, block_size: int, size: int, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Keys or values of an empty pool, all slots set to `EMPTY`."""
    return mx.full((num_blocks, kv_heads, block_size, size), EMPTY, dtype)


def test_task_3_keys_and_values_are_written_to_their_slots_and_nothing_else_changes() -> None:
    """Oracle: by hand: two heads, three tokens: 1 and 2 after another one in blocks [3, 1], and 3 in block 0.

    Common mistake: heads and tokens swapped.
    """
    batch = pack_batch(
        [Span(table_of([3, 1], 3, block_size=2), 1, 3), Span(table_of([0], 1, block_size=2), 0, 1)]
    )
    k = mx.array([[[[1.0, 11], [2, 12], [3, 13]], [[4, 14], [5, 15], [6, 16]]]])  # [1, Hkv, T, D]
    q = mx.zeros((1, 2, 3, 2))
    _, keys, values = write_and_attend(q, k, k + 100, empty(5, 2, 2, 2), empty(5, 2, 2, 2), batch, 1.0)
    expected = np.full((5, 2, 2, 2), EMPTY, np.float32)
    expected[3, :, 1] = [[1, 11], [4, 14]]
    expected[1, :, 0] = [[2, 12], [5, 15]]
    expected[0, :, 0] = [[3, 13], [6, 16]]
    np.testing.assert_array_equal(np.array(keys), expected)
    np.testing.assert_array_equal(np.array(values), np.where(expected == EMPTY, EMPTY, expected + 100))


def test_task_3_a_token_attends_to_itself() -> None:
    """Oracle: by hand: with equal keys the running means of 2, 4 and 9.

    Common mistake: attending before writing.
    """
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 0, 3)])
    k, v = mx.zeros((1, 1, 3, 2)), mx.array([[[[2.0, 0], [4, 0], [9, 0]]]])
    out, *_ = write_and_attend(queries(1, 3), k, v, empty(3, 1, 2, 2), empty(3, 1, 2, 2), batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_task_3_a_token_attends_to_its_own_key_and_value_as_stored(dtype: mx.Dtype) -> None:
    """Oracle: by hand: the only value, rounded to the pool's dtype; the output has the query's dtype."""
    batch = pack_batch([Span(table_of([0], 1), 0, 1)])
    v = mx.full((1, 1, 1, 2), 0.1)
    pool = empty(1, 1, 4, 2, dtype)
    out, keys, values = write_and_attend(queries(1, 1), v, v, pool, pool + 0, batch, 1.0)
    assert (out.dtype, keys.dtype, values.dtype) == (mx.float32, dtype, dtype)
    assert out[0, 0, 0, 0].item() == pytest.approx(mx.array(0.1).astype(dtype).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_task_3_written_values_are_rounded_to_the_dtype_of_the_pool(dtype: mx.Dtype) -> None:
    """Oracle: MLX's own rounding: values between two representable ones, too small and too large ones."""
    given = [0.1, 1 + 2**-9, 1 + 2**-12, 2049.0, 65519.0, 70000.0, 1e-6, -3e-8]
    k = mx.array(given).reshape(1, 1, len(given) // 2, 2)
    batch = pack_batch([Span(table_of([1], 4), 0, 4)])
    pool = empty(2, 1, 4, 2, dtype)
    _, keys, values = write_and_attend(mx.zeros((1, 1, 4, 2)), k, -k, pool, pool + 0, batch, 0.0)
    assert (keys.dtype, values.dtype) == (dtype, dtype)
    np.testing.assert_array_equal(floats(keys[1]).ravel(), floats(mx.array(given).astype(dtype)))
    np.testing.assert_array_equal(floats(values[1]).ravel(), floats(mx.array(given).astype(dtype)) * -1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_3_steps_that_fill_the_pool_match_numpy(shape: dict) -> None:
    """Oracle: dense attention of each sequence, NumPy in float64. Each step packs chunks of 1 to 5 tokens."""
    (pool, heads), rng = shaped_pool(shape), np.random.default_rng(3)
    size, dtype = pool.keys.shape[-1], pool.keys.dtype
    stored_keys, stored_values = np.array(floats(pool.keys)), np.array(floats(pool.values))
    keys, values = mx.full(pool.keys.shape, EMPTY, dtype), mx.full(pool.keys.shape, EMPTY, dtype)
    done = [0] * len(pool.tables)
    while any(now < table.num_tokens for now, table in zip(done, pool.tables, strict=True)):
        spans = []
        for row, table in enumerate(pool.tables):
            stop = min(table.num_tokens, done[row] + int(rng.integers(1, 6)))
            if stop > done[row]:
                spans.append(Span(table, done[row], stop))
                done[row] = stop
        q = packed_queries(spans, heads, size)
        texts = [[x[:, s.start : s.stop] for x in pool.streams[pool.tables.index(s.table)]] for s in spans]
        k, v = (mx.array(np.concatenate(parts, axis=1)[None]) for parts in zip(*texts, strict=True))
        out, keys, values = write_and_attend(q, k, v, keys, values, pack_batch(spans), 0.4)
        np.testing.assert_allclose(np.array(out), expected_of(pool, spans, q, 0.4), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(floats(keys), stored_keys)
    np.testing.assert_array_equal(floats(values), stored_values)
