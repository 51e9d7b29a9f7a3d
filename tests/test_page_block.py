"""Pages that are separate arrays: attention over them against NumPy float64, copies against a list."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.kernels import twins, use_compiled

from tiny_llm import (
    BlockAllocator,
    BlockTable,
    PageBlock,
    UnknownBlockError,
    copy_block,
    paged_attention_kernel,
)
from tiny_model import examples

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 3e-2}  # of the output: a query's own type
needs_kernels = pytest.mark.skipif(not use_compiled(), reason="no compiled kernels")


def floats(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@dataclass
class Sequences:
    """Tables of mixed lengths with tokens in pages, and the same keys and values in contiguous arrays."""

    query: mx.array  # [B, H, L, D]
    tables: list[BlockTable]
    pages: dict[int, PageBlock]
    streams: list[tuple[np.ndarray, np.ndarray]]  # keys and values [Hkv, tokens, D] as they are stored

    @property
    def block_size(self) -> int:
        return self.tables[0].block_size

    def attend(self, scale: float | None = None) -> mx.array:
        return paged_attention_kernel(self.query, self.tables, self.pages, self.block_size, scale)

    def expected(self, scale: float | None = None) -> np.ndarray:
        """Dense causal attention of the last L tokens of each sequence, in float64."""
        _, H, L, D = self.query.shape
        out = np.empty(self.query.shape)
        for row, (keys, values) in enumerate(self.streams):
            total = keys.shape[1]
            for head in range(H):
                group = head // (H // keys.shape[0])
                for i in range(L):
                    seen = total - L + i + 1
                    q = floats(self.query[row, head, i])
                    scores = keys[group, :seen] @ q * (D**-0.5 if scale is None else scale)
                    weights = np.exp(scores - scores.max())
                    out[row, head, i] = weights / weights.sum() @ values[group, :seen]
        return out


def make_sequences(
    totals: list[int],
    *,
    length: int = 1,
    heads: tuple[int, int] = (4, 2),
    size: int = 32,
    block_size: int = 4,
    dtype: mx.Dtype = mx.float32,
    query_dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Sequences:
    """`totals` tokens in each sequence; blocks are interleaved, and slots never written are NaN."""
    rng = np.random.default_rng(seed)
    H, Hkv = heads
    allocator = BlockAllocator(sum(-(-total // block_size) for total in totals) + 2)
    pages = {
        block: PageBlock(*(mx.full((Hkv, block_size, size), mx.nan, dtype) for _ in range(2)))
        for block in range(allocator.num_blocks)
    }
    tables = [BlockTable(allocator, block_size) for _ in totals]
    for row in rng.permutation(np.repeat(np.arange(len(totals)), totals)):
        tables[row].append_tokens(1)
    streams = []
    for table, total in zip(tables, totals, strict=True):
        keys, values = (mx.array(rng.normal(size=(Hkv, total, size)), dtype) for _ in range(2))
        for position in range(total):
            page, offset = pages[table.blocks[position // block_size]], position % block_size
            page.keys[:, offset] = keys[:, position]
            page.values[:, offset] = values[:, position]
        streams.append((floats(keys), floats(values)))
    query = mx.array(rng.normal(size=(len(totals), H, length, size)), query_dtype)
    return Sequences(query, tables, pages, streams)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Sequences, str]:
    """Sequences of any shape, and the name of the query's type."""
    length, hkv = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3]))
    query_dtype = draw(st.sampled_from(["float32", "float32", "float16", "bfloat16"]))
    made = make_sequences(
        draw(st.lists(st.integers(length, length + 40), min_size=1, max_size=4)),
        length=length,
        heads=(hkv * draw(st.sampled_from([1, 2, 3])), hkv),
        size=draw(st.sampled_from([32, 64, 80, 128, 256])),
        block_size=draw(st.integers(1, 17)),
        dtype=DTYPES[draw(st.sampled_from(sorted(DTYPES)))],
        query_dtype=DTYPES[query_dtype],
        seed=draw(st.integers(0, 1000)),
    )
    return made, query_dtype


# ---- attention ----


@settings(max_examples=examples(25))
@given(sequences())
def test_the_readable_attention_equals_dense_attention(drawn: tuple[Sequences, str]) -> None:
    made, query_dtype = drawn
    with twins():
        out = made.attend()
        np.testing.assert_allclose(floats(out), made.expected(), rtol=0, atol=TOLERANCE[query_dtype])
    assert (out.shape, out.dtype) == (made.query.shape, made.query.dtype)


@needs_kernels
@settings(max_examples=examples(25))
@given(sequences())
def test_the_compiled_attention_equals_dense_attention(drawn: tuple[Sequences, str]) -> None:
    made, query_dtype = drawn
    out = made.attend()
    np.testing.assert_allclose(floats(out), made.expected(), rtol=0, atol=TOLERANCE[query_dtype])
    assert (out.shape, out.dtype) == (made.query.shape, made.query.dtype)


@needs_kernels
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256, 320, 512])
def test_readable_and_compiled_attention_agree_for_every_head_size(size: int) -> None:
    made = make_sequences([37, 5], length=5, size=size, block_size=7)
    compiled = np.array(made.attend())
    with twins():
        np.testing.assert_allclose(compiled, np.array(made.attend()), rtol=0, atol=1e-5)


@needs_kernels
def test_a_row_has_the_same_bits_in_any_batch_and_for_any_block_size() -> None:
    whole = make_sequences([70, 3, 33], length=3, seed=1)
    together = np.array(whole.attend())
    for row in range(3):
        alone = Sequences(whole.query[row : row + 1], [whole.tables[row]], whole.pages, [whole.streams[row]])
        assert np.array_equal(np.array(alone.attend())[0], together[row])
    rows = []
    for block_size in (1, 5, 64):
        other = make_sequences([70], length=3, block_size=block_size, seed=2)
        rows.append(np.array(other.attend()))
    assert all(np.array_equal(rows[0], row) for row in rows[1:])


def test_a_token_sees_only_itself_and_earlier_tokens() -> None:
    made = make_sequences([9], length=3, block_size=4)
    before = np.array(made.attend())
    last = made.pages[made.tables[0].blocks[8 // 4]]
    last.keys[:, 0], last.values[:, 0] = 50.0, 50.0
    after = np.array(made.attend())
    assert np.array_equal(before[:, :, :2], after[:, :, :2])
    assert not np.array_equal(before[:, :, 2], after[:, :, 2])


def test_scale_defaults_to_one_over_the_root_of_the_head_size() -> None:
    made = make_sequences([6, 20], length=2, size=64)
    np.testing.assert_array_equal(np.array(made.attend()), np.array(made.attend(0.125)))
    np.testing.assert_allclose(np.array(made.attend(0.5)), made.expected(0.5), atol=2e-5)
    np.testing.assert_allclose(np.array(made.attend(0.0)), made.expected(0.0), atol=2e-5)


def test_block_size_defaults_to_16() -> None:
    made = make_sequences([40], block_size=16)
    out = paged_attention_kernel(made.query, made.tables, made.pages)
    np.testing.assert_allclose(np.array(out), made.expected(), atol=2e-5)


def test_forks_read_their_shared_pages() -> None:
    made = make_sequences([10], length=2)
    forked = [made.tables[0], made.tables[0].fork()]
    query = mx.concatenate([made.query, made.query])
    out = np.array(paged_attention_kernel(query, forked, made.pages, 4))
    assert np.array_equal(out[0], out[1])
    np.testing.assert_allclose(out[:1], made.expected(), atol=2e-5)


def test_only_pages_that_a_table_names_are_read() -> None:
    """Block ids may be any numbers, with gaps between them, and other pages may have any shape."""
    made = make_sequences([10, 3], length=2)
    expected = np.array(made.attend())
    named = {block for table in made.tables for block in table.blocks}
    pages = {block + 1000: page for block, page in made.pages.items() if block in named}
    pages[5] = PageBlock(mx.zeros((1, 1, 1)), mx.zeros((1, 1, 1)))
    for table in made.tables:
        table.blocks = [block + 1000 for block in table.blocks]
    assert np.array_equal(np.array(paged_attention_kernel(made.query, made.tables, pages, 4)), expected)


def test_pages_written_after_the_call_do_not_change_its_result() -> None:
    made = make_sequences([10], length=2)
    expected = np.array(made.attend())
    lazy = made.attend()
    for page in made.pages.values():
        page.keys[:], page.values[:] = 7.0, 7.0
    assert np.array_equal(np.array(lazy), expected)


# ---- attention: errors ----


def zeros(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


WRONG_QUERIES = {
    "of_three_axes": (zeros(2, 4, 32), r"float32 \(2, 4, 32\)"),
    "without_a_row": (zeros(0, 4, 1, 32), r"\(0, 4, 1, 32\)"),
    "without_a_token": (zeros(2, 4, 0, 32), r"\(2, 4, 0, 32\)"),
    "of_integers": (zeros(2, 4, 1, 32, dtype=mx.int32), "int32"),
    "with_a_row_too_many": (zeros(3, 4, 1, 32), "3 rows, but there are 2 page tables"),
    "with_heads_that_do_not_divide": (zeros(2, 5, 1, 32), "5 heads, the pages have 2"),
    "of_another_head_size": (zeros(2, 4, 1, 64), "a query with D = 64"),
    "longer_than_a_table": (zeros(2, 4, 6, 32), "table 1 holds 5 tokens, fewer than the query's 6"),
}


@pytest.mark.parametrize(("query", "message"), WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_a_query_that_does_not_fit_is_rejected(query: mx.array, message: str) -> None:
    made = make_sequences([9, 5])
    with pytest.raises(ValueError, match=message):
        paged_attention_kernel(query, made.tables, made.pages, 4)


def test_a_table_with_too_few_blocks_for_its_tokens_is_rejected() -> None:
    made = make_sequences([9, 5])
    made.tables[1].blocks.pop()
    with pytest.raises(ValueError, match="table 1 has 5 tokens, but its blocks hold at most 1 x 4"):
        made.attend()


def test_a_block_without_a_page_is_rejected() -> None:
    made = make_sequences([9, 5])
    missing = made.tables[1].blocks[1]
    del made.pages[missing]
    with pytest.raises(UnknownBlockError, match=f"table 1 names block {missing}"):
        made.attend()


def test_a_block_size_that_differs_from_the_tables_is_rejected() -> None:
    made = make_sequences([9, 5])
    with pytest.raises(ValueError, match="table 0 has blocks of 4 tokens, but block_size is 16"):
        paged_attention_kernel(made.query, made.tables, made.pages)


def test_a_block_size_that_differs_from_the_pages_is_rejected() -> None:
    made = make_sequences([9])
    wide = {block: PageBlock(zeros(2, 8, 32), zeros(2, 8, 32)) for block in made.pages}
    with pytest.raises(ValueError, match=r"block_size 4 .* is float32 \(2, 8, 32\)"):
        paged_attention_kernel(made.query, made.tables, wide, 4)


@pytest.mark.parametrize(
    "other",
    [zeros(2, 4, 32, dtype=mx.float16), zeros(1, 4, 32), zeros(2, 3, 32)],
    ids=["type", "heads", "size"],
)
def test_pages_of_different_shapes_or_types_are_rejected(other: mx.array) -> None:
    made = make_sequences([9])
    block = made.tables[0].blocks[2]
    made.pages[block] = PageBlock(other, other + 0)
    with pytest.raises(ValueError, match=f"one shape and type: .* block {block} is"):
        made.attend()


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (zeros(2, 4, 32), zeros(2, 4, 32, dtype=mx.float16)),
        (zeros(2, 4, 32), zeros(2, 4, 16)),
        (zeros(4, 32), zeros(4, 32)),
        (zeros(2, 0, 32), zeros(2, 0, 32)),
        (zeros(2, 4, 32, dtype=mx.int8), zeros(2, 4, 32, dtype=mx.int8)),
    ],
)
def test_a_page_of_mismatched_or_invalid_arrays_is_rejected(keys: mx.array, values: mx.array) -> None:
    with pytest.raises(ValueError, match=r"keys (are|must be)"):
        PageBlock(keys, values)


# ---- copies ----


def page_of(tokens: list[int]) -> PageBlock:
    """A page of two heads whose keys are these numbers; values are the numbers plus a half."""
    keys = mx.broadcast_to(mx.array(tokens, mx.float32)[:, None], (2, len(tokens), 3)) + 0
    return PageBlock(keys, keys + 0.5)


def tokens_of(page: PageBlock) -> list[int]:
    tokens = [int(number) for number in page.keys[0, :, 0].tolist()]
    assert mx.array_equal(page.keys, page_of(tokens).keys).item()
    assert mx.array_equal(page.values, page_of(tokens).values).item()
    return tokens


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_copy_changes_only_its_range(size: int, dst_size: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, min(size, dst_size)))
    src_start, dst_start = (data.draw(st.integers(0, total - length)) for total in (size, dst_size))
    src, dst = page_of(list(range(size))), page_of(list(range(100, 100 + dst_size)))
    copy_block(src, dst, src_start, dst_start, length)
    expected = list(range(100, 100 + dst_size))
    expected[dst_start : dst_start + length] = range(src_start, src_start + length)
    assert tokens_of(dst) == expected
    assert tokens_of(src) == list(range(size))


@given(st.integers(1, 8), st.data())
def test_ranges_of_one_page_may_overlap(size: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, size))
    src_start, dst_start = (data.draw(st.integers(0, size - length)) for _ in range(2))
    page, expected = page_of(list(range(size))), list(range(size))
    copy_block(page, page, src_start, dst_start, length)
    expected[dst_start : dst_start + length] = range(src_start, src_start + length)
    assert tokens_of(page) == expected


def test_a_copy_is_written_into_the_existing_arrays() -> None:
    src, dst = page_of([1, 2]), page_of([8, 9])
    keys, values = dst.keys, dst.values
    copy_block(src, dst, 0, 1, 1)
    assert keys is dst.keys
    assert values is dst.values
    assert keys[0, :, 0].tolist() == [8, 1]
    src.keys[:] = 5.0
    assert tokens_of(dst) == [8, 1]


@pytest.mark.parametrize(
    ("src_start", "dst_start", "length"), [(-1, 0, 1), (0, -1, 1), (3, 0, 2), (0, 2, 2), (0, 0, -1)]
)
def test_a_range_outside_its_page_is_rejected_and_nothing_is_copied(
    src_start: int, dst_start: int, length: int
) -> None:
    src, dst = page_of([1, 2, 3, 4]), page_of([7, 8, 9])
    with pytest.raises(ValueError, match=r"not within a page of [34]"):
        copy_block(src, dst, src_start, dst_start, length)
    assert tokens_of(dst) == [7, 8, 9]


@pytest.mark.parametrize(
    "other", [zeros(1, 4, 3), zeros(2, 4, 6), zeros(2, 4, 3, dtype=mx.float16)], ids=["heads", "D", "type"]
)
def test_a_copy_between_pages_of_different_kinds_is_rejected(other: mx.array) -> None:
    with pytest.raises(ValueError, match="pages differ"):
        copy_block(page_of([1, 2, 3, 4]), PageBlock(other, other + 0), 0, 0, 1)
