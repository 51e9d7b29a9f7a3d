"""Day 1.2: rotary position embeddings (RoPE).

When these tests pass, you have the frequencies of a head's pairs and the rotation that tells attention how
far apart two tokens are, in Hugging Face's layout.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.rope import inverse_frequencies, rope

from common.numpy_oracles import numpy_rope

# Task 1: inverse_frequencies


def test_task_1_a_head_dim_of_four_has_two_frequencies() -> None:
    """Oracle: by hand: 100 ** 0 and 100 ** (-2/4)."""
    np.testing.assert_allclose(np.array(inverse_frequencies(4, 100.0)), [1, 0.1], rtol=1e-5)


def test_task_1_the_first_frequency_is_one_radian_per_position() -> None:
    """Oracle: by hand: base ** 0 is 1 for every base. A head of 2 has only this pair."""
    np.testing.assert_allclose(np.array(inverse_frequencies(2, 10_000.0)), [1], rtol=1e-6)
    assert inverse_frequencies(64, 500_000.0)[0].item() == pytest.approx(1)


@pytest.mark.parametrize(("head_dim", "base"), [(6, 10.0), (8, 10_000.0), (64, 100_000.0), (128, 1e6)])
def test_task_1_frequencies_match_the_formula(head_dim: int, base: float) -> None:
    """Oracle: NumPy in float64. Common mistake: an exponent of i / D or of 4i / D."""
    expected = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    frequencies = inverse_frequencies(head_dim, base)
    assert frequencies.shape == (head_dim // 2,)
    np.testing.assert_allclose(np.array(frequencies), expected, rtol=1e-4)


def test_task_1_frequencies_are_float32() -> None:
    """Oracle: the docstring."""
    assert inverse_frequencies(8, 10_000.0).dtype == mx.float32


@pytest.mark.parametrize("head_dim", [1, 3, 65])
def test_task_1_an_odd_head_dim_is_rejected(head_dim: int) -> None:
    """Oracle: the docstring: ValueError: one value would have no partner."""
    with pytest.raises(ValueError):
        inverse_frequencies(head_dim, 10_000.0)


# Task 2: rope


def row(*values: float) -> mx.array:
    """One sequence, one head, one token: [1, 1, 1, D]."""
    return mx.array(values, mx.float32).reshape(1, 1, 1, -1)


def numpy_frequencies(head_dim: int, base: float) -> np.ndarray:
    """[D/2] float32."""
    return (base ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def test_task_2_an_angle_of_90_degrees_rotates_a_pair_by_a_quarter_turn() -> None:
    """Oracle: by hand: (1, 0) becomes (0, 1) and (0, 1) becomes (-1, 0).

    Turned the other way, the signs differ.
    """
    positions, frequencies = mx.array([1], mx.int32), mx.array([np.pi / 2], mx.float32)
    for before, after in [((1.0, 0.0), (0, 1)), ((0.0, 1.0), (-1, 0)), ((2.0, 3.0), (-3, 2))]:
        out = rope(row(*before), positions, frequencies)
        np.testing.assert_allclose(np.array(out).ravel(), after, rtol=1e-5, atol=1e-6)


def test_task_2_the_angle_is_position_times_frequency() -> None:
    """Oracle: by hand: three positions of 30 degrees are a quarter turn."""
    out = rope(row(1.0, 0.0), mx.array([3], mx.int32), mx.array([np.pi / 6], mx.float32))
    np.testing.assert_allclose(np.array(out).ravel(), [0, 1], rtol=1e-5, atol=1e-6)


def test_task_2_pair_i_consists_of_value_i_of_each_half_of_the_head() -> None:
    """Oracle: by hand: of (1, 2, 3, 4) the pair (1, 3) makes a quarter turn, and (2, 4) stays.

    Pairs of neighbours, the layout of `mx.fast.rope(traditional=True)`, would give (-2, 1, 3, 4).
    """
    out = rope(row(1.0, 2.0, 3.0, 4.0), mx.array([1], mx.int32), mx.array([np.pi / 2, 0.0], mx.float32))
    np.testing.assert_allclose(np.array(out).ravel(), [-3, 2, 1, 4], rtol=1e-5, atol=1e-6)


def test_task_2_position_zero_is_not_rotated() -> None:
    """Oracle: by hand: an angle of 0. Common mistake: positions that count from 1."""
    x = mx.random.normal((2, 3, 1, 8), key=mx.random.key(1))
    out = rope(x, mx.array([0], mx.int32), mx.array(numpy_frequencies(8, 10_000.0)))
    np.testing.assert_allclose(np.array(out), np.array(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "base"),
    [((1, 1, 1, 2), 10.0), ((1, 4, 4, 8), 10_000.0), ((2, 3, 5, 16), 10_000.0), ((3, 2, 33, 64), 100_000.0)],
)
@pytest.mark.parametrize("start", [0, 7, 500])
def test_task_2_consecutive_positions_match_mlx(shape: tuple[int, ...], base: float, start: int) -> None:
    """Oracle: mx.fast.rope. Several heads and sequences: positions belong to the axis L only."""
    x = mx.random.normal(shape, key=mx.random.key(2))
    positions = mx.arange(start, start + shape[2], dtype=mx.int32)
    out = rope(x, positions, mx.array(numpy_frequencies(shape[-1], base)))
    oracle = mx.fast.rope(x, shape[-1], traditional=False, base=base, scale=1.0, offset=start)
    assert out.shape == shape
    np.testing.assert_allclose(np.array(out), np.array(oracle), rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("positions", [[5], [3, 3, 3], [9, 0, 4], [100, 7, 0, 55, 55]])
def test_task_2_positions_may_come_in_any_order(positions: list[int]) -> None:
    """Oracle: NumPy in float64. Common mistake: counting positions from the first one."""
    x = np.random.default_rng(3).normal(size=(2, 3, len(positions), 8)).astype(np.float32)
    frequencies = numpy_frequencies(8, 100.0)
    out = rope(mx.array(x), mx.array(positions, mx.int32), mx.array(frequencies))
    expected = numpy_rope(x, np.array(positions), frequencies)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-4, atol=1e-4)


def test_task_2_rotation_uses_the_given_frequencies() -> None:
    """Oracle: NumPy in float64. Models with a longer context have frequencies that no base produces."""
    x = np.random.default_rng(4).normal(size=(1, 2, 4, 6)).astype(np.float32)
    frequencies = np.array([0.3, 1.7, 0.0], np.float32)
    out = rope(mx.array(x), mx.arange(4, dtype=mx.int32), mx.array(frequencies))
    np.testing.assert_allclose(np.array(out), numpy_rope(x, np.arange(4), frequencies), rtol=1e-4, atol=1e-5)


def test_task_2_rotation_keeps_the_norm_of_each_pair() -> None:
    """Oracle: the definition: a rotation does not change a length."""
    x = np.random.default_rng(5).normal(size=(1, 2, 6, 8)).astype(np.float32)
    out = np.array(rope(mx.array(x), mx.arange(6, dtype=mx.int32), mx.array(numpy_frequencies(8, 100.0))))
    lengths = [np.hypot(y[..., :4], y[..., 4:]) for y in (x, out)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-5, atol=1e-6)


def test_task_2_a_score_depends_only_on_the_distance_between_query_and_key() -> None:
    """Oracle: the definition: the same product at all positions that are 3 apart."""
    rng = np.random.default_rng(6)
    q, k = (mx.array(rng.normal(size=(1, 1, 1, 16)).astype(np.float32)) for _ in range(2))
    frequencies = mx.array(numpy_frequencies(16, 1_000.0))
    products = []
    for position in (0, 1, 20, 90):
        rotated_q = rope(q, mx.array([position + 3], mx.int32), frequencies)
        rotated_k = rope(k, mx.array([position], mx.int32), frequencies)
        products.append((rotated_q * rotated_k).sum().item())
    np.testing.assert_allclose(products, products[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_task_2_the_output_has_the_dtype_of_x(dtype: mx.Dtype) -> None:
    """Oracle: the docstring."""
    x = mx.random.normal((1, 2, 3, 8), key=mx.random.key(7)).astype(dtype)
    out = rope(x, mx.arange(3, dtype=mx.int32), mx.array(numpy_frequencies(8, 100.0)))
    assert out.dtype == dtype


def test_task_2_angles_are_float32_for_half_precision_values() -> None:
    """Oracle: NumPy in float64. float16 cannot hold 3001 or 5003, so angles would be off by whole radians."""
    x = np.random.default_rng(8).normal(size=(1, 2, 2, 8)).astype(np.float16)
    frequencies = numpy_frequencies(8, 100.0)
    out = rope(mx.array(x), mx.array([3001, 5003], mx.int32), mx.array(frequencies))
    expected = numpy_rope(x, np.array([3001, 5003]), frequencies)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), expected, rtol=1e-2, atol=1e-2)
