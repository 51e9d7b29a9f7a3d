"""Day 3.2, tasks 4 to 6: pages as separate arrays, copied and attended to."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.errors import UnknownBlockError
from tiny_llm.page_block import PageBlock, copy_block, pack_last_tokens, paged_attention_kernel
from tiny_llm.paged_kernel import Span

from common.blocks import table_of
from common.examples import quick
from common.numpy_oracles import causal_attention
from common.paged_pools import SHAPES, Pool, pool_of, shaped_pool
from common.toy_arrays import EMPTY, floats, numbers

TOLERANCE = {mx.float32: 2e-5, mx.float16: 3e-3, mx.bfloat16: 3e-2}  # of an output of that dtype

# Task 4: copy_block


def page_of(*tokens: int) -> PageBlock:
    """A page of two heads of size 3: token i has keys `tokens[i]` and values `tokens[i] + 0.5`."""
    keys = mx.broadcast_to(mx.array(tokens, mx.float32)[:, None], (2, len(tokens), 3)) + 0
    return PageBlock(keys, keys + 0.5)


def tokens_of(page: PageBlock) -> list[int]:
    """The tokens of a page; fails if its heads, or keys and values, do not match."""
    tokens = [int(number) for number in page.keys[0, :, 0].tolist()]
    assert mx.array_equal(page.keys, page_of(*tokens).keys).item()
    assert mx.array_equal(page.values, page_of(*tokens).values).item()
    return tokens


def test_task_4_a_range_is_copied_to_another_offset() -> None:
    """Oracle: by hand, pages of two sizes: keys and values of all heads, and nothing outside the range."""
    source, target = page_of(1, 2, 3, 4, 5), page_of(11, 12, 13, 14)
    copy_block(source, target, 1, 2, 2)
    assert tokens_of(target) == [11, 12, 2, 3]
    assert tokens_of(source) == [1, 2, 3, 4, 5]


def test_task_4_a_whole_page_or_an_empty_range_can_be_copied() -> None:
    """Oracle: by hand."""
    source, target = page_of(1, 2, 3), page_of(11, 12, 13)
    for place in (0, 1, 3):
        copy_block(source, target, place, 3 - place, 0)
    assert tokens_of(target) == [11, 12, 13]
    copy_block(source, target, 0, 0, 3)
    assert tokens_of(target) == [1, 2, 3]


def test_task_4_source_and_target_stay_independent() -> None:
    """Oracle: by hand: a later write to one does not change the other."""
    source, target = page_of(1, 2), page_of(8, 9)
    copy_block(source, target, 0, 0, 2)
    source.keys[:, 0] = 5.0
    target.values[:, 1] = 6.0
    assert target.keys[0, :, 0].tolist() == [1, 2]
    assert source.values[0, :, 0].tolist() == [1.5, 2.5]


def test_task_4_the_target_page_keeps_its_array_objects() -> None:
    """Oracle: the docstring: other references to the arrays see the copy.

    Common mistake: assigning new arrays.
    """
    source, target = page_of(1, 2), page_of(8, 9)
    keys, values = target.keys, target.values
    copy_block(source, target, 0, 1, 1)
    assert target.keys is keys, "the page must keep its array of keys"
    assert target.values is values, "the page must keep its array of values"
    assert tokens_of(target) == [8, 1]


@pytest.mark.parametrize(("src_start", "dst_start"), [(0, 1), (1, 0), (0, 2), (2, 0), (1, 1)])
def test_task_4_ranges_of_one_page_may_overlap(src_start: int, dst_start: int) -> None:
    """Oracle: a Python list: the slice is read before it is written.

    Common mistake: copying token by token.
    """
    page, expected = page_of(1, 2, 3, 4, 5), [1, 2, 3, 4, 5]
    copy_block(page, page, src_start, dst_start, 3)
    expected[dst_start : dst_start + 3] = expected[src_start : src_start + 3]
    assert tokens_of(page) == expected


OUTSIDE = {  # src_start, dst_start, length
    "the_source_starts_before_its_page": (-1, 0, 1),
    "the_target_starts_before_its_page": (0, -1, 1),
    "the_source_ends_past_its_page": (3, 0, 2),
    "the_target_ends_past_its_page": (0, 2, 2),
    "a_length_of_minus_1": (0, 0, -1),
    "an_empty_source_past_its_page": (5, 0, 0),
    "a_length_beyond_both_pages": (0, 0, 5),
}


@pytest.mark.parametrize(("src_start", "dst_start", "length"), OUTSIDE.values(), ids=OUTSIDE)
def test_task_4_a_range_outside_its_page_is_rejected(src_start: int, dst_start: int, length: int) -> None:
    """Oracle: the docstring: pages of 4 and 3 tokens, and nothing is copied."""
    source, target = page_of(1, 2, 3, 4), page_of(7, 8, 9)
    with pytest.raises(ValueError):
        copy_block(source, target, src_start, dst_start, length)
    assert tokens_of(target) == [7, 8, 9]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 4, 3), mx.float32), ((2, 4, 6), mx.float32), ((2, 4, 3), mx.float16)],
    ids=["different_heads", "different_D", "different_dtype"],
)
def test_task_4_pages_of_different_shapes_or_dtypes_are_rejected(
    shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    """Oracle: the docstring: a different number of heads, D or dtype. One head would broadcast to two."""
    target = page_of(1, 2, 3, 4)
    with pytest.raises(ValueError):
        copy_block(PageBlock(mx.zeros(shape, dtype), mx.zeros(shape, dtype)), target, 0, 0, 2)
    assert tokens_of(target) == [1, 2, 3, 4]


# Task 5: pack_last_tokens


def test_task_5_the_tables_hold_page_indices_and_the_rest_equals_a_packed_batch() -> None:
    """Oracle: by hand, blocks of 4: the last 3 of 10 tokens and of 3."""
    tables = [table_of([42, 7, 9], 10), table_of([7], 3)]
    batch = pack_last_tokens(tables, 3, {42: 2, 7: 0, 9: 1})
    assert batch.tables.tolist() == [[2, 0, 1], [0, 0, 0]]
    assert batch.positions.tolist() == [7, 8, 9, 0, 1, 2]
    assert batch.row_of_token.tolist() == [0, 0, 0, 1, 1, 1]
    assert list(batch.spans) == [Span(tables[0], 7, 10), Span(tables[1], 0, 3)]
    arrays = (batch.positions, batch.row_of_token, batch.tables)
    assert {array.dtype for array in arrays} == {mx.int32}


def test_task_5_only_blocks_with_tokens_need_an_index() -> None:
    """Oracle: by hand: one table has a block without tokens; the other has more tokens."""
    tables = [table_of([3, 8], 4), table_of([5, 3], 6)]
    batch = pack_last_tokens(tables, 1, {3: 0, 5: 1})
    assert batch.tables.tolist() == [[0, 0], [1, 0]]


def test_task_5_all_tokens_of_a_table_can_be_queries() -> None:
    """Oracle: by hand: as many tokens as the table has, with the tables in the other order."""
    tables = [table_of([7], 2), table_of([9, 4], 5)]
    batch = pack_last_tokens(tables, 2, {4: 0, 7: 1, 9: 2})
    assert batch.tables.tolist() == [[1, 0], [2, 0]]
    assert batch.positions.tolist() == [0, 1, 3, 4]


# Task 6: paged_attention_kernel


def in_pages(pool: Pool) -> dict[int, PageBlock]:
    """The blocks of a pool as separate pages, by block id."""
    return {
        block: PageBlock(pool.keys[block] + 0, pool.values[block] + 0) for block in range(pool.keys.shape[0])
    }


def last_tokens(pool: Pool, query: mx.array, scale: float) -> np.ndarray:
    """Dense attention of each row's L queries as the last L tokens of its table, [B, H, L, D] in float64."""
    rows = zip(floats(query), pool.streams, strict=True)
    return np.stack([causal_attention(q, keys, values, scale) for q, (keys, values) in rows])


def test_task_6_the_queries_are_the_last_tokens_of_their_tables() -> None:
    """Oracle: by hand: with equal keys, the means of 2, 4 and of 2, 4, 9; and of 6, 8 and of 6."""
    tables = [table_of([2, 0], 3, block_size=2), table_of([1], 2, block_size=2)]
    values = {0: numbers(9, EMPTY), 1: numbers(6, 8), 2: numbers(2, 4)}
    pages = {block: PageBlock(mx.zeros((1, 2, 2)), value[0]) for block, value in values.items()}
    out = paged_attention_kernel(mx.ones((2, 1, 2, 2)), tables, pages, 2, 1.0)
    np.testing.assert_allclose(np.array(out)[:, 0, :, 0], [[3, 5], [6, 7]], rtol=1e-6)


def test_task_6_each_query_attends_to_its_own_row_and_head() -> None:
    """Oracle: by hand: the query [40, 0] attends to the first token of its row, and [0, 40] to the second.

    Row 0 has the values 2, 4 and 9 in the first head and ten times that in the second; row 1 has 6 and 8,
    and its first query sees only the first token. A value n is [n, -n]. Common mistake: a reshape between
    [B, H, L, D] and the packed row without `swapaxes`.
    """
    tables = [table_of([2, 0], 3, block_size=2), table_of([1], 2, block_size=2)]
    first, second, neither = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
    pages = {}
    for block, tokens, keys in (
        (2, [2.0, 4.0], [first, second]),
        (0, [9.0, EMPTY], [neither, neither]),
        (1, [6.0, 8.0], [first, second]),
    ):
        heads = mx.array([tokens, [10 * token for token in tokens]])
        pages[block] = PageBlock(mx.array([keys, keys]), mx.stack([heads, -heads], axis=-1))
    query = 40 * mx.array([[[first, second], [second, first]]] * 2)  # two rows, two heads, two queries
    out = paged_attention_kernel(query, tables, pages, 2, 1.0)
    assert out.shape == (2, 2, 2, 2), "the output must have the shape of the query, [B, H, L, D]"
    expected = [[[2, 4], [40, 20]], [[6, 8], [60, 60]]]
    for row, head, number in np.ndindex(2, 2, 2):
        picked = expected[row][head][number]
        assert out[row, head, number].tolist() == pytest.approx([picked, -picked]), (
            f"row {row}, head {head}, query {number} of the row"
        )


def test_task_6_a_scale_of_zero_is_not_replaced_by_the_default() -> None:
    """Oracle: by hand: with a scale of 0 all scores are equal, so the output is the mean of 2 and 4."""
    keys = mx.array([[[9.0, 9.0], [0.0, 0.0]]])
    pages = {0: PageBlock(keys, numbers(2, 4)[0])}
    out = paged_attention_kernel(mx.ones((1, 1, 1, 2)), [table_of([0], 2, block_size=2)], pages, 2, 0.0)
    assert out[0, 0, 0, 0].item() == pytest.approx(3), "scale=0.0 was not used: only None means D**-0.5"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_6_mixed_lengths_heads_block_sizes_and_dtypes_match_numpy(shape: dict, dtype: mx.Dtype) -> None:
    """Oracle: dense attention of each row, NumPy in float64; the output has the dtype of the query."""
    pool, heads = shaped_pool(shape)
    block_size, size = pool.keys.shape[2:]
    for length in {1, min(shape["totals"])}:
        query_shape = (len(pool.tables), heads, length, size)
        query = mx.random.normal(query_shape, key=mx.random.key(length)).astype(dtype)
        out = paged_attention_kernel(query, pool.tables, in_pages(pool), block_size, 0.4)
        assert (out.shape, out.dtype) == (query.shape, dtype)
        np.testing.assert_allclose(floats(out), last_tokens(pool, query, 0.4), rtol=0, atol=TOLERANCE[dtype])


@settings(quick, max_examples=60)
@given(
    totals=st.lists(st.integers(3, 30), min_size=1, max_size=4),
    length=st.integers(1, 3),
    block_size=st.integers(1, 9),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 2), (2, 3)]),
)
def test_task_6_random_lengths_match_numpy(
    totals: list[int], length: int, block_size: int, groups: tuple[int, int]
) -> None:
    """Oracle: dense attention of each row, NumPy in float64."""
    pool = pool_of(totals, kv_heads=groups[1], block_size=block_size, size=4)
    query = mx.random.normal((len(totals), groups[0] * groups[1], length, 4), key=mx.random.key(1))
    out = paged_attention_kernel(query, pool.tables, in_pages(pool), block_size)
    np.testing.assert_allclose(floats(out), last_tokens(pool, query, 0.5), rtol=0, atol=2e-5)


def test_task_6_default_scale_and_block_size_are_used() -> None:
    """Oracle: NumPy: D ** -0.5 for D = 16, and blocks of 16."""
    pool = pool_of([20, 7], block_size=16, size=16)
    query = mx.random.normal((2, 4, 2, 16), key=mx.random.key(2))
    pages = in_pages(pool)
    for scale, out in (
        (0.25, paged_attention_kernel(query, pool.tables, pages)),
        (0.7, paged_attention_kernel(query, pool.tables, pages, scale=0.7)),
    ):
        np.testing.assert_allclose(np.array(out), last_tokens(pool, query, scale), rtol=0, atol=2e-5)


def test_task_6_attention_is_computed_in_float32() -> None:
    """Oracle: by hand: the scores are 2049 and 2048, so the weights are 0.731 and 0.269; the values 0 and 1.

    In float16 2049 is rounded to 2048: equal scores, and so 0.5.
    """
    keys = mx.array([[[2048.0, 1], [2048, 0]]], mx.float16)
    pages = {0: PageBlock(keys, mx.array([[[0.0, 0], [1, 0]]], mx.float16))}
    query = mx.ones((1, 1, 1, 2), mx.float16)
    out = paged_attention_kernel(query, [table_of([0], 2, block_size=2)], pages, 2, scale=1.0)
    np.testing.assert_allclose(floats(out)[0, 0, 0, 0], 0.2689, atol=1e-3)


def test_task_6_forks_read_the_pages_that_they_share() -> None:
    """Oracle: dense attention of each row."""
    pool = pool_of([10])
    query = mx.random.normal((2, 4, 2, 8), key=mx.random.key(3))
    tables = [pool.tables[0], pool.tables[0].fork()]
    out = np.array(paged_attention_kernel(query, tables, in_pages(pool), 4, 0.4))
    for row in range(2):
        expected = last_tokens(pool, query[row : row + 1], 0.4)
        np.testing.assert_allclose(out[row : row + 1], expected, rtol=0, atol=2e-5)


def test_task_6_block_ids_are_arbitrary_and_unused_pages_may_have_any_shape() -> None:
    """Oracle: NumPy. Block ids are only keys here: page 0 is missing, and page 5 has another shape."""
    pool = pool_of([10, 3])
    query = mx.random.normal((2, 4, 2, 8), key=mx.random.key(4))
    named = {block for table in pool.tables for block in table.blocks}
    pages = {block + 1000: page for block, page in in_pages(pool).items() if block in named}
    pages[5] = PageBlock(mx.zeros((1, 1, 1)), mx.zeros((1, 1, 1)))
    expected = last_tokens(pool, query, 0.4)
    for table in pool.tables:
        table.blocks = [block + 1000 for block in table.blocks]
    out = paged_attention_kernel(query, pool.tables, pages, 4, 0.4)
    np.testing.assert_allclose(np.array(out), expected, rtol=0, atol=2e-5)


WRONG_QUERIES = {
    "three_axes": mx.zeros((2, 4, 8)),
    "integers": mx.zeros((2, 4, 1, 8), mx.int32),
    "no_token": mx.zeros((2, 4, 0, 8)),
    "one_row_too_many": mx.zeros((3, 4, 1, 8)),
    "one_row_too_few": mx.zeros((1, 4, 1, 8)),
    "heads_not_a_multiple_of_kv_heads": mx.zeros((2, 5, 1, 8)),
    "different_head_size": mx.zeros((2, 4, 1, 16)),
    "longer_than_a_table": mx.zeros((2, 4, 6, 8)),
}


@pytest.mark.parametrize("query", WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_task_6_a_query_of_the_wrong_shape_or_dtype_is_rejected(query: mx.array) -> None:
    """Oracle: the docstring: two tables of 9 and 5 tokens, two heads of 8."""
    pool = pool_of([9, 5])
    with pytest.raises(ValueError):
        paged_attention_kernel(query, pool.tables, in_pages(pool), 4)


def test_task_6_a_block_without_a_page_is_rejected() -> None:
    """Oracle: the docstring."""
    pool = pool_of([9, 5])
    pages = in_pages(pool)
    del pages[pool.tables[1].blocks[1]]
    with pytest.raises(UnknownBlockError):
        paged_attention_kernel(mx.zeros((2, 4, 1, 8)), pool.tables, pages, 4)


def test_task_6_a_different_block_size_is_rejected() -> None:
    """Oracle: the docstring: first the argument is 8 for blocks of 4 tokens, then the pages have 8 tokens."""
    pool = pool_of([9, 5])
    query = mx.zeros((2, 4, 1, 8))
    with pytest.raises(ValueError):
        paged_attention_kernel(query, pool.tables, in_pages(pool), 8)
    wide = {block: PageBlock(mx.zeros((2, 8, 8)), mx.zeros((2, 8, 8))) for block in in_pages(pool)}
    with pytest.raises(ValueError):
        paged_attention_kernel(query, pool.tables, wide, 4)


@pytest.mark.parametrize(
    "other",
    [mx.zeros((2, 4, 8), mx.float16), mx.zeros((1, 4, 8))],
    ids=["different_dtype", "different_heads"],
)
def test_task_6_pages_of_different_shapes_or_dtypes_are_rejected(other: mx.array) -> None:
    """Oracle: the docstring."""
    pool = pool_of([9, 5])
    pages = in_pages(pool)
    pages[pool.tables[0].blocks[2]] = PageBlock(other, other + 0)
    with pytest.raises(ValueError):
        paged_attention_kernel(mx.zeros((2, 4, 1, 8)), pool.tables, pages, 4)
