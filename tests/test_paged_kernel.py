"""write_and_attend, paged_attention and pack_batch: the readable functions against dense attention in NumPy
float64, and the compiled kernels, if they are built, against the same oracle.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.kernels import twins, use_compiled
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_kernel import Span, pack_batch, paged_attention, write_and_attend

from tiny_model import examples

H, HKV, D = 4, 2, 32
SCALE = D**-0.5
SpanLengths = list[tuple[int, int]]  # for each sequence of a step: (tokens before it, tokens in it)


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The last L of S tokens, causal: q [H, L, D], k and v [Hkv, S, D] -> [H, L, D] in float64."""
    L, S = q.shape[1], k.shape[1]
    out = np.empty(q.shape)
    for head in range(q.shape[0]):
        keys, values = k[head * HKV // H].astype(np.float64), v[head * HKV // H].astype(np.float64)
        for row in range(L):
            seen = S - L + row + 1
            scores = keys[:seen] @ q[head, row].astype(np.float64) * SCALE
            weights = np.exp(scores - scores.max())
            out[head, row] = weights / weights.sum() @ values[:seen]
    return out


class Step:
    """A packed step over random keys and values, with a past that was written in earlier steps."""

    def __init__(self, spans: SpanLengths, block_size: int, dtype: mx.Dtype, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        allocator = BlockAllocator(sum(-(-(past + now) // block_size) for past, now in spans) + 3)
        shape = (allocator.num_blocks, HKV, block_size, D)
        self.keys, self.values = mx.full(shape, mx.nan, dtype), mx.full(shape, mx.nan, dtype)
        self.tables = [BlockTable(allocator, block_size) for _ in spans]
        self.streams = [self.normal(2, HKV, past + now, D) for past, now in spans]
        for table, (past, _) in zip(self.tables, spans, strict=True):
            table.append_tokens(past)
        past_spans = [
            Span(table, 0, past) for table, (past, _) in zip(self.tables, spans, strict=True) if past
        ]
        if past_spans:
            self.run(past_spans)
        for table, (_, now) in zip(self.tables, spans, strict=True):
            table.append_tokens(now)
        self.spans = [
            Span(table, past, past + now) for table, (past, now) in zip(self.tables, spans, strict=True)
        ]

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def stored(self, table: BlockTable, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values of the table's stream as the pool stores them."""
        stream = mx.array(self.streams[self.tables.index(table)][:, :, :stop]).astype(self.keys.dtype)
        k, v = np.array(stream.astype(mx.float32))
        return k, v

    def run(self, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """The step's output [H, T, D], and the expected one."""
        fresh = [self.streams[self.tables.index(t)][:, :, start:stop] for t, start, stop in spans]
        k, v = (mx.array(np.concatenate(parts, axis=1)[None]) for parts in zip(*fresh, strict=True))
        q = self.normal(1, H, k.shape[2], D)
        batch = pack_batch(spans)
        out, self.keys, self.values = write_and_attend(
            mx.array(q), k, v, self.keys, self.values, batch, SCALE
        )
        mx.eval(out, self.keys, self.values)
        again = paged_attention(mx.array(q), self.keys, self.values, batch, SCALE)
        assert mx.array_equal(again, out).item(), "a second read gives the same bits as the step"
        expected, packed = [], 0
        for table, start, stop in spans:
            rows = q[0, :, packed : packed + stop - start]
            expected.append(dense_attention(rows, *self.stored(table, stop)))
            packed += stop - start
        return np.array(out[0]), np.concatenate(expected, axis=1)


span_lists = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=4)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@settings(max_examples=examples(40))
@given(span_lists, st.integers(1, 17), st.sampled_from(sorted(DTYPES)))
def test_readable_attention_equals_dense_attention_over_the_stored_values(
    spans: SpanLengths, block_size: int, dtype: str
) -> None:
    with twins():
        step = Step(spans, block_size, DTYPES[dtype], seed=1)
        out, expected = step.run(step.spans)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


@pytest.mark.skipif(not use_compiled(), reason="no compiled kernels")
@settings(max_examples=examples(60))
@given(span_lists, st.integers(1, 17), st.sampled_from(sorted(DTYPES)))
def test_compiled_attention_equals_dense_attention_over_the_stored_values(
    spans: SpanLengths, block_size: int, dtype: str
) -> None:
    step = Step(spans, block_size, DTYPES[dtype], seed=2)
    out, expected = step.run(step.spans)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


def test_a_step_writes_only_its_own_slots() -> None:
    step = Step([(5, 3), (0, 2)], 4, mx.float32, seed=3)
    before = np.array(step.keys)
    step.run(step.spans)
    written = set(np.array(pack_batch(step.spans).slots).tolist())
    after = np.array(step.keys)
    for block in range(before.shape[0]):
        for offset in range(4):
            same = np.array_equal(before[block, :, offset], after[block, :, offset], equal_nan=True)
            assert same == (block * 4 + offset not in written)


@pytest.mark.parametrize("readable", [True, False])
def test_attention_that_only_reads_writes_nothing(readable: bool) -> None:
    with twins() if readable else mx.stream(mx.cpu):
        step = Step([(5, 3), (0, 2)], 4, mx.float16, seed=4)
        step.run(step.spans)
        before = np.array(step.keys), np.array(step.values)
        batch = pack_batch(step.spans)
        mx.eval(paged_attention(mx.array(step.normal(1, H, 5, D)), step.keys, step.values, batch, SCALE))
    assert np.array_equal(before[0], np.array(step.keys), equal_nan=True)
    assert np.array_equal(before[1], np.array(step.values), equal_nan=True)


def test_a_packed_batch_places_its_spans_side_by_side() -> None:
    allocator = BlockAllocator(9)
    long, short = BlockTable(allocator, 4), BlockTable(allocator, 4)
    long.append_tokens(9)
    short.append_tokens(2)
    batch = pack_batch([Span(long, 7, 9), Span(short, 0, 2)])
    assert batch.positions.tolist() == [7, 8, 0, 1]
    assert batch.row_of_token.tolist() == [0, 0, 1, 1]
    assert batch.tables.shape == (2, 3)
    assert batch.tables[0].tolist() == long.blocks
    assert batch.tables[1].tolist()[:1] == short.blocks
    assert batch.slots.tolist() == [
        long.blocks[1] * 4 + 3,
        long.blocks[2] * 4,
        short.blocks[0] * 4,
        short.blocks[0] * 4 + 1,
    ]
    assert {a.dtype for a in (batch.positions, batch.slots, batch.tables, batch.row_of_token)} == {mx.int32}
