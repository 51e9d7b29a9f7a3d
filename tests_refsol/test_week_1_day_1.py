"""Day 1.1: attention, written in plain MLX.

When these tests pass, you have softmax, the causal mask and scaled dot-product attention: the plain version
against which the tests compare every faster one.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.attention import causal_mask, scaled_dot_product_attention, softmax

from common.numpy_oracles import numpy_attention, numpy_softmax
from common.toy_arrays import random_qkv

# Task 1: softmax


def test_task_1_softmax_divides_each_exponential_by_their_sum() -> None:
    """Oracle: by hand: exp of ln 1, ln 2 and ln 5 is 1, 2 and 5, which together are 8."""
    out = softmax(mx.array([np.log(1.0), np.log(2.0), np.log(5.0)]))
    np.testing.assert_allclose(np.array(out), [1 / 8, 2 / 8, 5 / 8], rtol=1e-5)


def test_task_1_softmax_of_one_value_is_one() -> None:
    """Oracle: the definition: x / x."""
    np.testing.assert_allclose(np.array(softmax(mx.array([[3.0], [-7.0]]))), [[1], [1]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (5, 5), (2, 3, 4), (2, 2, 3, 6)])
def test_task_1_softmax_runs_over_the_last_axis(shape: tuple[int, ...]) -> None:
    """Oracle: NumPy in float64. Common mistake: a sum over another axis or over all axes."""
    x = np.random.default_rng(1).normal(size=shape, scale=3.0).astype(np.float32)
    out = softmax(mx.array(x))
    assert out.shape == shape
    np.testing.assert_allclose(np.array(out), numpy_softmax(x), rtol=1e-5, atol=1e-7)


def test_task_1_softmax_rows_sum_to_one() -> None:
    """Oracle: the definition."""
    x = mx.random.normal((4, 3, 50), key=mx.random.key(2)) * 5
    np.testing.assert_allclose(np.array(softmax(x)).sum(axis=-1), np.ones((4, 3)), rtol=1e-5)


def test_task_1_softmax_does_not_change_when_a_constant_is_added() -> None:
    """Oracle: the definition: a constant that is added to a row cancels out."""
    x = np.random.default_rng(3).integers(-4, 5, size=(3, 6)).astype(np.float32)
    np.testing.assert_allclose(
        np.array(softmax(mx.array(x + 64))), np.array(softmax(mx.array(x))), rtol=1e-5, atol=1e-7
    )


def test_task_1_softmax_of_large_values_does_not_overflow() -> None:
    """Oracle: by hand: 1/3, 2/3. exp(1000) is inf in float32, and inf / inf is nan."""
    out = softmax(mx.array([[1000.0, 1000.0 + np.log(2.0)], [-1000.0, -1000.0 + np.log(2.0)]]))
    np.testing.assert_allclose(np.array(out), [[1 / 3, 2 / 3]] * 2, rtol=1e-3)


def test_task_1_softmax_of_a_row_does_not_depend_on_the_other_rows() -> None:
    """Oracle: by hand. Common mistake: one maximum for all rows instead of one per row."""
    out = softmax(mx.array([[0.0, 0.0], [1000.0, 1000.0]]))
    np.testing.assert_allclose(np.array(out), [[0.5, 0.5], [0.5, 0.5]], rtol=1e-3)


def test_task_1_softmax_of_minus_infinity_is_zero() -> None:
    """Oracle: by hand: exp(-inf) is exactly 0."""
    out = softmax(mx.array([-mx.inf, 1.0, -mx.inf, 1.0]))
    np.testing.assert_allclose(np.array(out), [0, 0.5, 0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 4.25, -300.0])
def test_task_1_softmax_of_a_row_with_one_finite_value_is_exact(value: float) -> None:
    """Oracle: the docstring: exactly 1 for the finite value, at any position, and exactly 0 elsewhere."""
    x = np.full((4, 4), -np.inf, np.float32)
    np.fill_diagonal(x, value)
    np.testing.assert_array_equal(np.array(softmax(mx.array(x))), np.eye(4))


def test_task_1_softmax_of_a_long_row_in_float16_sums_in_float32() -> None:
    """Oracle: by hand: 100,000 equal scores weigh 1/100,000 each, but in float16 their sum is infinite."""
    out = softmax(mx.ones((2, 100_000), mx.float16))
    np.testing.assert_allclose(np.array(out), np.full((2, 100_000), 1e-5), rtol=0.01)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_task_1_softmax_keeps_the_dtype(dtype: mx.Dtype) -> None:
    """Oracle: the docstring. Common mistake: a float32 sum that makes the weights float32 too."""
    assert softmax(mx.array([[1.0, 2.0]], dtype)).dtype == dtype


# Task 2: causal_mask


def test_task_2_causal_mask_hides_later_tokens() -> None:
    """Oracle: by hand. Multiplying a mask of zeros by -inf gives nan where 0 is expected."""
    x = -np.inf
    np.testing.assert_array_equal(np.array(causal_mask(3, 3)), [[0, x, x], [0, 0, x], [0, 0, 0]])


def test_task_2_the_rows_of_a_causal_mask_are_the_last_tokens() -> None:
    """Oracle: by hand. A mask that counts rows from the first token, not from the last, hides the past."""
    np.testing.assert_array_equal(np.array(causal_mask(2, 4)), [[0, 0, 0, -np.inf], [0, 0, 0, 0]])


def test_task_2_causal_mask_of_one_token_hides_nothing() -> None:
    """Oracle: by hand: the last token sees all before it and itself."""
    np.testing.assert_array_equal(np.array(causal_mask(1, 1)), [[0]])
    np.testing.assert_array_equal(np.array(causal_mask(1, 5)), [[0, 0, 0, 0, 0]])


@pytest.mark.parametrize(("length", "total"), [(2, 2), (1, 9), (4, 9), (8, 9), (9, 9), (3, 64)])
def test_task_2_causal_mask_matches_the_definition(length: int, total: int) -> None:
    """Oracle: the definition, entry by entry."""
    expected = np.full((length, total), -np.inf)
    for row in range(length):
        for column in range(total):
            if column <= total - length + row:
                expected[row, column] = 0
    np.testing.assert_array_equal(np.array(causal_mask(length, total)), expected)


def test_task_2_causal_mask_of_no_tokens_is_empty() -> None:
    """Oracle: the docstring: no rows, and no error."""
    assert causal_mask(0, 4).shape == (0, 4)
    assert causal_mask(0, 0).shape == (0, 0)


@pytest.mark.parametrize(("length", "total"), [(-1, 3), (4, 3), (1, 0)])
def test_task_2_causal_mask_rejects_a_length_outside_zero_to_total(length: int, total: int) -> None:
    """Oracle: the docstring: ValueError for a length below 0 or above total."""
    with pytest.raises(ValueError):
        causal_mask(length, total)


# Task 3: scaled_dot_product_attention


def test_task_3_equal_keys_give_the_mean_of_the_values() -> None:
    """Oracle: by hand: all scores are 0, so the weights are 1/3 each."""
    q, k = mx.array([[1.0, -1.0]]), mx.zeros((3, 2))
    v = mx.array([[1.0, 0.0], [2.0, 6.0], [6.0, 3.0]])
    out = scaled_dot_product_attention(q, k, v, 1.0)
    np.testing.assert_allclose(np.array(out), [[3, 3]], rtol=1e-6)


def test_task_3_a_key_with_a_higher_score_gets_more_weight() -> None:
    """Oracle: by hand: scores 0 and ln 3 give the weights 1/4 and 3/4."""
    q, k, v = mx.array([[1.0]]), mx.array([[0.0], [np.log(3.0)]]), mx.array([[4.0], [8.0]])
    np.testing.assert_allclose(np.array(scaled_dot_product_attention(q, k, v, 1.0)), [[7]], rtol=1e-5)


def test_task_3_scores_are_multiplied_by_the_scale() -> None:
    """Oracle: by hand: 4 ln 3 times 0.25 is ln 3. Common mistake: 1 / sqrt(D) instead of `scale`."""
    q, k = mx.array([[2.0, 0.0]]), mx.array([[0.0, 0.0], [2 * np.log(3.0), 0.0]])
    v = mx.array([[4.0, 0.0], [8.0, 0.0]])
    np.testing.assert_allclose(np.array(scaled_dot_product_attention(q, k, v, 0.25)), [[7, 0]], rtol=1e-5)


def test_task_3_the_mask_is_added_and_not_scaled() -> None:
    """Oracle: by hand: scores 0 and 0, plus 0 and ln 3. A mask that is scaled too gives about 6.5."""
    q, k, v = mx.zeros((1, 2)), mx.ones((2, 2)), mx.array([[4.0, 0.0], [8.0, 0.0]])
    out = scaled_dot_product_attention(q, k, v, 0.5, mx.array([[0.0, np.log(3.0)]]))
    np.testing.assert_allclose(np.array(out), [[7, 0]], rtol=1e-5)


def test_task_3_one_key_gives_its_value() -> None:
    """Oracle: by hand: the weight of a single key is 1, whatever its score."""
    q, k, v = (mx.array(x) for x in random_qkv(4, (2, 3, 4), (2, 1, 4)))
    out = scaled_dot_product_attention(q, k, v, 0.5)
    np.testing.assert_allclose(np.array(out), np.repeat(np.array(v), 3, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("leading", "length", "total", "size"),
    [
        ((), 3, 3, 4),
        ((), 1, 6, 4),
        ((2,), 5, 5, 8),
        ((2, 3), 4, 7, 8),
        ((2, 3, 2), 2, 5, 16),
        ((1, 1), 9, 2, 2),
    ],
)
def test_task_3_the_output_has_one_row_for_each_query(
    leading: tuple[int, ...], length: int, total: int, size: int
) -> None:
    """Oracle: NumPy in float64. Common mistake: a softmax over the queries instead of the keys."""
    q, k, v = random_qkv(5, (*leading, length, size), (*leading, total, size))
    out = scaled_dot_product_attention(mx.array(q), mx.array(k), mx.array(v), size**-0.5)
    assert out.shape == (*leading, length, size)
    np.testing.assert_allclose(np.array(out), numpy_attention(q, k, v, size**-0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_shape", [(4, 6), (1, 6), (2, 3, 4, 6), (2, 1, 4, 6), (1, 3, 1, 6)])
def test_task_3_the_mask_broadcasts(mask_shape: tuple[int, ...]) -> None:
    """Oracle: NumPy in float64, with masks for all heads, for each head, and for each sequence."""
    q, k, v = random_qkv(6, (2, 3, 4, 8), (2, 3, 6, 8))
    mask = np.random.default_rng(7).normal(size=mask_shape).astype(np.float32)
    mask[..., 1] = -np.inf
    out = scaled_dot_product_attention(mx.array(q), mx.array(k), mx.array(v), 0.3, mx.array(mask))
    np.testing.assert_allclose(np.array(out), numpy_attention(q, k, v, 0.3, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "total"), [(6, 6), (1, 6), (2, 6)])
def test_task_3_causal_attention_matches_mlx(length: int, total: int) -> None:
    """Oracle: mx.fast.scaled_dot_product_attention; its causal mask is also aligned to the last token."""
    q, k, v = (mx.array(x) for x in random_qkv(8, (2, 4, length, 16), (2, 4, total, 16)))
    positions = np.arange(total - length, total)[:, None]
    mask = mx.array(np.where(np.arange(total) <= positions, 0, -np.inf).astype(np.float32))
    out = scaled_dot_product_attention(q, k, v, 0.25, mask)
    oracle = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
    np.testing.assert_allclose(np.array(out), np.array(oracle), rtol=1e-4, atol=1e-5)


def test_task_3_a_masked_token_does_not_affect_the_output() -> None:
    """Oracle: the same attention without the token. A mask that is added after softmax does not hide it."""
    q, k, v = random_qkv(9, (2, 3, 4), (2, 5, 4))
    mask = np.zeros((3, 5), np.float32)
    mask[:, 4] = -np.inf
    out = scaled_dot_product_attention(mx.array(q), mx.array(k), mx.array(v), 0.5, mx.array(mask))
    np.testing.assert_allclose(
        np.array(out), numpy_attention(q, k[:, :4], v[:, :4], 0.5), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_task_3_the_output_dtype_follows_mlx_promotion(dtype: mx.Dtype) -> None:
    """Oracle: MLX's promotion: 16 bits stay; with a float32 mask the result is float32."""
    q, k = mx.array([[1.0, -1.0]], dtype), mx.zeros((2, 2), dtype)
    v = mx.array([[2.0, 0.0], [4.0, 6.0]], dtype)
    plain = scaled_dot_product_attention(q, k, v, 1.0)
    masked = scaled_dot_product_attention(q, k, v, 1.0, mx.zeros((1, 2)))
    assert (plain.dtype, masked.dtype) == (dtype, mx.float32)
    assert plain.tolist() == masked.tolist() == [[3.0, 3.0]]
