"""Day 2.7, task 1: the packed tokens of one step, each span attending to its own slot."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.dense_batch import DenseContext, DenseSpan
from tiny_llm.naive_cache import NaiveKVCache

from common.numpy_oracles import causal_attention

# Task 1: DenseContext.attend


def empty_slot(layers: int = 1, kv_heads: int = 1, size: int = 2, dtype: mx.Dtype = mx.float32) -> list:
    """A slot for one sequence of up to 16 tokens: one cache per layer."""
    return [NaiveKVCache(16, kv_heads, size, dtype) for _ in range(layers)]


def packed(*numbers: float) -> mx.array:
    """Packed tokens of one head of size 2, [1, 1, T, 2]: a number and a zero for each."""
    return mx.array([[[[number, 0] for number in numbers]]], mx.float32)


def test_task_1_a_prompt_attends_to_itself() -> None:
    """Oracle: by hand: with equal keys the running means of 2, 4 and 9 are 2, 3 and 5."""
    context = DenseContext([DenseSpan(empty_slot(), 0, 3)], 1.0, None)
    out = context.attend(0, packed(1, 1, 1), packed(0, 0, 0), packed(2, 4, 9))
    assert out.shape == (1, 1, 3, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


def test_task_1_every_span_attends_to_its_own_slot() -> None:
    """Oracle: by hand: the running means of 2 and 4, of 10, and of 7 and 9.

    Common mistake: attending to the other spans.
    """
    spans = [DenseSpan(empty_slot(), 0, 2), DenseSpan(empty_slot(), 0, 1), DenseSpan(empty_slot(), 0, 2)]
    context = DenseContext(spans, 1.0, None)
    out = context.attend(0, packed(1, 1, 1, 1, 1), packed(0, 0, 0, 0, 0), packed(2, 4, 10, 7, 9))
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 10, 7, 8], rtol=1e-6)


def test_task_1_the_next_step_attends_to_the_tokens_in_the_slot() -> None:
    """Oracle: by hand: one sequence continues with 9 after 2 and 4, the other with 4 and 4 after 10."""
    first, second = empty_slot(), empty_slot()
    step = DenseContext([DenseSpan(first, 0, 2), DenseSpan(second, 0, 1)], 1.0, None)
    step.attend(0, packed(1, 1, 1), packed(0, 0, 0), packed(2, 4, 10))
    step = DenseContext([DenseSpan(first, 2, 3), DenseSpan(second, 1, 3)], 1.0, None)
    out = step.attend(0, packed(1, 1, 1), packed(0, 0, 0), packed(9, 4, 4))
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [5, 7, 6], rtol=1e-6)


def test_task_1_keys_and_values_are_stored_in_the_slot_of_the_layer() -> None:
    """Oracle: by hand: the caches of the other layers stay empty."""
    first, second = empty_slot(layers=3), empty_slot(layers=3)
    context = DenseContext([DenseSpan(first, 0, 1), DenseSpan(second, 0, 2)], 1.0, None)
    context.attend(1, packed(1, 1, 1), packed(3, 4, 5), packed(6, 7, 8))
    assert [cache.current_len for cache in first] == [0, 1, 0]
    assert [cache.current_len for cache in second] == [0, 2, 0]
    assert second[1].k_cache[:, :2].tolist() == [[[4, 0], [5, 0]]]
    assert second[1].v_cache[:, :2].tolist() == [[[7, 0], [8, 0]]]


CHUNKS = pytest.mark.parametrize("chunks", [[(0, 2)], [(0, 1), (1, 2)]], ids=["prompt", "decode"])
ROUNDING = pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16])


def second_token(stored: mx.Dtype, chunks: list[tuple[int, int]], k: mx.array, v: mx.array) -> float:
    """The output of the second of two tokens, computed in these chunks, with keys and values `stored`."""
    slot, q = empty_slot(dtype=stored), packed(1, 1)
    for start, stop in chunks:
        context = DenseContext([DenseSpan(slot, start, stop)], 1.0, None)
        out = context.attend(0, *(x[:, :, start:stop] for x in (q, k, v)))
    return float(out[0, 0, -1, 0].item())


@CHUNKS
@ROUNDING
def test_task_1_a_token_attends_to_its_own_key_as_stored(
    stored: mx.Dtype, chunks: list[tuple[int, int]]
) -> None:
    """Oracle: by hand: 2049 is stored as 2048, so both keys are equal: the mean of the values 0 and 1.

    Common mistake: attending to the unrounded key of a new token, which the next step no longer sees.
    """
    out = second_token(stored, chunks, k=packed(2048, 2049), v=packed(0, 1))
    assert out == pytest.approx(0.5, rel=1e-3), (
        f"the keys 2048 and 2049 are both stored as 2048 in {stored}, so both tokens count equally; "
        "use the keys that `update` returns, also for the tokens of this step"
    )


@CHUNKS
@ROUNDING
def test_task_1_a_token_attends_to_its_own_value_as_stored(
    stored: mx.Dtype, chunks: list[tuple[int, int]]
) -> None:
    """Oracle: by hand: 2049 is stored as 2048, and with equal keys the mean of 0 and 2048 is 1024."""
    out = second_token(stored, chunks, k=packed(0, 0), v=packed(0, 2049))
    assert out == pytest.approx(1024, abs=0.1), (
        f"the value 2049 is stored as 2048 in {stored}; "
        "use the values that `update` returns, also for the tokens of this step"
    )


@pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_task_1_the_output_has_the_type_of_the_query(dtype: mx.Dtype, stored: mx.Dtype) -> None:
    """Oracle: the docstring, for each type of the cache."""
    context = DenseContext([DenseSpan(empty_slot(dtype=stored), 0, 2)], 1.0, None)
    tokens = packed(1, 2).astype(dtype)
    assert context.attend(0, tokens, tokens, tokens).dtype == dtype


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16])
def test_task_1_the_query_is_not_rounded_to_the_type_of_the_cache(stored: mx.Dtype) -> None:
    """Oracle: NumPy in float64, on the keys and values as stored.

    Common mistake: converting the query to the type of the keys, and not the keys to that of the query.
    """
    rng = np.random.default_rng(32)
    q, k, v = (mx.array(rng.normal(size=(1, 2, 6, 8)), mx.float32) for _ in range(3))
    context = DenseContext([DenseSpan(empty_slot(kv_heads=2, size=8, dtype=stored), 0, 6)], 1.0, None)
    out = np.array(context.attend(0, q, k, v))
    keys, values = (np.array(x.astype(stored).astype(mx.float32)) for x in (k, v))
    np.testing.assert_allclose(
        out,
        causal_attention(np.array(q), keys, values, 1.0),
        rtol=1e-4,
        atol=1e-5,
        err_msg=f"convert the keys and values from {stored} to the query's type, not the query",
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 3)])
def test_task_1_prompts_chunks_and_decodes_in_one_step_match_numpy(heads: int, kv_heads: int) -> None:
    """Oracle: NumPy in float64 for each sequence separately; each of two layers has its own keys."""
    rng = np.random.default_rng(31)
    steps = [[(0, 0, 5), (1, 0, 2)], [(0, 5, 6), (1, 2, 6), (2, 0, 1)], [(2, 1, 4), (0, 6, 7), (1, 6, 7)]]
    lengths = [7, 7, 4]

    def layer_of(length: int) -> tuple[np.ndarray, ...]:
        shapes = [(count, length, 8) for count in (heads, kv_heads, kv_heads)]
        return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)

    sequences = [[layer_of(length) for _ in range(2)] for length in lengths]
    slots = [empty_slot(layers=2, kv_heads=kv_heads, size=8) for _ in sequences]
    found = [[np.zeros((heads, length, 8)) for _ in range(2)] for length in lengths]
    for spans in steps:
        context = DenseContext([DenseSpan(slots[i], start, stop) for i, start, stop in spans], 0.35, None)
        for layer in range(2):
            rows = [[x[:, start:stop] for x in sequences[i][layer]] for i, start, stop in spans]
            q, k, v = (mx.array(np.concatenate(parts, axis=1)[None]) for parts in zip(*rows, strict=True))
            out, row = np.array(context.attend(layer, q, k, v)), 0
            assert out.shape == (1, heads, sum(stop - start for _, start, stop in spans), 8)
            for i, start, stop in spans:
                found[i][layer][:, start:stop] = out[0, :, row : row + stop - start]
                row += stop - start
    for layers, outputs in zip(sequences, found, strict=True):
        for qkv, out in zip(layers, outputs, strict=True):
            np.testing.assert_allclose(out, causal_attention(*qkv, 0.35), rtol=1e-4, atol=1e-5)
