"""Day 3.2: attention over scattered pages, beams that share them, and a batch manager that runs on them.

When it passes, you have the engine of this course: requests of all kinds share one pool of pages, a step is
one packed pass, and each answer is the one that its request gets alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_llm.beam_search import (
    BeamSearch,
    BeamSearchPageManager,
    BeamSearchParams,
    Choice,
    Ended,
    Hypothesis,
    fork_sequence,
)
from tiny_llm.compaction import compact_memory, compact_pages
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import (
    DuplicateRequestError,
    OutOfBlocksError,
    RequestTooLargeError,
    UnknownBlockError,
)
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.kv_context import KVContext
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model
from tiny_llm.page_block import PageBlock, copy_block, paged_attention_kernel
from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import Span, pack_batch, paged_attention, write_and_attend
from tiny_llm.paged_queues import BeamStep
from tiny_llm.sampling_params import SamplingParams

from tiny_llm_checkpoints.model_config import ModelConfig

# The model runs with and without compiled kernels; the warning that there are none is not this day's matter.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")

# The same examples in every run, and no file that remembers the last failure.
quick = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
TOLERANCE = {mx.float32: 2e-5, mx.float16: 3e-3, mx.bfloat16: 3e-2}  # of an output in that type
NOBODYS = 30.0  # what stands where no token is: large enough that whoever reads it notices


def table_of(blocks: list[int], num_tokens: int, block_size: int = 4) -> BlockTable:
    """A table over just these blocks, in this order, put together by hand."""
    table = BlockTable(BlockAllocator(max(blocks) + 1), block_size)
    table.blocks, table.num_tokens = blocks, num_tokens
    return table


def filled(allocator: BlockAllocator, num_tokens: int, block_size: int = 4) -> BlockTable:
    """A table with so many tokens."""
    table = BlockTable(allocator, block_size)
    table.append_tokens(num_tokens)
    return table


# Task 1: pack_batch


def test_task_1_tokens_stand_side_by_side_in_order() -> None:
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


def test_task_1_a_row_of_blocks_for_each_span() -> None:
    """Oracle: by hand: one table has 3 blocks and the other has 1, padded with 0."""
    batch = pack_batch([Span(table_of([7], 2), 0, 2), Span(table_of([5, 1, 3], 9), 8, 9)])
    assert batch.tables.tolist() == [[7, 0, 0], [5, 1, 3]]


def test_task_1_all_are_arrays_of_int32() -> None:
    """Oracle: the docstring of `PackedBatch`: the kernels read them as such."""
    batch = pack_batch([Span(table_of([1, 0], 5), 0, 5)])
    arrays = (batch.positions, batch.slots, batch.row_of_token, batch.tables)
    assert {array.dtype for array in arrays} == {mx.int32}
    assert [array.shape for array in arrays] == [(5,), (5,), (5,), (1, 2)]


@quick
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


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """The last L of S tokens in float64, one query at a time: q [H, L, D], k, v [Hkv, S, D] -> [H, L, D]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group, before = q.shape[0] // k.shape[0], k.shape[1] - q.shape[1]
    out = np.zeros_like(q)
    for h, i in np.ndindex(q.shape[:2]):
        scores = k[h // group, : before + i + 1] @ q[h, i] * scale
        weights = np.exp(scores - scores.max())
        out[h, i] = weights / weights.sum() @ v[h // group, : before + i + 1]
    return out


def floats(array: mx.array) -> np.ndarray:
    """A float array of any type in NumPy."""
    return np.array(array.astype(mx.float32))


@dataclass
class Pool:
    """Tables with mixed blocks, their keys and values in a layer of a pool, and the same in one piece."""

    tables: list[BlockTable]
    keys: mx.array  # [num_blocks, Hkv, block_size, D]
    values: mx.array
    streams: list[tuple[np.ndarray, np.ndarray]]  # keys and values [Hkv, tokens, D], as they are stored


def pool_of(
    totals: Sequence[int],
    *,
    kv_heads: int = 2,
    size: int = 8,
    block_size: int = 4,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Pool:
    """`totals` random tokens in each table; where no token is, there is `NOBODYS`."""
    rng = np.random.default_rng(seed)
    allocator = BlockAllocator(sum(-(-total // block_size) for total in totals) + 2)
    allocator.allocate()  # somebody else's
    tables = [BlockTable(allocator, block_size) for _ in totals]
    for row in rng.permutation(np.repeat(np.arange(len(totals)), totals)):
        tables[row].append_tokens(1)
    layer = np.full((2, allocator.num_blocks, kv_heads, block_size, size), NOBODYS, np.float32)
    streams = []
    for table, total in zip(tables, totals, strict=True):
        tokens = floats(mx.array(rng.normal(size=(2, kv_heads, total, size)), dtype))
        for position, slot in enumerate(table.slots(0, total)):
            layer[:, slot // block_size, :, slot % block_size] = tokens[:, :, position]
        streams.append((tokens[0], tokens[1]))
    return Pool(tables, mx.array(layer[0], dtype), mx.array(layer[1], dtype), streams)


def numbers(*values: float) -> mx.array:
    """A pool of one head of size 2 with blocks of 2 tokens: a number and a zero for each token, in order."""
    return mx.array([[value, 0] for value in values], mx.float32).reshape(-1, 1, 2, 2)


def queries(heads: int, length: int) -> mx.array:
    """Queries of size 2 that find all keys alike, where these are zero: [1, H, L, 2]."""
    return mx.ones((1, heads, length, 2))


def test_task_2_a_token_sees_its_past_wherever_the_blocks_lie() -> None:
    """Oracle: by hand: 2, 4 and 9 are in blocks 2 and 0; with equal keys the means so far are 2, 3 and 5."""
    values = numbers(9, NOBODYS, NOBODYS, NOBODYS, 2, 4)
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 0, 3)])
    out = paged_attention(queries(1, 3), mx.zeros_like(values), values, batch, 1.0)
    assert out.shape == (1, 1, 3, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


def test_task_2_only_the_tokens_of_the_step_are_asked_for() -> None:
    """Oracle: by hand: the last two of three tokens; the first was computed before."""
    values = numbers(9, NOBODYS, NOBODYS, NOBODYS, 2, 4)
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 1, 3)])
    out = paged_attention(queries(1, 2), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [3, 5], rtol=1e-6)


def test_task_2_what_comes_later_is_not_seen() -> None:
    """Oracle: by hand: 9 and 7 are of the same sequence, and stand behind the two of this step."""
    values = numbers(9, 7, NOBODYS, NOBODYS, 2, 4)
    batch = pack_batch([Span(table_of([2, 0], 4, block_size=2), 0, 2)])
    out = paged_attention(queries(1, 2), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3], rtol=1e-6)


def test_task_2_every_span_has_a_past_of_its_own() -> None:
    """Oracle: by hand: 6 of one sequence, 1, 3 and 8 of another; the step has 1 and 2 tokens of them."""
    values = numbers(1, 3, 6, NOBODYS, 8, NOBODYS)
    spans = [Span(table_of([1], 1, block_size=2), 0, 1), Span(table_of([0, 2], 3, block_size=2), 1, 3)]
    out = paged_attention(queries(1, 3), mx.zeros_like(values), values, pack_batch(spans), 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [6, 2, 4], rtol=1e-6)


def test_task_2_neighbouring_query_heads_share_a_head_of_keys_and_values() -> None:
    """Oracle: by hand: of 6 query heads 0, 1 and 2 read the first of two heads. h % Hkv is the mistake."""
    values = mx.array([[[[5.0, 0]], [[70.0, 0]]]])  # one block of one token, two heads
    batch = pack_batch([Span(table_of([0], 1, block_size=1), 0, 1)])
    out = paged_attention(queries(6, 1), mx.zeros_like(values), values, batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, :, 0, 0], [5, 5, 5, 70, 70, 70], rtol=1e-6)


SHAPES = {
    "blocks_of_one": {"totals": [5, 1, 9], "block_size": 1},
    "just_full": {"totals": [8, 4, 12]},
    "one_behind": {"totals": [9, 5, 1]},
    "larger_than_the_text": {"totals": [3, 1, 30], "block_size": 32},
    "odd_blocks": {"totals": [23, 2, 14], "block_size": 7},
    "no_groups": {"totals": [9, 6], "heads": (3, 3)},
    "groups_of_three": {"totals": [9, 6], "heads": (9, 3)},
    "one_head_for_all": {"totals": [9, 6], "heads": (4, 1)},
    "small_heads": {"totals": [9, 6], "size": 4},
    "heads_of_20": {"totals": [9, 6], "size": 20},
    "heads_of_64": {"totals": [40, 6], "size": 64},
    "stored_in_float16": {"totals": [9, 6, 17], "dtype": mx.float16},
    "stored_in_bfloat16": {"totals": [9, 6, 17], "dtype": mx.bfloat16},
    "long": {"totals": [100, 1, 65], "block_size": 16},
}


def packed_queries(spans: Sequence[Span], heads: int, size: int) -> mx.array:
    """Random queries for every token of a step, [1, H, T, D]."""
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
    """Attention of these spans is that of each sequence in one piece."""
    q = packed_queries(spans, heads, pool.keys.shape[-1])
    out = paged_attention(q, pool.keys, pool.values, pack_batch(spans), scale)
    assert (out.shape, out.dtype) == (q.shape, mx.float32)
    np.testing.assert_allclose(np.array(out), expected_of(pool, spans, q, scale), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_2_prompts_chunks_and_decodes_side_by_side(shape: dict) -> None:
    """Oracle: each sequence in one piece, NumPy in float64, with keys and values as they are stored."""
    heads, kv_heads = shape.get("heads", (4, 2))
    others = {name: value for name, value in shape.items() if name not in ("totals", "heads")}
    pool = pool_of(shape["totals"], kv_heads=kv_heads, **others)
    ends = [(table, table.num_tokens) for table in pool.tables]
    for spans in (
        [Span(table, 0, total) for table, total in ends],
        [Span(table, total - 1, total) for table, total in ends],
        [Span(table, row * total // (row + 1), total) for row, (table, total) in enumerate(ends)],
        [Span(table, total // 3, total // 3 + 1) for table, total in reversed(ends)],
    ):
        check_attention(pool, spans, heads, 0.4)


@pytest.mark.parametrize("scale", [0.0, 0.125, 1.7])
def test_task_2_scores_are_scaled_as_they_are_told(scale: float) -> None:
    """Oracle: NumPy in float64."""
    pool = pool_of([9, 6])
    check_attention(pool, [Span(table, 2, table.num_tokens) for table in pool.tables], 4, scale)


def test_task_2_forks_read_the_blocks_that_they_share() -> None:
    """Oracle: each alone; the block in which they differ is the second one's own."""
    pool = pool_of([6])
    [table] = pool.tables
    first, q = table.fork(), packed_queries([Span(table, 5, 6)], 4, 8)
    twice = [Span(table, 5, 6), Span(first, 5, 6)]
    both = mx.concatenate([q, q], axis=2)
    out = np.array(paged_attention(both, pool.keys, pool.values, pack_batch(twice), 0.4))
    np.testing.assert_array_equal(out[:, :, 0], out[:, :, 1])
    np.testing.assert_allclose(out[:, :, :1], expected_of(pool, twice[:1], q, 0.4), atol=2e-5)


def test_task_2_reading_writes_nothing() -> None:
    """Oracle: the pool as it was."""
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
    """Keys or values of a pool to which nobody has written."""
    return mx.full((num_blocks, kv_heads, block_size, size), NOBODYS, dtype)


def test_task_3_keys_and_values_go_to_their_slots_and_nothing_else_changes() -> None:
    """Oracle: by hand: two heads, three tokens: 1 and 2 behind another in blocks [3, 1], and 3 in block 0.

    Heads and tokens that change places are the mistake that the numbers show.
    """
    batch = pack_batch(
        [Span(table_of([3, 1], 3, block_size=2), 1, 3), Span(table_of([0], 1, block_size=2), 0, 1)]
    )
    k = mx.array([[[[1.0, 11], [2, 12], [3, 13]], [[4, 14], [5, 15], [6, 16]]]])  # [1, Hkv, T, D]
    q = mx.zeros((1, 2, 3, 2))
    _, keys, values = write_and_attend(q, k, k + 100, empty(5, 2, 2, 2), empty(5, 2, 2, 2), batch, 1.0)
    expected = np.full((5, 2, 2, 2), NOBODYS, np.float32)
    expected[3, :, 1] = [[1, 11], [4, 14]]
    expected[1, :, 0] = [[2, 12], [5, 15]]
    expected[0, :, 0] = [[3, 13], [6, 16]]
    np.testing.assert_array_equal(np.array(keys), expected)
    np.testing.assert_array_equal(np.array(values), np.where(expected == NOBODYS, NOBODYS, expected + 100))


def test_task_3_a_token_sees_itself() -> None:
    """Oracle: by hand: with equal keys the means so far of 2, 4 and 9. Attending first is the mistake."""
    batch = pack_batch([Span(table_of([2, 0], 3, block_size=2), 0, 3)])
    k, v = mx.zeros((1, 1, 3, 2)), mx.array([[[[2.0, 0], [4, 0], [9, 0]]]])
    out, *_ = write_and_attend(queries(1, 3), k, v, empty(3, 1, 2, 2), empty(3, 1, 2, 2), batch, 1.0)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_task_3_a_token_sees_itself_as_it_is_stored(dtype: mx.Dtype) -> None:
    """Oracle: by hand: the only value there is, rounded to the pool's type; the result keeps the query's."""
    batch = pack_batch([Span(table_of([0], 1), 0, 1)])
    v = mx.full((1, 1, 1, 2), 0.1)
    pool = empty(1, 1, 4, 2, dtype)
    out, keys, values = write_and_attend(queries(1, 1), v, v, pool, pool + 0, batch, 1.0)
    assert (out.dtype, keys.dtype, values.dtype) == (mx.float32, dtype, dtype)
    assert out[0, 0, 0, 0].item() == pytest.approx(mx.array(0.1).astype(dtype).item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_3_steps_fill_the_pool_and_every_one_is_right(shape: dict) -> None:
    """Oracle: each sequence in one piece, NumPy in float64. Chunks of 1 to 5 tokens side by side."""
    heads, kv_heads = shape.get("heads", (4, 2))
    size, dtype = shape.get("size", 8), shape.get("dtype", mx.float32)
    others = {name: value for name, value in shape.items() if name not in ("totals", "heads")}
    pool, rng = pool_of(shape["totals"], kv_heads=kv_heads, **others), np.random.default_rng(3)
    stored_keys, stored_values = np.array(floats(pool.keys)), np.array(floats(pool.values))
    keys, values = mx.full(pool.keys.shape, NOBODYS, dtype), mx.full(pool.keys.shape, NOBODYS, dtype)
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


# Task 4: copy_block


def page_of(*tokens: int) -> PageBlock:
    """A page of two heads of size 3 whose tokens are these numbers; values are the numbers and a half."""
    keys = mx.broadcast_to(mx.array(tokens, mx.float32)[:, None], (2, len(tokens), 3)) + 0
    return PageBlock(keys, keys + 0.5)


def tokens_of(page: PageBlock) -> list[int]:
    """The numbers in a page; fails where heads, or keys and values, differ."""
    tokens = [int(number) for number in page.keys[0, :, 0].tolist()]
    assert mx.array_equal(page.keys, page_of(*tokens).keys).item()
    assert mx.array_equal(page.values, page_of(*tokens).values).item()
    return tokens


def test_task_4_a_range_is_copied_to_another_place() -> None:
    """Oracle: by hand, pages of two sizes: keys and values of all heads, and nothing beside the range."""
    source, target = page_of(1, 2, 3, 4, 5), page_of(11, 12, 13, 14)
    copy_block(source, target, 1, 2, 2)
    assert tokens_of(target) == [11, 12, 2, 3]
    assert tokens_of(source) == [1, 2, 3, 4, 5]


def test_task_4_a_whole_page_and_nothing_at_all() -> None:
    """Oracle: by hand."""
    source, target = page_of(1, 2, 3), page_of(11, 12, 13)
    for place in (0, 1, 3):
        copy_block(source, target, place, 3 - place, 0)
    assert tokens_of(target) == [11, 12, 13]
    copy_block(source, target, 0, 0, 3)
    assert tokens_of(target) == [1, 2, 3]


def test_task_4_pages_stay_two() -> None:
    """Oracle: by hand: what is written to one afterwards, the other does not show."""
    source, target = page_of(1, 2), page_of(8, 9)
    copy_block(source, target, 0, 0, 2)
    source.keys[:, 0] = 5.0
    target.values[:, 1] = 6.0
    assert target.keys[0, :, 0].tolist() == [1, 2]
    assert source.values[0, :, 0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(("src_start", "dst_start"), [(0, 1), (1, 0), (0, 2), (2, 0), (1, 1)])
def test_task_4_ranges_of_one_page_may_overlap(src_start: int, dst_start: int) -> None:
    """Oracle: a list, whose slice is read before it is written. Copying token by token is the mistake."""
    page, expected = page_of(1, 2, 3, 4, 5), [1, 2, 3, 4, 5]
    copy_block(page, page, src_start, dst_start, 3)
    expected[dst_start : dst_start + 3] = expected[src_start : src_start + 3]
    assert tokens_of(page) == expected


@pytest.mark.parametrize(
    ("src_start", "dst_start", "length"),
    [(-1, 0, 1), (0, -1, 1), (3, 0, 2), (0, 2, 2), (0, 0, -1), (5, 0, 0), (0, 0, 5)],
)
def test_task_4_a_range_that_leaves_its_page_is_refused(src_start: int, dst_start: int, length: int) -> None:
    """Oracle: the docstring: pages of 4 and 3 tokens, and nothing is copied."""
    source, target = page_of(1, 2, 3, 4), page_of(7, 8, 9)
    with pytest.raises(ValueError):
        copy_block(source, target, src_start, dst_start, length)
    assert tokens_of(target) == [7, 8, 9]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 4, 3), mx.float32), ((2, 4, 6), mx.float32), ((2, 4, 3), mx.float16)]
)
def test_task_4_pages_of_another_kind_are_refused(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Oracle: the docstring: other heads, another D, another type. One head would broadcast to two."""
    target = page_of(1, 2, 3, 4)
    with pytest.raises(ValueError):
        copy_block(PageBlock(mx.zeros(shape, dtype), mx.zeros(shape, dtype)), target, 0, 0, 2)
    assert tokens_of(target) == [1, 2, 3, 4]


# Task 5: paged_attention_kernel


def in_pages(pool: Pool) -> dict[int, PageBlock]:
    """The blocks of a pool as pages of their own, by block id."""
    return {
        block: PageBlock(pool.keys[block] + 0, pool.values[block] + 0) for block in range(pool.keys.shape[0])
    }


def last_tokens(pool: Pool, query: mx.array, scale: float) -> np.ndarray:
    """Dense attention of each row's L queries as the last L tokens of its table, [B, H, L, D] in float64."""
    rows = zip(floats(query), pool.streams, strict=True)
    return np.stack([causal_attention(q, keys, values, scale) for q, (keys, values) in rows])


def test_task_5_the_queries_are_the_last_tokens_of_their_tables() -> None:
    """Oracle: by hand: with equal keys, the means of 2, 4 and of 2, 4, 9; and of 6, 8 and of 6."""
    tables = [table_of([2, 0], 3, block_size=2), table_of([1], 2, block_size=2)]
    values = {0: numbers(9, NOBODYS), 1: numbers(6, 8), 2: numbers(2, 4)}
    pages = {block: PageBlock(mx.zeros((1, 2, 2)), value[0]) for block, value in values.items()}
    out = paged_attention_kernel(mx.ones((2, 1, 2, 2)), tables, pages, 2, 1.0)
    np.testing.assert_allclose(np.array(out)[:, 0, :, 0], [[3, 5], [6, 7]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_task_5_mixed_lengths_heads_blocks_and_types(shape: dict, dtype: mx.Dtype) -> None:
    """Oracle: each row alone and in one piece, NumPy in float64; the result has the type of the query."""
    heads, kv_heads = shape.get("heads", (4, 2))
    others = {name: value for name, value in shape.items() if name not in ("totals", "heads")}
    pool = pool_of(shape["totals"], kv_heads=kv_heads, **others)
    block_size, size = pool.keys.shape[2:]
    for length in {1, min(shape["totals"])}:
        query_shape = (len(pool.tables), heads, length, size)
        query = mx.random.normal(query_shape, key=mx.random.key(length)).astype(dtype)
        out = paged_attention_kernel(query, pool.tables, in_pages(pool), block_size, 0.4)
        assert (out.shape, out.dtype) == (query.shape, dtype)
        np.testing.assert_allclose(floats(out), last_tokens(pool, query, 0.4), rtol=0, atol=TOLERANCE[dtype])


@quick
@given(
    totals=st.lists(st.integers(3, 30), min_size=1, max_size=4),
    length=st.integers(1, 3),
    block_size=st.integers(1, 9),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 2), (2, 3)]),
)
def test_task_5_whatever_the_lengths(
    totals: list[int], length: int, block_size: int, groups: tuple[int, int]
) -> None:
    """Oracle: each row alone and in one piece, NumPy in float64."""
    pool = pool_of(totals, kv_heads=groups[1], block_size=block_size, size=4)
    query = mx.random.normal((len(totals), groups[0] * groups[1], length, 4), key=mx.random.key(1))
    out = paged_attention_kernel(query, pool.tables, in_pages(pool), block_size)
    np.testing.assert_allclose(floats(out), last_tokens(pool, query, 0.5), rtol=0, atol=2e-5)


def test_task_5_scale_and_block_size_have_usual_values() -> None:
    """Oracle: NumPy: one over the root of D = 16, and blocks of 16. A scale of 0 is a scale."""
    pool = pool_of([20, 7], block_size=16, size=16)
    query = mx.random.normal((2, 4, 2, 16), key=mx.random.key(2))
    pages = in_pages(pool)
    for scale, out in (
        (0.25, paged_attention_kernel(query, pool.tables, pages)),
        (0.7, paged_attention_kernel(query, pool.tables, pages, scale=0.7)),
        (0.0, paged_attention_kernel(query, pool.tables, pages, scale=0.0)),
    ):
        np.testing.assert_allclose(np.array(out), last_tokens(pool, query, scale), rtol=0, atol=2e-5)


def test_task_5_forks_read_the_pages_that_they_share() -> None:
    """Oracle: each row alone."""
    pool = pool_of([10])
    query = mx.random.normal((2, 4, 2, 8), key=mx.random.key(3))
    tables = [pool.tables[0], pool.tables[0].fork()]
    out = np.array(paged_attention_kernel(query, tables, in_pages(pool), 4, 0.4))
    for row in range(2):
        alone = last_tokens(pool, query[row : row + 1], 0.4)
        np.testing.assert_allclose(out[row : row + 1], alone, rtol=0, atol=2e-5)


def test_task_5_pages_may_have_any_ids_and_others_look_like_anything() -> None:
    """Oracle: NumPy. Block ids are names here: there is no page 0, and page 5 is of another kind."""
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
    "of_three_axes": mx.zeros((2, 4, 8)),
    "of_integers": mx.zeros((2, 4, 1, 8), mx.int32),
    "without_a_token": mx.zeros((2, 4, 0, 8)),
    "with_a_row_too_many": mx.zeros((3, 4, 1, 8)),
    "with_a_row_too_few": mx.zeros((1, 4, 1, 8)),
    "with_heads_that_do_not_divide": mx.zeros((2, 5, 1, 8)),
    "of_another_head_size": mx.zeros((2, 4, 1, 16)),
    "longer_than_a_table": mx.zeros((2, 4, 6, 8)),
}


@pytest.mark.parametrize("query", WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_task_5_a_query_that_does_not_fit_is_refused(query: mx.array) -> None:
    """Oracle: the docstring: two tables of 9 and 5 tokens, two heads of 8."""
    pool = pool_of([9, 5])
    with pytest.raises(ValueError):
        paged_attention_kernel(query, pool.tables, in_pages(pool), 4)


def test_task_5_a_block_without_a_page_is_refused() -> None:
    """Oracle: the docstring."""
    pool = pool_of([9, 5])
    pages = in_pages(pool)
    del pages[pool.tables[1].blocks[1]]
    with pytest.raises(UnknownBlockError):
        paged_attention_kernel(mx.zeros((2, 4, 1, 8)), pool.tables, pages, 4)


def test_task_5_another_block_size_is_refused() -> None:
    """Oracle: the docstring: the tables' blocks have 4 tokens; then the pages have 8."""
    pool = pool_of([9, 5])
    query = mx.zeros((2, 4, 1, 8))
    with pytest.raises(ValueError):
        paged_attention_kernel(query, pool.tables, in_pages(pool), 8)
    wide = {block: PageBlock(mx.zeros((2, 8, 8)), mx.zeros((2, 8, 8))) for block in in_pages(pool)}
    with pytest.raises(ValueError):
        paged_attention_kernel(query, pool.tables, wide, 4)


@pytest.mark.parametrize(
    "other", [mx.zeros((2, 4, 8), mx.float16), mx.zeros((1, 4, 8))], ids=["type", "heads"]
)
def test_task_5_pages_that_are_not_alike_are_refused(other: mx.array) -> None:
    """Oracle: the docstring."""
    pool = pool_of([9, 5])
    pages = in_pages(pool)
    pages[pool.tables[0].blocks[2]] = PageBlock(other, other + 0)
    with pytest.raises(ValueError):
        paged_attention_kernel(mx.zeros((2, 4, 1, 8)), pool.tables, pages, 4)


# Task 6: fork_sequence


def check_conserved(allocator: BlockAllocator, *tables: BlockTable) -> None:
    """Free blocks and held ones are the whole pool, and a block has as many holders as tables name it."""
    held = Counter(block for table in tables for block in table.blocks)
    counted = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
    assert counted == [held[block] for block in range(allocator.num_blocks)]
    assert allocator.num_free == counted.count(0)


def test_task_6_all_beams_hold_what_the_parent_holds() -> None:
    """Oracle: by hand: 6 tokens in 2 blocks of 4, and three more holders of each. Nothing is copied."""
    allocator = BlockAllocator(8)
    parent = filled(allocator, 6)
    beams = [BlockTable(allocator, 4) for _ in range(3)]
    fork_sequence(parent, beams)
    assert [(beam.blocks, beam.num_tokens) for beam in beams] == [(parent.blocks, 6)] * 3
    counts = Counter(allocator.ref_count(block) for block in parent.blocks)
    assert counts == Counter({4: 2})
    assert allocator.num_free == 6


def test_task_6_what_they_held_before_goes_back() -> None:
    """Oracle: by hand: 9 tokens were 3 blocks. A table that is only overwritten keeps them for ever."""
    allocator = BlockAllocator(8)
    parent, beam, other = filled(allocator, 6), filled(allocator, 9), filled(allocator, 3)
    fork_sequence(parent, [beam])
    assert allocator.num_free == 5
    check_conserved(allocator, parent, beam, other)


def test_task_6_every_table_goes_on_without_the_others() -> None:
    """Oracle: by hand: one writes, the others see nothing of it. One list for all of them is the mistake."""
    allocator = BlockAllocator(8)
    parent, first, second = filled(allocator, 6), BlockTable(allocator, 4), BlockTable(allocator, 4)
    fork_sequence(parent, [first, second])
    first.append_tokens(5)
    assert (parent.num_tokens, second.num_tokens, first.num_tokens) == (6, 6, 11)
    assert len(first.blocks) == 3
    assert second.blocks == parent.blocks
    assert first.blocks[:1] == parent.blocks[:1]
    check_conserved(allocator, parent, first, second)
    for table in (first, parent, second):
        table.release()
    assert allocator.num_free == 8


def test_task_6_forking_again_changes_nothing() -> None:
    """Oracle: by hand: the parent is among them, and the beams may come from any iterable."""
    allocator = BlockAllocator(4)
    parent, beam = filled(allocator, 6), BlockTable(allocator, 4)
    for _ in range(3):
        fork_sequence(parent, iter([beam, parent]))
        assert (beam.blocks, beam.num_tokens, parent.num_tokens) == (parent.blocks, 6, 6)
        check_conserved(allocator, parent, beam)
    fork_sequence(parent, [])
    check_conserved(allocator, parent, beam)


def test_task_6_an_empty_parent_empties_its_beams() -> None:
    """Oracle: by hand."""
    allocator = BlockAllocator(4)
    parent, beam = BlockTable(allocator, 4), filled(allocator, 5)
    fork_sequence(parent, [beam])
    assert (len(beam.blocks), beam.num_tokens, allocator.num_free) == (0, 0, 4)


# Task 7: BeamSearchPageManager.fork_beam


def beams_of(prompt: int = 6, *, beam_size: int = 3, num_blocks: int = 8) -> BeamSearchPageManager:
    """Beam 0 with a prompt of so many tokens, in blocks of 4."""
    beams = BeamSearchPageManager(beam_size, BlockAllocator(num_blocks), page_size=4)
    beams.tables[0].append_tokens(prompt)
    return beams


def test_task_7_a_new_beam_shares_every_page() -> None:
    """Oracle: by hand: 6 tokens are 2 pages; three beams of them hold the same 2."""
    beams = beams_of()
    allocator = beams.tables[0].allocator
    ids = [beams.fork_beam(0) for _ in range(2)]
    assert len({0, *ids}) == 3
    assert set(beams.tables) == {0, *ids}
    assert all(beams.tables[i].blocks == beams.tables[0].blocks for i in ids)
    assert [beams.tables[i].num_tokens for i in ids] == [6, 6]
    assert (beams.num_logical_blocks, beams.num_physical_blocks, allocator.num_free) == (6, 2, 6)
    check_conserved(allocator, *beams.tables.values())


def test_task_7_a_beam_of_a_beam() -> None:
    """Oracle: by hand: it shares the pages of the one that it was forked from."""
    beams = beams_of()
    child = beams.fork_beam(0)
    beams.tables[child].append_tokens(7)
    grandchild = beams.fork_beam(child)
    assert beams.tables[grandchild].blocks == beams.tables[child].blocks
    assert beams.tables[grandchild].num_tokens == 13
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


def test_task_7_no_more_beams_than_were_agreed() -> None:
    """Oracle: the docstring: with two of two nothing is forked, and no reference is left behind."""
    beams = beams_of(beam_size=2)
    child = beams.fork_beam(0)
    for parent in (0, child):
        with pytest.raises(ValueError):
            beams.fork_beam(parent)
    assert set(beams.tables) == {0, child}
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


@pytest.mark.parametrize("beam_id", [1, 7, -1])
def test_task_7_a_beam_that_does_not_live_has_no_children(beam_id: int) -> None:
    """Oracle: the docstring."""
    beams = beams_of()
    with pytest.raises(KeyError):
        beams.fork_beam(beam_id)
    assert set(beams.tables) == {0}
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


# Task 8: BeamSearchPageManager.expand_beam


class Pages:
    """The arrays of a pool in plain Python: what stands in each slot. Makes the copies, and writes."""

    def __init__(self) -> None:
        self.held: dict[int, object] = {}

    def expand(self, beams: BeamSearchPageManager, beam_id: int, tokens: list[int]) -> int:
        """Let a beam grow by these tokens; how many blocks were copied."""
        table = beams.tables[beam_id]
        copies = beams.expand_beam(beam_id, tokens)
        self.copy(copies, table.block_size)
        self.write(table, tokens)
        return len(copies)

    def copy(self, copies: Sequence[BlockCopy], size: int) -> None:
        """All sources are read before any target is written."""
        assert len({copy.dst for copy in copies}) == len(copies), "two copies go to one block"
        read = [[self.held.get(copy.src * size + i) for i in range(copy.length)] for copy in copies]
        for copy, tokens in zip(copies, read, strict=True):
            self.held |= {copy.dst * size + i: token for i, token in enumerate(tokens) if token is not None}

    def write(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Write the last tokens of a table."""
        slots = table.slots(table.num_tokens - len(tokens), table.num_tokens)
        self.held |= dict(zip(slots, tokens, strict=True))

    def read(self, table: BlockTable) -> list[object]:
        """What a table finds in its slots."""
        return [self.held.get(slot) for slot in table.slots(0, table.num_tokens)]


def test_task_8_a_beam_grows_by_its_tokens() -> None:
    """Oracle: by hand: 3, 4 and 9 tokens in blocks of 4; alone on its pages it copies nothing."""
    beams = beams_of(prompt=3)
    assert list(beams.expand_beam(0, [70])) == []
    assert (beams.tables[0].num_tokens, beams.num_physical_blocks) == (4, 1)
    assert list(beams.expand_beam(0, [71, 72, 73, 74, 75])) == []
    assert (beams.tables[0].num_tokens, beams.num_physical_blocks) == (9, 3)
    assert list(beams.expand_beam(0, [])) == []
    check_conserved(beams.tables[0].allocator, beams.tables[0])


def test_task_8_beams_that_part_copy_the_last_block_and_read_their_own() -> None:
    """Oracle: the tokens; by hand: 6 of them in blocks of 4, two copies for three beams, 1 + 3 pages."""
    pages, beams = Pages(), BeamSearchPageManager(3, BlockAllocator(4), page_size=4)
    prompt = [100, 101, 102, 103, 104, 105]
    pages.expand(beams, 0, prompt)
    ids = [0, beams.fork_beam(0), beams.fork_beam(0)]
    assert sum(pages.expand(beams, beam_id, [beam_id]) for beam_id in ids) == 2
    assert [pages.read(beams.tables[beam_id]) for beam_id in ids] == [[*prompt, beam_id] for beam_id in ids]
    assert (beams.num_logical_blocks, beams.num_physical_blocks) == (6, 4)
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


def test_task_8_full_blocks_are_never_copied() -> None:
    """Oracle: by hand: 8 tokens are 2 full blocks; each beam takes one more, and the 2 stay shared."""
    pages, beams = Pages(), beams_of(prompt=8)
    ids = [0, beams.fork_beam(0)]
    assert [pages.expand(beams, beam_id, [beam_id]) for beam_id in ids] == [0, 0]
    assert beams.num_physical_blocks == 4


@pytest.mark.parametrize("new", [[7], [7, 8, 9], [7] * 9])
def test_task_8_a_beam_that_does_not_fit_stays_as_it_is(new: list[int]) -> None:
    """Oracle: the docstring: both blocks are taken, and the last one is shared."""
    beams = beams_of(num_blocks=2)
    child = beams.fork_beam(0)
    for beam_id in (0, child):
        with pytest.raises(OutOfBlocksError):
            beams.expand_beam(beam_id, new)
        assert [table.num_tokens for table in beams.tables.values()] == [6, 6]
        assert beams.tables[0].blocks == beams.tables[child].blocks
        check_conserved(beams.tables[0].allocator, *beams.tables.values())


def test_task_8_a_beam_that_does_not_live_does_not_grow() -> None:
    """Oracle: a mapping has no entry for it."""
    with pytest.raises(KeyError):
        beams_of().expand_beam(3, [1])


# Task 9: BeamSearchPageManager.prune


def test_task_9_a_pruned_beam_gives_back_what_is_its_own() -> None:
    """Oracle: by hand: 6 tokens, two beams that have parted: 1 shared block and 1 each.

    A table that is only forgotten keeps its pages for ever.
    """
    beams = beams_of()
    allocator, child = beams.tables[0].allocator, beams.fork_beam(0)
    beams.expand_beam(child, [7])
    assert allocator.num_free == 5
    beams.prune([0])
    assert set(beams.tables) == {child}
    assert allocator.num_free == 6
    check_conserved(allocator, beams.tables[child])
    beams.prune([child])
    assert (len(beams.tables), allocator.num_free) == (0, 8)


def test_task_9_the_ids_may_be_those_of_the_tables_themselves() -> None:
    """Oracle: by hand: what is pruned changes while it is gone through."""
    beams = beams_of()
    allocator = beams.tables[0].allocator
    beams.fork_beam(0)
    beams.prune(iter(list(beams.tables)))
    assert (len(beams.tables), allocator.num_free) == (0, 8)
    beams.prune([])


def test_task_9_there_is_room_for_a_new_beam() -> None:
    """Oracle: by hand: two of two live. A new one has an id that nobody had: who was pruned stays unknown."""
    beams = beams_of(beam_size=2)
    child = beams.fork_beam(0)
    beams.prune([0])
    grandchild = beams.fork_beam(child)
    assert grandchild not in (0, child)
    assert set(beams.tables) == {child, grandchild}


@pytest.mark.parametrize("ids", [[5], [0, 5], [5, 0]])
def test_task_9_where_one_does_not_live_none_ends(ids: list[int]) -> None:
    """Oracle: the docstring."""
    beams = beams_of()
    child = beams.fork_beam(0)
    with pytest.raises(KeyError):
        beams.prune(ids)
    assert set(beams.tables) == {0, child}
    check_conserved(beams.tables[0].allocator, *beams.tables.values())


class Beams(RuleBasedStateMachine):
    """Beams grow, fork and end in any order, on a pool that is often too small for them."""

    allocator: BlockAllocator
    texts: dict[int, list[int]]  # the tokens that each beam must find in its pages

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 4), beam_size=st.integers(1, 4))
    def build(self, num_blocks: int, block_size: int, beam_size: int) -> None:
        self.allocator, self.pages, self.fresh = BlockAllocator(num_blocks), Pages(), count()
        self.beams = BeamSearchPageManager(beam_size, self.allocator, block_size)
        self.texts = {0: []}

    @rule(which=st.integers(0, 3), num_tokens=st.integers(0, 6))
    def expand(self, which: int, num_tokens: int) -> None:
        beam_id, tokens = self.chosen(which), [next(self.fresh) for _ in range(num_tokens)]
        if self.beams.tables[beam_id].blocks_to_append(num_tokens) <= self.allocator.num_free:
            self.pages.expand(self.beams, beam_id, tokens)
            self.texts[beam_id] += tokens
        else:
            with pytest.raises(OutOfBlocksError):
                self.beams.expand_beam(beam_id, tokens)

    @precondition(lambda self: len(self.texts) < self.beams.beam_size)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        parent = self.chosen(which)
        child = self.beams.fork_beam(parent)
        assert child not in self.texts
        self.texts[child] = list(self.texts[parent])

    @precondition(lambda self: len(self.texts) > 1)
    @rule(which=st.integers(0, 3))
    def prune(self, which: int) -> None:
        beam_id = self.chosen(which)
        self.beams.prune([beam_id])
        del self.texts[beam_id]

    def chosen(self, which: int) -> int:
        return sorted(self.texts)[which % len(self.texts)]

    @invariant()
    def check(self) -> None:
        assert set(self.beams.tables) == set(self.texts)
        check_conserved(self.allocator, *self.beams.tables.values())
        for beam_id, text in self.texts.items():
            assert self.pages.read(self.beams.tables[beam_id]) == text, "a beam reads another's tokens"

    def teardown(self) -> None:
        if hasattr(self, "beams"):
            self.beams.prune(list(self.texts))
            assert self.allocator.num_free == self.allocator.num_blocks, "pages are missing from the pool"


def test_task_9_pages_are_conserved_whatever_happens() -> None:
    """Oracle: a count of every table's blocks, and a pool of plain values: each beam reads its own tokens."""
    run_state_machine_as_test(Beams, settings=settings(quick, max_examples=40, stateful_step_count=25))


# Task 10: BeamSearch.advance

Table = Callable[[tuple[int, ...]], list[float]]  # the log-probability of each token behind those


def uneven(prefix: tuple[int, ...], vocab: int, seed: int) -> list[float]:
    """Log-probabilities that depend on all that came before."""
    row = np.random.default_rng([seed, len(prefix), *prefix]).normal(size=vocab) * 1.5
    return [float(x) for x in row - np.log(np.exp(row).sum())]


def coarse(prefix: tuple[int, ...], vocab: int, seed: int) -> list[float]:
    """Small whole numbers, so that many sums are exactly equal; they need not be probabilities."""
    row = np.random.default_rng([seed, len(prefix), *prefix]).integers(-3, 0, size=vocab)
    return [float(x) for x in row]


def fixed(rows: Mapping[tuple[int, ...], Sequence[float]]) -> Table:
    """A few rows, given as probabilities."""
    return lambda prefix: [float(np.log(p)) for p in rows[prefix]]


def run_search(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> tuple[BeamSearch, int]:
    """A search that is over, and how often it advanced. A beam offers no more tokens than are asked for."""
    search = BeamSearch(params, eos)
    for steps in count():
        if not search.beams:
            return search, steps
        assert steps < params.max_tokens, "it goes on behind the longest output"
        parents, offered = list(search.beams), []
        for beam in parents:
            row = table(beam.tokens)
            best = sorted(range(len(row)), key=lambda token: -row[token])[: search.num_candidates]
            offered.append([(token, row[token]) for token in reversed(best)])
        choices = search.advance(offered)
        assert len(choices) == len(search.beams) <= params.beam_width
        for choice, beam in zip(choices, search.beams, strict=True):
            parent = parents[choice.parent]
            assert beam.tokens == (*parent.tokens, choice.token), "the choices are about other beams"
            assert beam.logprob == pytest.approx(parent.logprob + table(parent.tokens)[choice.token])
    raise AssertionError


def all_texts(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> list[Ended]:
    """Every text that ends, by end of sequence or by length, none left out; the best first."""

    def grow(tokens: tuple[int, ...], logprob: float) -> Iterator[Ended]:
        for token, more in enumerate(table(tokens)):
            grown = Hypothesis((*tokens, token), logprob + more)
            if token in eos or len(grown.tokens) == params.max_tokens:
                score = grown.logprob / len(grown.tokens) ** params.length_penalty
                yield Ended(score, grown, "stop" if token in eos else "length")
            else:
                yield from grow(*grown)

    return sorted(grow((), 0.0), key=lambda one: -one.score)


def by_definition(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> list[Ended]:
    """Beam search as it is defined: every token of every beam is a candidate, and nothing ends early."""
    living, ended = [Hypothesis((), 0.0)], []
    for length in range(1, params.max_tokens + 1):
        grown = [
            Hypothesis((*beam.tokens, token), beam.logprob + more)
            for beam in living
            for token, more in enumerate(table(beam.tokens))
        ]
        grown.sort(key=lambda one: -one.logprob)  # equal ones stay: the better parent's, the smaller token
        for one in grown[: params.beam_width]:
            if one.tokens[-1] in eos or length == params.max_tokens:
                score = one.logprob / length**params.length_penalty
                ended.append(Ended(score, one, "stop" if one.tokens[-1] in eos else "length"))
        living = [one for one in grown if one.tokens[-1] not in eos][: params.beam_width]
    return sorted(ended, key=lambda one: -one.score)[: params.beam_width]


def check_found(found: Sequence[Ended], expected: Sequence[Ended], tolerance: float = 1e-9) -> None:
    """The same texts in the same order, their sums and scores, and why they ended."""
    assert [one.hypothesis.tokens for one in found] == [one.hypothesis.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.hypothesis.logprob == pytest.approx(theirs.hypothesis.logprob, abs=tolerance)
        assert ours.score == pytest.approx(theirs.score, abs=tolerance)


def test_task_10_the_best_live_on_and_say_whom_they_continue() -> None:
    """Oracle: by hand: sums of -1.5 and -1.6; the second parent has no child, then the first has none."""
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), ())
    assert search.advance([[(1, -2.0), (0, -1.0), (2, -3.0)]]) == [Choice(0, 0), Choice(0, 1)]
    assert search.advance([[(4, -0.5), (5, -0.6)], [(6, -0.1), (7, -9.0)]]) == [Choice(0, 4), Choice(0, 5)]
    assert [beam.tokens for beam in search.beams] == [(0, 4), (0, 5)]
    assert [beam.logprob for beam in search.beams] == pytest.approx([-1.5, -1.6])
    assert search.advance([[(1, -5.0), (2, -6.0)], [(3, -0.1), (4, -0.2)]]) == [Choice(1, 3), Choice(1, 4)]


def test_task_10_equal_sums_go_to_the_better_parent_and_then_to_the_smaller_token() -> None:
    """Oracle: the docstring."""
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=9), ())
    assert list(search.advance([[(5, -1.0), (2, -1.0), (9, -1.0), (1, -2.0)]])) == [(0, 2), (0, 5), (0, 9)]
    level = [(7, -1.0), (3, -1.0)]
    assert list(search.advance([level, level, level])) == [(0, 3), (0, 7), (1, 3)]


def test_task_10_an_end_goes_on_no_more_and_takes_nobodys_place() -> None:
    """Oracle: by hand: token 2 ends. Of three candidates the best ends, and the two others live on.

    Texts that go on behind their end are the mistake, and a beam that is one short of its width.
    """
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9, length_penalty=0), (2,))
    assert search.advance([[(0, -1.5), (1, -2.0), (2, -0.5)]]) == [Choice(0, 0), Choice(0, 1)]
    assert list(search.ended) == [Ended(-0.5, Hypothesis((2,), -0.5), "stop")]


def test_task_10_an_end_counts_only_among_the_best() -> None:
    """Oracle: by hand: with a width of 2 the end is the third of its step, and is forgotten."""
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), (2,))
    search.advance([[(0, -1.0), (1, -2.0), (2, -3.0)]])
    assert len(search.ended) == 0


def test_task_10_the_longest_text_ends_by_its_length() -> None:
    """Oracle: by hand: two tokens at most; an end at the last token is an end, and not the length."""
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=2, length_penalty=0), (0,))
    search.advance([[(1, -0.5), (0, -2.0)]])
    assert list(search.advance([[(1, -0.3), (0, -1.0)]])) == []
    assert len(search.beams) == 0
    assert [(one.hypothesis.tokens, one.finish_reason) for one in search.ended] == [
        ((1, 1), "length"),
        ((1, 0), "stop"),
        ((0,), "stop"),
    ]


@pytest.mark.parametrize(("penalty", "length"), [(-1.0, 1), (0.0, 1), (1.0, 4), (2.0, 4)])
def test_task_10_a_score_is_the_sum_divided_by_a_power_of_the_length(penalty: float, length: int) -> None:
    """Oracle: by hand: one token of 0.4, or four of together 0.6 * 0.7 ** 3: sums of -0.92 and -1.58.

    A penalty of 0 compares the sums, 1 the means, and -1 the sums times their lengths.
    """
    table = fixed({(): [0.4, 0.6], **{(1,) * n: [0.3, 0.7] for n in (1, 2, 3)}})
    params = BeamSearchParams(beam_width=4, max_tokens=4, length_penalty=penalty)
    best = run_search(table, params, (0,))[0].ended[0]
    assert len(best.hypothesis.tokens) == length
    logprob = {1: np.log(0.4), 4: np.log(0.6 * 0.7**3)}[length]
    assert best.hypothesis.logprob == pytest.approx(logprob)
    assert best.score == pytest.approx(logprob / length**penalty)


def test_task_10_a_search_is_over_when_nothing_can_improve() -> None:
    """Oracle: by hand: 0.9 ends at once, and 0.1 can only fall; with a reward for length it may still win."""
    table = fixed({(): [0.9, 0.1], (1,): [0.5, 0.5], (1, 1): [0.5, 0.5]})
    params = BeamSearchParams(beam_width=1, max_tokens=3, length_penalty=0)
    search, steps = run_search(table, params, (0,))
    assert (steps, search.ended[0].hypothesis.tokens) == (1, (0,))
    params = BeamSearchParams(beam_width=1, max_tokens=3, length_penalty=5.0)
    search, steps = run_search(table, params, (0,))
    assert (steps, len(search.ended[0].hypothesis.tokens)) == (3, 3)


def test_task_10_end_of_sequence_may_be_ignored() -> None:
    """Oracle: the definition, with no token that ends."""
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    table = partial(uneven, vocab=3, seed=1)
    search, steps = run_search(table, params, (0, 1, 2))
    assert steps == 3
    check_found(search.ended, by_definition(table, params, ()))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [(), (1,), (0, 2)], ids=["no_eos", "one_eos", "two_eos"])
def test_task_10_a_beam_wide_enough_finds_every_text_there_is(penalty: float, eos: tuple[int, ...]) -> None:
    """Oracle: all texts of 3 tokens and up to 4 of them, one after the other."""
    for seed in range(3):
        table = partial(uneven, vocab=3, seed=seed)
        params = BeamSearchParams(beam_width=3**4, max_tokens=4, length_penalty=penalty)
        check_found(run_search(table, params, eos)[0].ended, all_texts(table, params, eos))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_task_10_a_beam_that_holds_every_beginning_finds_the_best_of_all_texts(penalty: float) -> None:
    """Oracle: all texts: of 4 tokens one ends, so at most 9 beginnings live, and 36 are ranked."""
    for seed in range(4):
        table = partial(uneven, vocab=4, seed=seed)
        params = BeamSearchParams(beam_width=36, max_tokens=3, length_penalty=penalty)
        check_found(run_search(table, params, (2,))[0].ended, all_texts(table, params, (2,))[:36])


@settings(quick, max_examples=150)
@given(
    table=st.sampled_from([uneven, coarse]),
    vocab=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    eos=st.sets(st.integers(0, 4), max_size=2),
    width=st.integers(1, 6),
    max_tokens=st.integers(1, 6),
    penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
)
@example(table=uneven, vocab=2, seed=0, eos={0}, width=5, max_tokens=1, penalty=1.0)
def test_task_10_a_narrow_beam_finds_what_the_definition_says(
    table: Callable[..., list[float]],
    vocab: int,
    seed: int,
    eos: set[int],
    width: int,
    max_tokens: int,
    penalty: float,
) -> None:
    """Oracle: beam search in plain loops, which never ends early. Equal sums among them."""
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty)
    known = partial(table, vocab=vocab, seed=seed)
    check_found(run_search(known, params, sorted(eos))[0].ended, by_definition(known, params, sorted(eos)))


# Task 11: compact_pages


@dataclass
class Kept:
    """Somebody who holds blocks without being a table, as a cache of prompts does."""

    blocks: list[int]
    block_size: int = 4

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved."""
        self.blocks = [moved.get(block, block) for block in self.blocks]


@dataclass
class Texts:
    """Tables and what they say, on a pool of plain values."""

    allocator: BlockAllocator
    block_size: int = 4
    pages: Pages = field(default_factory=Pages)
    said: list[tuple[BlockTable, list[int]]] = field(default_factory=list)
    kept: list[tuple[Kept, list[list[object]]]] = field(default_factory=list)
    fresh: Iterator[int] = field(default_factory=count)

    @property
    def holders(self) -> list[BlockTable | Kept]:
        """Everybody who holds a block."""
        return [*(table for table, _ in self.said), *(kept for kept, _ in self.kept)]

    def table(self, num_tokens: int) -> BlockTable:
        """A new table with so many tokens."""
        self.said.append((BlockTable(self.allocator, self.block_size), []))
        self.append(len(self.said) - 1, num_tokens)
        return self.said[-1][0]

    def fork(self, which: int) -> None:
        """A second owner of the same text."""
        table, text = self.said[which]
        self.said.append((table.fork(), list(text)))

    def append(self, which: int, num_tokens: int) -> None:
        """A text goes on."""
        table, text = self.said[which]
        tokens = [next(self.fresh) for _ in range(num_tokens)]
        self.pages.copy(table.append_tokens(num_tokens), self.block_size)
        self.pages.write(table, tokens)
        text += tokens

    def release(self, which: int) -> None:
        """A text ends."""
        self.said.pop(which)[0].release()

    def keep(self, which: int) -> None:
        """Somebody keeps the full blocks of a text."""
        table, text = self.said[which]
        kept = Kept(table.blocks[: len(text) // self.block_size], self.block_size)
        for block in kept.blocks:
            self.allocator.add_ref(block)
        self.kept.append((kept, [self.slots_of(block) for block in kept.blocks]))

    def slots_of(self, block: int) -> list[object]:
        """What stands in a block."""
        return [self.pages.held.get(block * self.block_size + i) for i in range(self.block_size)]

    def compact(self) -> list[BlockCopy]:
        """Compact, make the copies, and check that everybody reads what they said."""
        copies = list(compact_pages(self.allocator, self.holders))
        self.pages.copy(copies, self.block_size)
        self.check()
        return copies

    def check(self) -> None:
        """Everybody reads their own, and every reference is somebody's."""
        for table, text in self.said:
            assert self.pages.read(table) == text, "somebody reads another's tokens"
        for kept, blocks in self.kept:
            assert [self.slots_of(block) for block in kept.blocks] == blocks, (
                "a kept block holds others' tokens"
            )
        held = Counter(block for holder in self.holders for block in holder.blocks)
        assert self.counts == [held[block] for block in range(self.allocator.num_blocks)]
        assert self.allocator.num_free == self.counts.count(0)

    @property
    def counts(self) -> list[int]:
        """How many holders each block has."""
        return [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]

    @property
    def state(self) -> tuple[object, ...]:
        """All that there is to know."""
        return self.counts, self.allocator.num_free, [list(holder.blocks) for holder in self.holders]


def test_task_11_blocks_in_use_move_to_the_front() -> None:
    """Oracle: the texts; by hand: 2 of 5 blocks in use stand behind the fifth place, and just these move."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (4, 7, 4, 9):
        texts.table(num_tokens)
    texts.release(1)
    behind = [block for block, holders in enumerate(texts.counts) if holders and block >= 5]
    copies = texts.compact()
    assert [holders > 0 for holders in texts.counts] == [True] * 5 + [False] * 4
    assert sorted(copy.src for copy in copies) == behind
    assert all(copy.dst < 5 for copy in copies)
    assert texts.allocator.num_free == 4


def test_task_11_the_end_of_the_pool_can_be_given_back() -> None:
    """Oracle: by hand: the four free blocks are the last four, and those in use can be all there are."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (4, 7, 4, 9):
        texts.table(num_tokens)
    texts.release(1)
    texts.compact()
    assert sorted(texts.allocator.allocate() for _ in range(4)) == [5, 6, 7, 8]
    for block in (5, 6, 7, 8):
        texts.allocator.free(block)
    texts.allocator.resize(5)
    texts.check()


def test_task_11_what_is_compact_stays_where_it_is() -> None:
    """Oracle: by hand: nothing is copied, the first time or again."""
    texts = Texts(BlockAllocator(6))
    texts.table(5)
    texts.fork(0)
    before = texts.state
    assert texts.compact() == []
    assert texts.state == before
    assert list(compact_pages(BlockAllocator(3), [])) == []


def test_task_11_a_shared_block_moves_once_and_all_holders_follow() -> None:
    """Oracle: the texts; by hand: two tables and somebody who keeps its blocks hold the second text."""
    texts = Texts(BlockAllocator(8))
    texts.table(12)
    texts.table(8)
    texts.fork(1)
    texts.keep(1)
    texts.release(0)
    assert len(texts.compact()) == 2
    assert texts.counts == [3, 3, 0, 0, 0, 0, 0, 0]


def test_task_11_a_kept_block_that_no_table_holds_moves_too() -> None:
    """Oracle: what is in it. A block is in use as long as anybody holds it."""
    texts = Texts(BlockAllocator(8))
    for num_tokens in (8, 9):
        texts.table(num_tokens)
    texts.keep(1)
    texts.release(1)
    texts.release(0)
    assert len(texts.compact()) == 2
    assert texts.counts == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_task_11_who_is_missing_would_read_anothers_keys(missing: int) -> None:
    """Oracle: the docstring: a table, each of two forks, or who keeps: it is refused, and nothing changes."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (8, 7, 8):
        texts.table(num_tokens)
    texts.fork(1)
    texts.keep(2)
    texts.release(0)
    before, holders = texts.state, texts.holders
    del holders[missing]
    with pytest.raises(ValueError):
        compact_pages(texts.allocator, holders)
    assert texts.state == before


def test_task_11_holders_may_come_one_by_one() -> None:
    """Oracle: the texts. What can be gone through only once is the trap."""
    texts = Texts(BlockAllocator(9))
    for num_tokens in (8, 7):
        texts.table(num_tokens)
    texts.release(0)
    texts.pages.copy(compact_pages(texts.allocator, iter(texts.holders)), 4)
    texts.check()


def test_task_11_a_copy_that_was_planned_goes_where_its_block_went() -> None:
    """Oracle: the texts: a fork was about to write behind 6 tokens, and its copy of the last block comes now.

    Copying the fresh block, in which nothing is yet, is the mistake; so is a source that is renamed.
    """
    texts = Texts(BlockAllocator(8))
    texts.table(8)
    texts.table(6)
    texts.fork(1)
    table, text = texts.said[2]
    pending = table.append_tokens(1)
    texts.release(0)
    copies = list(compact_pages(texts.allocator, texts.holders, pending))
    texts.pages.copy(copies, 4)
    texts.pages.write(table, [777])
    text.append(777)
    texts.check()
    [made] = [copy for copy in copies if copy.dst == table.blocks[-1]]
    assert made.length == 2


def test_task_11_a_planned_copy_stays_planned_where_nothing_moves() -> None:
    """Oracle: by hand."""
    texts = Texts(BlockAllocator(8))
    texts.table(6)
    texts.fork(0)
    pending = texts.said[1][0].append_tokens(1)
    assert list(compact_pages(texts.allocator, texts.holders, pending)) == list(pending)


def test_task_11_a_planned_copy_for_nobody_is_dropped() -> None:
    """Oracle: the texts: who was to write has gone, and another's block may get the place of his."""
    texts = Texts(BlockAllocator(6))
    texts.table(2)
    texts.fork(0)
    pending = texts.said[1][0].append_tokens(1)
    texts.release(1)
    texts.table(9)
    texts.release(0)
    texts.pages.copy(compact_pages(texts.allocator, texts.holders, pending), 4)
    texts.check()


ACTIONS = st.sampled_from(["table", "table", "append", "fork", "release", "release", "keep"])


@settings(quick, max_examples=120)
@given(st.integers(1, 4), st.lists(st.tuples(ACTIONS, st.integers(0, 9)), max_size=20))
def test_task_11_everybody_reads_their_own_whatever_came_before(
    block_size: int, actions: list[tuple[str, int]]
) -> None:
    """Oracle: the texts, in a pool of plain values. Only what stands behind the new end moves."""
    texts = Texts(BlockAllocator(60), block_size)
    for action, number in actions:
        if action == "table" or not texts.said:
            texts.table(number)
        elif action == "append":
            texts.append(number % len(texts.said), 3)
        else:
            getattr(texts, action)(number % len(texts.said))
        if texts.allocator.num_free < 10:
            break
    before, in_use = texts.counts, 60 - texts.allocator.num_free
    copies = texts.compact()
    assert [holders > 0 for holders in texts.counts] == [True] * in_use + [False] * (60 - in_use)
    assert sorted(texts.counts) == sorted(before)
    assert len(copies) == sum(holders > 0 for holders in before[in_use:])
    assert texts.compact() == []


# Task 12: compact_memory


def stored(pool: KVPool, tables: Sequence[BlockTable]) -> list[np.ndarray]:
    """The keys and values that tables find in every layer of a pool."""
    return [
        np.array(mx.stack(pool.read(layer, mx.array(table.slots(0, table.num_tokens), mx.int32))))
        for table in tables
        for layer in range(2)
    ]


def test_task_12_keys_and_values_move_with_their_blocks() -> None:
    """Oracle: what the tables read before, in both layers, forks included; by hand: 5 of 12 blocks in use."""
    allocator, pool = BlockAllocator(12), KVPool(12, 4, 2, 4, num_layers=2, dtype=mx.float32)
    tables = [filled(allocator, num_tokens) for num_tokens in (9, 4, 7, 5)]
    for number, table in enumerate(tables):
        slots = mx.array(table.slots(0, table.num_tokens), mx.int32)
        for layer in range(2):
            tokens = mx.random.normal((2, slots.size, 2, 4), key=mx.random.key(2 * number + layer))
            pool.write(layer, slots, tokens[0], tokens[1])
    tables.pop(0).release()
    tables.append(tables[1].fork())
    expected = stored(pool, tables)
    assert compact_memory(allocator, tables, pool) == 7
    assert {block for table in tables for block in table.blocks} == set(range(5))
    for found, want in zip(stored(pool, tables), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    allocator.resize(5)
    pool.resize(5)
    for found, want in zip(stored(pool, tables), expected, strict=True):
        np.testing.assert_array_equal(found, want)


def test_task_12_without_a_pool_it_is_the_ids_alone() -> None:
    """Oracle: by hand: how many blocks are free at the end, not how many have moved."""
    allocator = BlockAllocator(6)
    first, second = filled(allocator, 4), filled(allocator, 8)
    assert compact_memory(allocator, [first, second]) == 3
    first.release()
    assert compact_memory(allocator, iter([second])) == 4
    assert sorted(second.blocks) == [0, 1]
    second.release()
    assert compact_memory(allocator, []) == 6


def test_task_12_who_is_missing_is_refused() -> None:
    """Oracle: the docstring: nothing is copied either."""
    allocator, pool = BlockAllocator(6), KVPool(6, 4, 1, 2)
    tables = [filled(allocator, num_tokens) for num_tokens in (4, 8)]
    tables.pop(0).release()
    with pytest.raises(ValueError):
        compact_memory(allocator, [], pool)
    assert allocator.num_free == 4


# Task 13: PagedBatchManager.add_request


def limits(max_tokens: int | None = 4, n: int = 1) -> SamplingParams:
    """What matters to scheduling: how many tokens, how many completions; the likeliest token each time."""
    return SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0)


def manager_of(
    blocks: int = 8, seats: int = 4, *, budget: int = 64, context: int = 32, min_pages: int | None = None
) -> PagedBatchManager:
    """Blocks of 4 tokens, and no model: the bookkeeping alone."""
    return PagedBatchManager(
        blocks, 4, seats, max_batched_tokens=budget, max_model_len=context, min_pages=min_pages
    )


def ids(sequences: Sequence) -> list[str]:
    """The ids of sequences, in order."""
    return [sequence.seq_id for sequence in sequences]


def check_pages(manager: PagedBatchManager) -> None:
    """Free and held blocks are the whole pool, each held once by each table that names it."""
    check_conserved(manager.allocator, *(sequence.table for sequence in [*manager.running, *manager.waiting]))


def test_task_13_a_sequence_has_a_table_and_a_stream_for_each_group_of_layers() -> None:
    """Oracle: by hand: two groups, so two tables and two streams, and a step fills both tables."""
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=(LayerGroup((0,)), LayerGroup((1,))))
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    sequence = manager.sequence("a")
    assert (len(sequence.tables), len(sequence.streams)) == (2, 2)
    assert list(manager.process_batch()) == ["a"]
    assert [table.num_tokens for table in manager.sequence("a").tables] == [5, 5]


def test_task_13_a_table_is_of_the_kind_that_its_layers_need() -> None:
    """Oracle: by hand: layers with a window need another kind than layers that see everything."""
    groups = (LayerGroup((0,)), LayerGroup((1,), window=8))
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=groups)
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    full, windowed = manager.sequence("a").tables
    assert type(full) is not type(windowed)


def test_task_13_a_request_waits_without_a_page() -> None:
    """Oracle: by hand: pages are taken when it is its turn."""
    manager = manager_of()
    assert not manager.has_work
    assert manager.add_request([5, 6, 7], "a", limits(), seed=9) is True
    assert manager.has_work
    assert (ids(manager.waiting), ids(manager.running)) == (["a"], [])
    assert manager.capacity.num_free == 8
    sequence = manager.sequence("a")
    assert (sequence.seq_id, sequence.request_id, sequence.prompt) == ("a", "a", (5, 6, 7))
    assert (sequence.params, sequence.seed) == (limits(), 9)
    assert (sequence.outputs, sequence.num_computed, sequence.num_forks) == ([], 0, 0)
    assert (len(sequence.table.blocks), sequence.table.num_tokens, sequence.table.block_size) == (0, 0, 4)
    assert not sequence.is_beam


def test_task_13_requests_wait_in_the_order_of_their_arrival() -> None:
    """Oracle: by hand; that of their names or lengths is another."""
    manager = manager_of()
    for name, length in (("m", 3), ("z", 1), ("a", 2)):
        manager.add_request([1] * length, name, limits())
    assert ids(manager.waiting) == ["m", "z", "a"]


def test_task_13_a_prompt_is_what_it_was_when_it_came() -> None:
    """Oracle: by hand: the caller may use the list again."""
    manager, tokens = manager_of(), [5, 6, 7]
    manager.add_request(tokens, "a", limits())
    tokens.append(8)
    assert manager.sequence("a").prompt == (5, 6, 7)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(1, 4), (4, 7), (29, 32), (None, 32)])
def test_task_13_the_length_is_limited_by_the_request_or_the_context(
    max_tokens: int | None, max_len: int
) -> None:
    """Oracle: by hand: 3 prompt tokens and the outputs, or all 32 of the context."""
    manager = manager_of()
    manager.add_request([5, 6, 7], "a", limits(max_tokens))
    assert manager.sequence("a").max_len == max_len


def test_task_13_without_parameters_there_are_the_usual_ones() -> None:
    """Oracle: by hand: `SamplingParams()` asks for 16 tokens, one completion."""
    manager = manager_of()
    manager.add_request([5, 6, 7], "a")
    assert manager.sequence("a").params == SamplingParams()
    assert manager.sequence("a").max_len == 19


@pytest.mark.parametrize("is_beam", [False, True])
def test_task_13_completions_and_beams_wait_as_one_sequence(is_beam: bool) -> None:
    """Oracle: by hand: three are a leader and two to come, known by all their ids."""
    manager = manager_of()
    manager.add_request([5, 6], "a", limits(n=3), beam_search=is_beam)
    assert ids(manager.waiting) == ["a/0"]
    leader = manager.sequence("a/0")
    assert (leader.request_id, leader.num_forks, leader.is_beam) == ("a", 2, is_beam)
    assert manager.sequence("a/1") is manager.sequence("a/2") is leader


def test_task_13_a_salt_keeps_streams_apart() -> None:
    """Oracle: the docstring of `TokenBlocks`: another salt, another hash; the same one, the same."""
    manager = manager_of()
    for name, salt in (("a", ""), ("b", "x"), ("c", "x")):
        manager.add_request([5, 6], name, SamplingParams(max_tokens=4, cache_salt=salt))
    first = {name: manager.sequence(name).stream.parent(0) for name in "abc"}
    assert first["a"] != first["b"] == first["c"]
    assert manager.sequence("a").stream.block_size == 4


def test_task_13_an_empty_prompt_is_refused() -> None:
    """Oracle: the docstring; nothing changes."""
    manager = manager_of()
    with pytest.raises(ValueError):
        manager.add_request([], "a", limits())
    assert not manager.has_work


TOO_LARGE = {
    "context": (20, limits(13), False),
    "no_place_for_an_output": (32, limits(1), False),
    "prompt_alone": (40, limits(None), False),
    "seats": (2, limits(n=5), False),
    "pages": (14, limits(12), False),
    "pages_of_completions": (4, limits(17, n=2), False),
    "pages_of_beams": (4, limits(9, n=4), True),
}


@pytest.mark.parametrize(("length", "params", "is_beam"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_task_13_what_could_never_run_is_refused(length: int, params: SamplingParams, is_beam: bool) -> None:
    """Oracle: by hand, for 6 blocks of 4, 4 seats and a context of 32.

    26 tokens are 7 blocks; 21 tokens twice are 6 and 5, with one block shared; 13 tokens four times are
    4 and three times 3. Nothing changes: the id is free for a request that can run.
    """
    manager = manager_of(blocks=6)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * length, "a", params, beam_search=is_beam)
    assert not manager.has_work
    assert manager.add_request([1] * 12, "a", limits(12))
    assert ids(manager.waiting) == ["a"]


@pytest.mark.parametrize(
    ("name", "n"), [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b/0", 1), ("b/1", 1), ("c", 2)]
)
def test_task_13_an_id_in_use_is_refused(name: str, n: int) -> None:
    """Oracle: the docstring: "a" is in use, "b", whose completions are "b/0" and "b/1", and "c/1".

    Two completions of a request "c" would be "c/0" and "c/1".
    """
    manager = manager_of()
    manager.add_request([1, 2], "a", limits())
    manager.add_request([3, 4], "b", limits(n=2))
    manager.add_request([7], "c/1", limits())
    with pytest.raises(DuplicateRequestError):
        manager.add_request([5, 6], name, limits(n=n))
    assert ids(manager.waiting) == ["a", "b/0", "c/1"]


# Task 14: PagedBatchManager.process_batch


def test_task_14_a_prompt_is_computed_and_is_ready() -> None:
    """Oracle: by hand: 6 tokens take 2 blocks of 4, and all of them are computed."""
    manager = manager_of()
    manager.add_request([5] * 6, "a", limits())
    ready = manager.process_batch()
    assert list(ready) == ["a"]
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.sequence("a").num_computed == 6
    assert manager.capacity.num_free == 6
    assert manager.prefix_stats.queries == 6, "the scheduler was told what was computed"
    check_pages(manager)


def test_task_14_where_there_is_nothing_to_do_nobody_is_ready() -> None:
    """Oracle: by hand: without a request, and with one whose token is not chosen yet."""
    manager = manager_of()
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == 3


def test_task_14_a_long_prompt_is_computed_in_chunks_with_pages_as_they_are_needed() -> None:
    """Oracle: by hand: 10 tokens at 4 a step, a block for each chunk; nobody is ready before the last one."""
    manager, found = manager_of(budget=4), []
    manager.add_request([1] * 10, "a", limits())
    for _ in range(3):
        ready = list(manager.process_batch())
        found.append((ready, manager.sequence("a").num_computed, manager.capacity.num_free))
    assert found == [([], 4, 7), ([], 8, 6), (["a"], 10, 5)]


def test_task_14_decodes_go_on_beside_a_long_prompt() -> None:
    """Oracle: by hand: of 4 tokens a step one is the decode's, and 3 are the prompt's."""
    manager, computed = manager_of(budget=4), []
    manager.add_request([5], "short", limits(8))
    manager.commit(dict.fromkeys(manager.process_batch(), 7))
    manager.add_request([1] * 10, "long", limits(2))
    for _ in range(4):
        ready = manager.process_batch()
        assert "short" in ready
        computed.append(manager.sequence("long").num_computed)
        manager.commit(dict.fromkeys(ready, 7))
    assert computed == [3, 6, 9, 10]
    check_pages(manager)


def test_task_14_completions_are_forked_when_their_prompt_is_computed() -> None:
    """Oracle: by hand: a prompt of 6 takes 2 blocks whoever shares them; then each of three writes alone."""
    manager = manager_of(budget=4)
    manager.add_request([1] * 6, "a", limits(n=3))
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a/0"]
    ready = manager.process_batch()
    assert set(ready) == {"a/0", "a/1", "a/2"} == set(ids(manager.running))
    assert manager.capacity.num_free == 6
    check_pages(manager)
    manager.commit(dict.fromkeys(ready, 7))
    manager.process_batch()
    assert manager.capacity.num_free == 8 - 1 - 3
    check_pages(manager)


def test_task_14_a_search_begins_as_one_beam_and_goes_on_as_it_is_told() -> None:
    """Oracle: by hand: its places are kept, and `advance` makes three beams of one."""
    manager = manager_of(seats=4)
    manager.add_request([1] * 6, "a", limits(n=3), beam_search=True)
    manager.add_request([2], "b", limits(n=2))
    assert list(manager.process_batch()) == ["a/0"]
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0"], ["b/0"])
    manager.advance("a", [BeamStep("a/0", token) for token in (7, 8, 9)])
    check_pages(manager)
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}
    assert [manager.sequence(f"a/{i}").outputs for i in range(3)] == [[7], [8], [9]]
    assert manager.capacity.num_free == 8 - 1 - 3
    check_pages(manager)


def test_task_14_a_request_that_finds_too_few_pages_is_dropped_and_the_next_runs() -> None:
    """Oracle: the docstring: somebody outside holds 3 of 4 blocks."""
    manager = manager_of(blocks=4)
    elsewhere = filled(manager.allocator, 12)
    manager.add_request([1] * 8, "big", limits())
    with pytest.raises(OutOfBlocksError):
        manager.process_batch()
    assert not manager.has_work
    manager.add_request([1], "small", limits(2))
    assert list(manager.process_batch()) == ["small"]
    check_conserved(manager.allocator, elsewhere, manager.sequence("small").table)


@cache
def tiny_model() -> Model:
    """Two layers of random float32 matrices, strong enough in attention that the past decides what comes.

    Four query heads on two key and value heads of 8, a vocabulary of 50.
    """
    config = ModelConfig(
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    rng, linears, vectors = np.random.default_rng(0), {}, {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            vectors[name.removesuffix(".weight")] = mx.array(1 + 0.1 * noise)
        else:
            gain = 1.0 if "embed" in name else 2.0 * shape[1] ** -0.5
            linears[name.removesuffix(".weight")] = Linear(mx.array(gain * noise))
    return build_model(config, linears, vectors)


@dataclass
class WatchedModel:
    """A model that notes how many tokens each pass brings, and how many rows of logits are asked for.

    It does not run on a pool that has another size than the manager's allocator: it would write anywhere.
    """

    model: Model
    fed: list[tuple[int, int]] = field(default_factory=list)
    manager: PagedBatchManager | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        assert self.manager is not None
        assert self.manager.pool is not None
        assert self.manager.pool.num_blocks == self.manager.allocator.num_blocks, "the pool's size"
        rows = context.logit_rows
        self.fed.append((tokens.shape[1], tokens.shape[1] if rows is None else rows.size))
        return self.model(tokens, context)


def with_model(
    blocks: int = 64,
    block_size: int = 4,
    seats: int = 6,
    *,
    budget: int = 512,
    min_pages: int | None = None,
    model: WatchedModel | None = None,
) -> PagedBatchManager:
    """A manager that computes; keys and values in float32, so that storing them rounds nothing."""
    watched = model or WatchedModel(tiny_model())
    watched.manager = PagedBatchManager(
        blocks,
        block_size,
        seats,
        model=watched,
        max_batched_tokens=budget,
        kv_dtype=mx.float32,
        min_pages=min_pages,
    )
    return watched.manager


@cache
def logits_after(tokens: tuple[int, ...]) -> np.ndarray:
    """The logits of the next token, computed from nothing: no cache, no batch."""
    context = NoCacheContext(len(tokens), tiny_model().config.attention_scale)
    return np.array(tiny_model()(mx.array([tokens], mx.int32), context)[0, -1])


def check_logits(ready: Mapping[str, mx.array], known: Mapping[str, Sequence[int]]) -> None:
    """The logits of those who are ready are those behind their own tokens."""
    for name, row in ready.items():
        np.testing.assert_allclose(np.array(row), logits_after(tuple(known[name])), rtol=1e-3, atol=1e-3)


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 50, size=length).tolist()


@pytest.mark.parametrize("budget", [3, 8, 512])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_task_14_logits_are_those_of_each_sequence_alone(budget: int, block_size: int) -> None:
    """Oracle: the model without cache and batch. The prompts are packed, whole or in chunks."""
    prompts = {"a": prompt(7, 1), "b": prompt(1, 2), "c": prompt(12, 3)}
    manager, found = with_model(block_size=block_size, seats=3, budget=budget), []
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    for _ in range(10):
        ready = manager.process_batch()
        check_logits(ready, prompts)
        found += list(ready)
    assert sorted(found) == ["a", "b", "c"]


def test_task_14_a_step_is_one_pass_and_only_rows_that_matter_become_logits() -> None:
    """Oracle: by hand: 8 tokens are 4 and 4 of 6, the next step brings 2; for nothing there is no pass."""
    model = WatchedModel(tiny_model())
    manager = with_model(model=model, budget=8)
    manager.add_request(prompt(4, 6), "a", limits())
    manager.add_request(prompt(6, 7), "b", limits())
    for _ in range(3):
        manager.process_batch()
    assert model.fed == [(8, 1), (2, 1)]


def test_task_14_the_next_step_continues_with_the_token() -> None:
    """Oracle: the model without cache and batch, on prompt and outputs."""
    manager, tokens = with_model(), prompt(5, 8)
    manager.add_request(tokens, "a", limits())
    for token in (11, 3, 42):
        check_logits(manager.process_batch(), {"a": tokens})
        manager.commit({"a": token})
        tokens = [*tokens, token]


@pytest.mark.parametrize("length", [6, 8, 9])
def test_task_14_completions_go_different_ways(length: int) -> None:
    """Oracle: the model without cache and batch, on each one's own tokens; blocks of 4.

    Copies that are not made before the step writes, or not at all, are the mistake.
    """
    manager, tokens = with_model(), prompt(length, 9)
    known = {f"a/{i}": list(tokens) for i in range(3)}
    manager.add_request(tokens, "a", limits(8, n=3))
    for step in range(6):
        ready = manager.process_batch()
        assert set(ready) == set(known)
        check_logits(ready, known)
        for i, mine in enumerate(known.values()):
            mine.append(8 * step + 3 * i)
        manager.commit({name: mine[-1] for name, mine in known.items()})
        check_pages(manager)


def test_task_14_beams_go_different_ways() -> None:
    """Oracle: the model without cache and batch, on each beam's own tokens. Some have two children."""
    manager, tokens = with_model(), prompt(6, 10)
    manager.add_request(tokens, "a", limits(8, n=3), beam_search=True)
    known = {"a/0": tokens}
    for steps in ([(0, 1), (0, 2), (0, 3)], [(2, 4), (2, 5), (0, 6)], [(1, 7), (1, 8)], [(0, 9), (1, 10)]):
        ready = manager.process_batch()
        assert set(ready) == set(known)
        check_logits(ready, known)
        manager.advance("a", [BeamStep(f"a/{parent}", token) for parent, token in steps])
        known = {f"a/{i}": [*known[f"a/{parent}"], token] for i, (parent, token) in enumerate(steps)}
        check_pages(manager)
    check_logits(manager.process_batch(), known)


def test_task_14_a_pool_grows_with_its_sequences() -> None:
    """Oracle: the model without cache and batch: what is in the pool stays in it when it gets larger."""
    manager, known = with_model(min_pages=1), {"a": prompt(6, 11), "b": prompt(3, 12)}
    assert manager.pool is not None
    one_block, sizes = manager.capacity.nbytes, []
    for name, tokens in known.items():
        manager.add_request(list(tokens), name, limits(30))
    for step in range(20):
        ready = manager.process_batch()
        assert len(ready) == 2
        check_logits(ready, known)
        sizes.append(manager.allocator.num_blocks)
        assert manager.pool.num_blocks == sizes[-1]
        assert manager.capacity.nbytes == sizes[-1] * one_block
        for tokens in known.values():
            tokens.append(step)
        manager.commit({name: tokens[-1] for name, tokens in known.items()})
    assert sizes[0] < sizes[-1]


# Task 15: PagedBatchManager.finish


def test_task_15_a_sequence_ends_and_its_pages_are_free() -> None:
    """Oracle: by hand: 2 blocks and 1. A sequence that is only forgotten keeps its pages for ever."""
    manager = manager_of()
    manager.add_request([5] * 6, "a", limits())
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.finish("a")
    assert ids(manager.running) == ["b"]
    assert manager.capacity.num_free == 7
    check_pages(manager)
    assert manager.has_work
    manager.finish("b")
    assert manager.capacity.num_free == 8
    assert not manager.has_work


def test_task_15_who_has_ended_is_unknown() -> None:
    """Oracle: the docstring: nothing is given back a second time."""
    manager = manager_of()
    manager.add_request([5, 6], "a", limits())
    manager.add_request([5, 6], "b", limits())
    manager.process_batch()
    manager.finish("a")
    for name in ("a", "nobody"):
        with pytest.raises(KeyError):
            manager.finish(name)
    assert manager.capacity.num_free == 7
    check_pages(manager)


def test_task_15_a_sequence_may_end_while_it_waits_or_its_prompt_is_computed() -> None:
    """Oracle: by hand."""
    manager = manager_of(seats=1, budget=4)
    manager.add_request([1] * 10, "a", limits())
    manager.add_request([2], "b", limits())
    manager.process_batch()
    manager.finish("b")
    assert (ids(manager.running), ids(manager.waiting), manager.capacity.num_free) == (["a"], [], 7)
    manager.finish("a")
    assert manager.capacity.num_free == 8
    assert len(manager.process_batch()) == 0


def test_task_15_completions_end_one_by_one_and_keep_what_they_share() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4, then one token each: 1 shared block and 3 of their own."""
    manager, free = manager_of(), []
    manager.add_request([5] * 6, "a", limits(n=3))
    for _ in range(2):
        manager.commit(dict.fromkeys(manager.process_batch(), 7))
    for name in ("a/1", "a/0", "a/2"):
        manager.finish(name)
        free.append(manager.capacity.num_free)
        check_pages(manager)
    assert free == [5, 6, 8]


def test_task_15_the_next_one_starts_on_the_pages_of_the_last_one() -> None:
    """Oracle: by hand: 20 tokens are 5 of 6 blocks: one at a time, first come, first served."""
    manager, order = manager_of(blocks=6), []
    for name in ("c", "a", "b"):
        manager.add_request([1] * 18, name, limits(2))
    while manager.has_work:
        assert len(order) < 9, "it never ends"
        order += (ready := list(manager.process_batch()))
        for name in ready:
            manager.finish(name)
    assert order == ["c", "a", "b"]


def test_task_15_a_cancelled_search_gives_everything_back() -> None:
    """Oracle: by hand: `cancel` finishes every sequence of a request."""
    manager = manager_of()
    manager.add_request([1] * 6, "a", limits(n=3), beam_search=True)
    manager.process_batch()
    manager.advance("a", [BeamStep("a/0", 7), BeamStep("a/0", 8)])
    manager.process_batch()
    manager.cancel("a")
    assert manager.capacity.num_free == 8
    assert not manager.has_work
    assert manager.add_request([5], "a", limits())


def test_task_15_a_pool_that_has_grown_gives_memory_back() -> None:
    """Oracle: by hand and the model alone: the long one's blocks are far behind, and move to the front.

    Two ask for many blocks and one of them ends: the pool shrinks while the other goes on.
    """
    manager, known = with_model(min_pages=2), {"a": prompt(40, 13), "b": prompt(5, 14)}
    for name, tokens in known.items():
        manager.add_request(list(tokens), name, limits(12))
    sizes = []
    for step in range(8):
        ready = manager.process_batch()
        check_logits(ready, known)
        check_pages(manager)
        sizes.append(manager.allocator.num_blocks)
        for name in ready:
            known[name].append(step)
        manager.commit({name: known[name][-1] for name in ready})
        if step == 2:
            manager.finish("a")
    assert max(sizes) >= 13
    assert sizes[-1] <= 8
    assert manager.pool is not None
    assert manager.pool.num_blocks == sizes[-1]
    assert manager.capacity.num_free == 64 - 3


def recompute_everything(tokens: Sequence[int], max_tokens: int) -> list[int]:
    """The likeliest tokens behind these, every one from nothing: no cache, no batch."""
    known = list(tokens)
    for _ in range(max_tokens):
        known.append(int(logits_after(tuple(known)).argmax()))
    return known[len(tokens) :]


def answers(
    manager: PagedBatchManager, requests: Mapping[str, tuple[list[int], SamplingParams]], every: int = 0
) -> dict[str, list[int]]:
    """The tokens of each sequence; a request joins every so many steps, with 0 all of them at once."""
    core, to_come, step = EngineCore(manager, eos_token_ids=()), list(requests.items()), 0
    found: dict[str, list[int]] = {}
    while to_come or core.has_work:
        assert step < 500, "it never ends"
        while to_come and (every == 0 or step % every == 0):
            name, (tokens, params) = to_come.pop(0)
            core.add_request(name, tokens, params)
            if every:
                break
        for output in core.step():
            found.setdefault(output.seq_id, []).append(output.token)
        check_pages(manager)
        step += 1
    assert manager.capacity.num_free == manager.max_pages, "pages are missing when all have ended"
    return found


REQUESTS = {
    f"r{i}": (prompt(length, seed=40 + i), limits(max_tokens))
    for i, (length, max_tokens) in enumerate([(5, 9), (17, 4), (1, 12), (30, 6), (8, 1)])
}


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_task_15_a_request_alone_gets_the_likeliest_tokens(block_size: int) -> None:
    """Oracle: a plain loop that recomputes everything."""
    for name, (tokens, params) in REQUESTS.items():
        assert params.max_tokens is not None
        found = answers(with_model(block_size=block_size), {name: (tokens, params)})
        assert found == {name: recompute_everything(tokens, params.max_tokens)}


@pytest.mark.parametrize(
    ("blocks", "block_size", "seats", "budget", "every", "min_pages"),
    [
        (64, 4, 5, 512, 0, None),
        (64, 4, 5, 8, 0, None),
        (40, 1, 5, 8, 2, None),
        (13, 3, 5, 6, 0, None),
        (20, 4, 2, 16, 5, None),
        (64, 2, 5, 16, 3, 1),
    ],
)
def test_task_15_a_request_gets_beside_others_what_it_gets_alone(
    blocks: int, block_size: int, seats: int, budget: int, every: int, min_pages: int | None
) -> None:
    """Oracle: each request from nothing. They begin together or join later; pages and seats are short.

    After every step each block is free or held by the tables that name it, and in the end all are free.
    """
    manager = with_model(blocks, block_size, seats, budget=budget, min_pages=min_pages)
    expected = {
        name: recompute_everything(tokens, params.max_tokens or 0)
        for name, (tokens, params) in REQUESTS.items()
    }
    assert answers(manager, REQUESTS, every) == expected


def test_task_15_completions_beside_others() -> None:
    """Oracle: each request from nothing; the likeliest tokens are the same for all completions."""
    tokens, _ = REQUESTS["r0"]
    found = answers(with_model(budget=8), {"a": (tokens, limits(9, n=3)), **REQUESTS})
    want = recompute_everything(tokens, 9)
    assert [found[f"a/{i}"] for i in range(3)] == [want, want, want]
    assert found["r3"] == recompute_everything(REQUESTS["r3"][0], 6)


def next_tokens(start: Sequence[int]) -> Table:
    """The model's log-probabilities behind a prompt, from nothing."""

    def table(tokens: tuple[int, ...]) -> list[float]:
        row = logits_after((*start, *tokens)).astype(np.float64)
        return [float(x) for x in row - row.max() - np.log(np.exp(row - row.max()).sum())]

    return table


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_task_15_a_search_finds_what_it_finds_without_any_cache(width: int, penalty: float) -> None:
    """Oracle: beam search in plain loops that recompute every beam; your beams, pages and batches together.

    Two searches and a request run beside each other on few pages.
    """
    manager, eos = with_model(blocks=36, block_size=3, seats=9, budget=16), (4, 17)
    core = EngineCore(manager, eos)
    params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=penalty)
    starts = {"a": prompt(7, 20), "b": prompt(11, 21)}
    searches = {name: core.add_beam_search(name, start, params) for name, start in starts.items()}
    core.add_request("c", prompt(4, 22), limits(9))
    steps = 0
    while core.has_work:
        core.step()
        check_pages(manager)
        steps += 1
        assert steps < 100, "it never ends"
    assert manager.capacity.num_free == 36
    for name, start in starts.items():
        check_found(searches[name].ended, by_definition(next_tokens(start), params, eos), 1e-3)
