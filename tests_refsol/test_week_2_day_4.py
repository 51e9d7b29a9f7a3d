"""Day 2.4: weights in a few bits, with a scale and a bias for each group of values.

When these tests pass, you can write and read MLX's quantized layout, bit by bit, and multiply with a matrix
that takes a third of the bytes: 5 bits per value with 4-bit codes, groups of 32 and float16 scales.
"""

import time

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.kernels import compiled_kernel
from tiny_llm.quantize import dequantize, pack_bits, quantize, quantized_matmul, unpack_bits

from tiny_llm_checkpoints.quantized import Quantized

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def float64(x: mx.array) -> np.ndarray:
    """The same numbers as NumPy float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def random_matrix(rows: int, columns: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Normally distributed weights [rows, columns]."""
    noise = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    return mx.array(noise).astype(dtype)


def codes_of(words: mx.array, bits: int) -> np.ndarray:
    """The whole numbers in words [N, K * bits / 32] -> [N, K]: each row read as one long integer."""
    rows = []
    for row in words.tolist():
        stream = sum(word << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) % 2**bits for i in range(32 * len(row) // bits)])
    return np.array(rows)


def values_of(words: mx.array, scales: mx.array, biases: mx.array, bits: int) -> np.ndarray:
    """scale * q + bias for every number of a quantized matrix, in float64."""
    codes = codes_of(words, bits)
    group_size = codes.shape[1] // scales.shape[1]
    return codes * np.repeat(float64(scales), group_size, axis=1) + np.repeat(
        float64(biases), group_size, axis=1
    )


# Task 1: pack_bits


def test_task_1_the_first_number_is_in_the_lowest_bits() -> None:
    """Oracle: by hand: 4 bits per number, so one hexadecimal digit each, read from the right."""
    got = pack_bits(mx.array([list(range(16))], mx.uint32), 4)
    assert got.dtype == mx.uint32
    assert [hex(word) for word in got.tolist()[0]] == ["0x76543210", "0xfedcba98"]


def test_task_1_a_number_of_3_bits_may_cross_two_words() -> None:
    """Oracle: by hand: two bits of the eleventh number (6) are in the first word, one is in the second."""
    got = pack_bits(mx.array([[0] * 10 + [6] + [0] * 20 + [7]], mx.uint32), 3)
    assert [hex(word) for word in got.tolist()[0]] == [hex(0b10 << 30), hex(0b1), hex(0b111 << 29)]


def test_task_1_every_row_starts_a_new_bit_stream() -> None:
    """Oracle: by hand: rows of 16 numbers of 2 bits are one word each."""
    rows = [[1] * 16, [0] * 15 + [3], [3] * 16]
    got = pack_bits(mx.array(rows, mx.uint32), 2)
    assert got.tolist() == [[0x55555555], [0xC0000000], [0xFFFFFFFF]]


@pytest.mark.parametrize("bits", BITS)
def test_task_1_a_row_is_one_stream_of_bits(bits: int) -> None:
    """Oracle: each row as one long Python integer."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, size=(5, 256))
    got = pack_bits(mx.array(codes.astype(np.uint32)), bits)
    assert (got.dtype, got.shape) == (mx.uint32, (5, 256 * bits // 32))
    for row, words in zip(codes.tolist(), got.tolist(), strict=True):
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        assert words == [(stream >> (32 * i)) % 2**32 for i in range(256 * bits // 32)]


# Task 2: unpack_bits


def test_task_2_the_first_number_is_read_from_the_lowest_bits() -> None:
    """Oracle: by hand, 4 bits per number."""
    got = unpack_bits(mx.array([[0x76543210, 0xFEDCBA98]], mx.uint32), 4)
    assert got.dtype == mx.uint32
    assert got.tolist() == [list(range(16))]


def test_task_2_a_number_of_3_bits_may_cross_two_words() -> None:
    """Oracle: by hand: the eleventh number is bits 30 to 32: two in the first word, one in the second."""
    got = unpack_bits(mx.array([[0b11 << 30, 0b1, 0b101 << 29]], mx.uint32), 3)
    assert got.tolist() == [[*[0] * 10, 7, *[0] * 20, 5]]


@pytest.mark.parametrize("bits", BITS)
def test_task_2_random_words_are_unpacked_correctly(bits: int) -> None:
    """Oracle: each row as one long Python integer, for random bits; 3, 5 and 6 cross words."""
    words = mx.array(np.random.default_rng(8).integers(0, 2**32, size=(4, 2 * bits), dtype=np.uint32))
    assert unpack_bits(words, bits).tolist() == codes_of(words, bits).tolist()


@pytest.mark.parametrize("bits", BITS)
def test_task_2_unpacking_reverses_packing(bits: int) -> None:
    """Oracle: the packed numbers, including the largest."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, size=(3, 64)).astype(np.uint32)
    codes[:, -1] = 2**bits - 1
    assert unpack_bits(pack_bits(mx.array(codes), bits), bits).tolist() == codes.tolist()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_task_2_words_may_have_any_leading_axes(shape: tuple[int, ...]) -> None:
    """Oracle: the same words as rows of one matrix. An embedding looks up rows for [B, L] tokens."""
    words = np.random.default_rng(9).integers(0, 2**32, size=(*shape, 5), dtype=np.uint32)
    got = unpack_bits(mx.array(words), 5)
    assert got.shape == (*shape, 32)
    assert np.array(got).reshape(-1, 32).tolist() == codes_of(mx.array(words.reshape(-1, 5)), 5).tolist()


# Task 3: quantize


def test_task_3_whole_numbers_from_0_to_15_are_their_own_codes() -> None:
    """Oracle: by hand: scale 1, bias 0, and the first value in the lowest 4 bits of the first word."""
    w = mx.array([list(range(16)) * 2], mx.float32)
    got = quantize(w, group_size=32, bits=4)
    np.testing.assert_allclose(np.array(got.scales), [[1]], rtol=1e-6)
    np.testing.assert_allclose(np.array(got.biases), [[0]], rtol=1e-6)
    assert got.weight.dtype == mx.uint32
    assert [hex(word) for word in got.weight.tolist()[0]] == ["0x76543210", "0xfedcba98"] * 2
    assert (got.group_size, got.bits) == (32, 4)


def test_task_3_the_bias_is_the_smallest_value_of_the_group() -> None:
    """Oracle: by hand: from -3 to 4.5 in 15 steps of a half."""
    w = mx.array([[-3 + i / 2 for i in range(16)] * 2], mx.float32)
    got = quantize(w, group_size=32, bits=4)
    np.testing.assert_allclose(np.array(got.scales), [[0.5]], rtol=1e-6)
    np.testing.assert_allclose(np.array(got.biases), [[-3]], rtol=1e-6)
    assert codes_of(got.weight, 4).tolist() == [list(range(16)) * 2]


def test_task_3_groups_are_consecutive_values_of_a_row() -> None:
    """Oracle: by hand: two rows of two groups, each with its own range."""
    steps = mx.arange(32, dtype=mx.float32) % 4
    w = mx.stack([mx.concatenate([steps, 10 * steps]), mx.concatenate([2 * steps - 1, -steps])])
    got = quantize(w, group_size=32, bits=2)
    np.testing.assert_allclose(np.array(got.scales), [[1, 10], [2, 1]], rtol=1e-6)
    np.testing.assert_allclose(np.array(got.biases), [[0, 0], [-1, -3]], rtol=1e-6)
    rising, falling = [0, 1, 2, 3] * 8, [3, 2, 1, 0] * 8
    assert codes_of(got.weight, 2).tolist() == [rising + rising, rising + falling]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_task_3_the_rounding_error_is_at_most_half_a_step(bits: int, group_size: int) -> None:
    """Oracle: `mx.dequantize`. Truncating instead of rounding is off by up to a whole step."""
    w = random_matrix(8, 256, seed=1)
    got = quantize(w, group_size, bits)
    back = mx.dequantize(got.weight, got.scales, got.biases, group_size=group_size, bits=bits)
    error = np.abs(float64(back) - float64(w)).reshape(8, -1, group_size)
    step = float64(got.scales)[..., None]
    assert (error <= step / 2 + 1e-5 * (1 + step)).all()
    assert error.max() > 0.4 * step.max(), "the largest error must be near half a step: the values are random"


@pytest.mark.parametrize("bits", BITS)
def test_task_3_smallest_and_largest_value_get_the_first_and_the_last_code(bits: int) -> None:
    """Oracle: NumPy: scale = (largest - smallest) / (2^bits - 1). Common mistake: dividing by 2^bits."""
    w = random_matrix(6, 128, seed=2)
    got = quantize(w, 64, bits)
    groups = float64(w).reshape(6, 2, 64)
    least, greatest = groups.min(axis=-1), groups.max(axis=-1)
    np.testing.assert_allclose(float64(got.biases), least, rtol=1e-6)
    np.testing.assert_allclose(float64(got.scales), (greatest - least) / (2**bits - 1), rtol=1e-5)
    codes = codes_of(got.weight, bits).reshape(6, 2, 64)
    assert (np.take_along_axis(codes, groups.argmin(axis=-1)[..., None], axis=-1) == 0).all()
    assert (np.take_along_axis(codes, groups.argmax(axis=-1)[..., None], axis=-1) == 2**bits - 1).all()


def check_nearest(w: mx.array, got: Quantized) -> None:
    """Assert that every value has its nearest code, by trying all codes in float64."""
    groups = float64(w).reshape(*got.scales.shape, got.group_size, 1)
    scales, biases = (float64(x)[..., None, None] for x in (got.scales, got.biases))
    distances = np.abs(scales * np.arange(2**got.bits) + biases - groups)
    codes, best = codes_of(got.weight, got.bits).reshape(groups.shape), distances.argmin(axis=-1)
    error = np.take_along_axis(distances, codes, axis=-1)[..., 0]
    least = distances.min(axis=-1)
    for row, group, i in np.argwhere(error > least * 1.001 + 1e-6)[:1]:
        pytest.fail(
            f"row {row}, group {group}, value {i} of it: {groups[row, group, i, 0]:.9g} is stored as q = "
            f"{codes[row, group, i, 0]}, an error of {error[row, group, i]:.3g}; q = {best[row, group, i]} "
            f"has an error of {least[row, group, i]:.3g}. "
            f"Stored scale {scales[row, group, 0, 0]:.9g}, bias {biases[row, group, 0, 0]:.9g}"
        )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_task_3_each_value_gets_its_nearest_code(bits: int, dtype: mx.Dtype) -> None:
    """Oracle: all the codes, tried in float64, with the scale and the bias as they are stored.

    Common mistakes: rounding with the scale before it is stored in its dtype, rounding in 16 bits.
    """
    w = random_matrix(24, 128, seed=3, dtype=dtype)
    got = quantize(w, 32, bits)
    assert got.scales.dtype == got.biases.dtype == dtype
    check_nearest(w, got)


def test_task_3_codes_are_clipped_to_the_largest_code() -> None:
    """Oracle: all the codes, tried in float64.

    A step of 1.4 times float16's smallest number is stored as 1 times it, so the largest values are more than
    255 steps above the smallest. A code that is truncated to 8 bits would wrap around to 0.
    """
    w = mx.array([[round(i * 255 * 1.4 / 31) for i in range(32)]], mx.float32) * 2.0**-24
    w = w.astype(mx.float16)
    got = quantize(w, 32, 8)
    # Multiply both sides by a power of two: no code changes, and the numbers are far above the tolerance.
    check_nearest(w * 2.0**10, got._replace(scales=got.scales * 2.0**10, biases=got.biases * 2.0**10))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_task_3_a_group_of_equal_values_is_exact(bits: int) -> None:
    """Oracle: the docstring: the range is 0, and the value is restored exactly."""
    w = mx.concatenate([mx.full((1, 32), value) for value in (0.0, 3.7, -2.25, 1e-3)], axis=1)
    got = quantize(w, 32, bits)
    back = mx.dequantize(got.weight, got.scales, got.biases, group_size=32, bits=bits)
    assert mx.array_equal(back, w)
    assert got.scales.tolist() == [[1] * 4], "a scale of 0 must be stored as 1"


@pytest.mark.parametrize("bits", BITS)
def test_task_3_a_scale_that_rounds_to_0_is_stored_as_1(bits: int) -> None:
    """Oracle: by hand: float16's smallest number divided by 2^bits - 1 rounds to 0.

    Common mistake: replacing a scale of 0 before it is rounded to 16 bits.
    """
    nearly_equal = [(i % 2) * 2.0**-24 for i in range(32)]
    got = quantize(mx.array([nearly_equal + [0.5] * 32]).astype(mx.float16), 32, bits)
    assert got.scales.tolist() == [[1, 1]], "no scale may be 0"
    assert codes_of(got.weight, bits).max() == 0, "the code of 2^-24 must be 0: it is nearer to 0 than to 1"


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_task_3_mlx_can_multiply_with_the_result(bits: int, group_size: int) -> None:
    """Oracle: NumPy in float64, on the dequantized values."""
    got = quantize(random_matrix(7, 256, seed=4), group_size, bits)
    x = random_matrix(3, 256, seed=5)
    y = mx.quantized_matmul(
        x, got.weight, got.scales, got.biases, transpose=True, group_size=group_size, bits=bits
    )
    want = float64(x) @ values_of(got.weight, got.scales, got.biases, bits).T
    np.testing.assert_allclose(np.array(y), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("bits", "group_size", "bits_per_value"),
    [(4, 32, 5), (4, 64, 4.5), (8, 32, 9), (2, 128, 2.25), (3, 64, 3.5)],
)
def test_task_3_scale_and_bias_add_32_bits_per_group(
    bits: int, group_size: int, bits_per_value: float
) -> None:
    """Oracle: by hand: a group of 32 shares a 16-bit scale and a 16-bit bias: 4 + 32 / 32 = 5 bits."""
    w = random_matrix(16, 256, seed=6, dtype=mx.float16)
    got = quantize(w, group_size, bits)
    nbytes = got.weight.nbytes + got.scales.nbytes + got.biases.nbytes
    assert 8 * nbytes / w.size == bits_per_value


# Task 4: dequantize


def test_task_4_the_first_value_is_read_from_the_lowest_bits() -> None:
    """Oracle: by hand: 4 bits per value, scale 1, bias 0."""
    words = mx.array([[0x76543210, 0xFEDCBA98, 0, 0x0000000F]], mx.uint32)
    got = dequantize(words, mx.array([[1.0]]), mx.array([[0.0]]), 32, 4)
    assert got.tolist() == [[*range(16), *[0] * 8, 15, *[0] * 7]]


def test_task_4_a_value_is_scale_times_code_plus_bias() -> None:
    """Oracle: by hand: codes 3, 2, 1 and 0; scale 0.5 and bias -1 in one group, 2 and 10 in the next."""
    words = mx.array([[0b00_01_10_11, 0, 0b00_01_10_11, 0]], mx.uint32)
    got = dequantize(words, mx.array([[0.5, 2.0]]), mx.array([[-1.0, 10.0]]), 32, 2)
    assert got.tolist() == [[0.5, 0, -0.5, *[-1] * 29, 16, 14, 12, *[10] * 29]]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_task_4_values_match_mlx(bits: int, group_size: int) -> None:
    """Oracle: `mx.dequantize` on the same arrays."""
    arrays = mx.quantize(random_matrix(6, 256, seed=7), group_size=group_size, bits=bits)
    want = mx.dequantize(*arrays, group_size=group_size, bits=bits)
    got = dequantize(*arrays, group_size, bits)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_task_4_random_words_are_dequantized_correctly(bits: int) -> None:
    """Oracle: each row as one long Python integer, for random bits; 3, 5 and 6 cross words."""
    rng = np.random.default_rng(8)
    words = mx.array(rng.integers(0, 2**32, size=(4, 2 * bits), dtype=np.uint32))
    scales, biases = (mx.array(rng.normal(size=(4, 2)).astype(np.float32)) for _ in range(2))
    got = dequantize(words, scales, biases, 32, bits)
    np.testing.assert_allclose(np.array(got), values_of(words, scales, biases, bits), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [3, 8])
def test_task_4_the_result_is_computed_in_float32(bits: int, dtype: mx.Dtype) -> None:
    """Oracle: float64 on the scales and biases as they are stored, in 16 bits.

    Common mistake: multiplying in 16 bits and converting afterwards.
    """
    words, scales, biases = mx.quantize(random_matrix(5, 128, seed=9, dtype=dtype), group_size=64, bits=bits)
    got = dequantize(words, scales, biases, 64, bits)
    assert got.dtype == mx.float32
    np.testing.assert_allclose(np.array(got), values_of(words, scales, biases, bits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("index", [3, [2, 0, 2], [[1, 4, 0], [3, 3, 2]]])
def test_task_4_looked_up_rows_are_dequantized_correctly(index: int | list, bits: int) -> None:
    """Oracle: `mx.dequantize` of the whole matrix, looked up afterwards."""
    words, scales, biases = mx.quantize(random_matrix(5, 64, seed=10), group_size=32, bits=bits)
    rows = mx.array(index)
    got = dequantize(words[rows], scales[rows], biases[rows], 32, bits)
    want = np.array(mx.dequantize(words, scales, biases, group_size=32, bits=bits))[np.array(index)]
    assert got.shape == want.shape
    np.testing.assert_allclose(np.array(got), want, rtol=1e-5, atol=1e-5)


# Task 5: quantized_matmul


def test_task_5_a_one_hot_row_picks_a_column() -> None:
    """Oracle: by hand: codes 0 to 15 twice, and 15 to 0 twice; scales 1 and 2, biases 0 and -30."""
    rising, falling = [0x76543210, 0xFEDCBA98] * 2, [0x89ABCDEF, 0x01234567] * 2
    words = mx.array([rising, falling], mx.uint32)
    scales, biases = mx.array([[1.0], [2.0]]), mx.array([[0.0], [-30.0]])
    x = (mx.arange(32) == mx.array([[0], [3], [31]])).astype(mx.float32)
    got = quantized_matmul(x, words, scales, biases, 32, 4)
    np.testing.assert_allclose(np.array(got), [[0, 0], [3, -6], [15, -30]], atol=1e-5)


def test_task_5_a_row_of_ones_sums_the_values() -> None:
    """Oracle: by hand: twice 0 + 1 + ... + 15 is 240; 240 / 2 plus 32 biases of 2 is 184."""
    words = mx.array([[0x76543210, 0xFEDCBA98] * 2] * 3, mx.uint32)
    scales, biases = mx.array([[1.0], [0.5], [0.0]]), mx.array([[0.0], [2.0], [1.0]])
    got = quantized_matmul(mx.ones((1, 32)), words, scales, biases, 32, 4)
    np.testing.assert_allclose(np.array(got), [[240, 184, 32]], rtol=1e-6)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_task_5_the_product_matches_numpy_on_dequantized_values(bits: int, group_size: int) -> None:
    """Oracle: NumPy in float64, on the values that `mx.dequantize` gives."""
    arrays = mx.quantize(random_matrix(9, 256, seed=11), group_size=group_size, bits=bits)
    x = random_matrix(4, 256, seed=12)
    want = float64(x) @ float64(mx.dequantize(*arrays, group_size=group_size, bits=bits)).T
    got = quantized_matmul(x, *arrays, group_size, bits)
    np.testing.assert_allclose(np.array(got), want, rtol=1e-4, atol=1e-3)


def test_task_5_a_square_matrix_is_transposed_too() -> None:
    """Oracle: NumPy in float64. Without the transpose the shapes still fit, but the numbers differ."""
    arrays = mx.quantize(random_matrix(64, 64, seed=13), group_size=32, bits=4)
    x = random_matrix(2, 64, seed=14)
    want = float64(x) @ float64(mx.dequantize(*arrays, group_size=32, bits=4)).T
    np.testing.assert_allclose(np.array(quantized_matmul(x, *arrays, 32, 4)), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)])
def test_task_5_x_may_have_any_leading_axes(shape: tuple[int, ...]) -> None:
    """Oracle: NumPy in float64."""
    arrays = mx.quantize(random_matrix(6, 64, seed=15), group_size=32, bits=4)
    x = np.random.default_rng(16).normal(size=(*shape, 64)).astype(np.float32)
    got = quantized_matmul(mx.array(x), *arrays, 32, 4)
    assert got.shape == (*shape, 6)
    want = x.astype(np.float64) @ float64(mx.dequantize(*arrays, group_size=32, bits=4)).T
    np.testing.assert_allclose(np.array(got), want, rtol=1e-4, atol=1e-3)


def test_task_5_scales_and_biases_may_have_16_bits() -> None:
    """Oracle: NumPy in float64, on the scales and biases as they are stored."""
    arrays = mx.quantize(random_matrix(6, 128, seed=17, dtype=mx.float16), group_size=32, bits=4)
    x = random_matrix(3, 128, seed=18)
    want = float64(x) @ values_of(*arrays, bits=4).T
    got = quantized_matmul(x, *arrays, 32, 4)
    assert got.dtype == mx.float32
    np.testing.assert_allclose(np.array(got), want, rtol=1e-4, atol=1e-3)


def test_task_5_the_product_matches_mlx() -> None:
    """Oracle: `mx.quantized_matmul`, which never unpacks the matrix."""
    arrays = mx.quantize(random_matrix(48, 256, seed=19), group_size=64, bits=6)
    x = random_matrix(5, 256, seed=20)
    want = mx.quantized_matmul(x, *arrays, transpose=True, group_size=64, bits=6)
    got = quantized_matmul(x, *arrays, 64, 6)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-3)


# Task 6, optional: quantized_matmul.cpp. Without the learner's file, the reference's kernel is tested.


def multiply(x: mx.array, stored: Quantized, activation_bits: int = 16) -> np.ndarray:
    """x times the transpose of a packed matrix, by the compiled kernel."""
    kernel = compiled_kernel("quantized_matmul")
    packed = compiled_kernel("pack")(*stored[:3], group_size=stored.group_size, bits=stored.bits)
    bits = compiled_kernel("packed_bits")(stored.bits)
    return np.array(kernel(x, packed, stored.weight.shape[0], bits=bits, activation_bits=activation_bits))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 1, 32), (3, 17, 96), (50, 40, 256), (100, 16, 64)]
)
def test_task_6_the_kernel_is_close_to_the_float64_product(
    rows: int, outputs: int, inputs: int, dtype: mx.Dtype, bits: int
) -> None:
    """Oracle: NumPy in float64 on the stored numbers; activations are rounded to 16 bits.

    17 and 40 outputs end in a partial tile, 50 rows end in a partial block, and 256 inputs are 8 groups.
    """
    stored = Quantized(
        *mx.quantize(random_matrix(outputs, inputs, seed=21, dtype=dtype), group_size=32, bits=bits), 32, bits
    )
    x = random_matrix(rows, inputs, seed=22)
    want = float64(x) @ values_of(*stored[:3], bits=bits).T
    np.testing.assert_allclose(multiply(x, stored), want, rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bits", [4, 8])
def test_task_6_the_kernel_with_8_bit_activations_is_within_2_percent(bits: int) -> None:
    """Oracle: NumPy in float64; rounding each x to one of 255 steps costs about 1%."""
    stored = Quantized(*mx.quantize(random_matrix(40, 256, seed=25), group_size=32, bits=bits), 32, bits)
    x = random_matrix(50, 256, seed=26)
    want = float64(x) @ values_of(*stored[:3], bits=bits).T
    got = multiply(x, stored, activation_bits=8)
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.usefixtures("compiled")
def test_task_6_a_row_is_bit_identical_with_and_without_other_rows() -> None:
    """Oracle: each row computed separately.

    Common mistake: a summation order that depends on the number of rows.
    """
    stored = Quantized(*mx.quantize(random_matrix(40, 576, seed=23), group_size=32, bits=4), 32, 4)
    x = random_matrix(60, 576, seed=24)
    together = multiply(x, stored)
    for row in (0, 1, 47, 48, 59):
        assert np.array_equal(multiply(x[row : row + 1], stored)[0], together[row])


@pytest.mark.usefixtures("compiled")
def test_task_6_the_kernel_is_exact_for_zeros_and_does_not_overflow() -> None:
    """Oracle: by hand: zeros give 0; 32 products of the largest 16-bit and 8-bit numbers do not overflow."""
    ones = Quantized(
        mx.full((16, 8), 0xFFFFFFFF, mx.uint32), mx.ones((16, 1)), mx.zeros((16, 1)), group_size=32, bits=8
    )
    assert np.array_equal(multiply(mx.zeros((2, 32)), ones), np.zeros((2, 16)))
    np.testing.assert_allclose(
        multiply(mx.full((1, 32), 3.0), ones), np.full((1, 16), 3.0 * 255 * 32), rtol=1e-4
    )


def stored_codes(codes: np.ndarray, scales: np.ndarray, bits: int, dtype: mx.Dtype) -> Quantized:
    """A matrix with these codes [N, K] and scales [N, K / 32]; all biases are 0."""
    per_word = 32 // bits
    words = codes.reshape(len(codes), -1, per_word).astype(np.uint32) << (bits * np.arange(per_word))
    weight = mx.array(words.sum(axis=-1).astype(np.uint32))
    stored_scales = mx.array(scales.astype(np.float32)).astype(dtype)
    return Quantized(weight, stored_scales, mx.zeros(scales.shape, dtype), 32, bits)


def added(groups: np.ndarray, order: list[int]) -> np.ndarray:
    """The groups' floats [..., G] added one by one in float32, in this order."""
    total = np.zeros(groups.shape[:-1], np.float32)
    for group in order:
        total = total + groups[..., group].astype(np.float32)
    return total


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
def test_task_6_groups_are_added_in_order_group_0_first(
    dtype: mx.Dtype, bits: int, activation_bits: int
) -> None:
    """Oracle: NumPy in float32. Scales are powers of two, so the groups' floats are exact; sums are rounded.

    Common mistakes: another order, two sums that are added at the end, a sum in float64.
    """
    rows, outputs, groups = 50, 40, 24
    rng = np.random.default_rng(27)
    largest = 2 ** (activation_bits - 1) - 1
    codes = rng.integers(0, 2**bits, size=(outputs, groups, 32))
    inputs = rng.integers(-min(largest, 1000), min(largest, 1000) + 1, size=(rows, groups, 32))
    inputs[:, :, 7] = largest  # so the scale of a row's group is exactly `steps`
    scales = 2.0 ** rng.integers(-5, 6, size=(outputs, groups))
    steps = 2.0 ** rng.integers(-5, 6, size=(rows, groups))
    exact = np.einsum("rgk,ogk->rog", inputs, codes) * steps[:, None, :] * scales[None, :, :]
    want = added(exact, list(range(groups)))
    from_the_end = added(exact, list(range(groups))[::-1])
    two_sums = added(exact, list(range(0, groups, 2))) + added(exact, list(range(1, groups, 2)))
    for other in (from_the_end, two_sums, exact.sum(axis=-1).astype(np.float32)):
        assert np.mean(other != want) > 0.1, "the numbers must tell the orders apart"
    x = mx.array((inputs * steps[:, :, None]).reshape(rows, -1).astype(np.float32))
    stored = stored_codes(codes.reshape(outputs, -1), scales, bits, dtype)
    got = multiply(x, stored, activation_bits)
    for row, output in np.argwhere(got != want)[:1]:
        pytest.fail(
            f"row {row}, output {output} is {got[row, output]:.9g}, not {want[row, output]:.9g}, the sum of "
            f"the groups' floats in float32, group 0 first; from the last group to the first it would be "
            f"{from_the_end[row, output]:.9g}"
        )


@pytest.mark.usefixtures("compiled")
def test_task_6_sums_within_a_group_are_exact_above_2_to_the_24() -> None:
    """Oracle: NumPy in int64, rounded once. Common mistake: adding the products of a group in float32."""
    rng = np.random.default_rng(28)
    codes, inputs = rng.integers(128, 256, size=(40, 32)), rng.integers(16384, 32768, size=(50, 32))
    inputs[:, 7] = 32767  # so the scale of a row is exactly 1
    products = inputs[:, None, :] * codes[None, :, :]
    want = products.sum(axis=-1).astype(np.float32)
    in_floats = added(products, list(range(32)))
    assert np.mean(in_floats != want) > 0.1, "the numbers must tell integers and floats apart"
    got = multiply(mx.array(inputs.astype(np.float32)), stored_codes(codes, np.ones((40, 1)), 8, mx.float32))
    for row, output in np.argwhere(got != want)[:1]:
        total = products[row, output].sum()
        pytest.fail(
            f"row {row}, output {output} is {got[row, output]:.0f}, not {want[row, output]:.0f}: the exact "
            f"sum {total} as a float; added in float32, products would give {in_floats[row, output]:.0f}"
        )


def processor_seconds(rows: int, outputs: int, runs: int = 3) -> float:
    """Processor time of all threads for a product with 288 inputs, the least of some runs.

    Unlike the time on the clock, other programs do not change it much.
    """
    stored = mx.quantize(random_matrix(outputs, 288, seed=29), group_size=32, bits=4)
    packed, x = compiled_kernel("pack")(*stored, group_size=32, bits=4), random_matrix(rows, 288, seed=30)
    mx.eval(packed, x)
    seconds = []
    for _ in range(runs + 1):  # the first run allocates
        start = time.process_time()
        mx.eval(compiled_kernel("quantized_matmul")(x, packed, outputs, bits=4))
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


@pytest.mark.usefixtures("compiled")
def test_task_6_a_call_computes_only_its_own_items() -> None:
    """Oracle: processor time: two threads share the items, so together they work about as long as one.

    A call that computes all items, not begin .. end - 1, gives the right numbers, but many times over.
    """
    set_threads, before = compiled_kernel("set_num_threads"), compiled_kernel("num_threads")()
    rows = 48
    try:
        set_threads(1)  # one thread calls the kernel once
        while (alone := processor_seconds(rows, 256)) < 0.004 and rows < 12_000:
            rows *= 4  # a fast kernel needs a longer product, so that waiting threads do not matter
        set_threads(2)  # two threads call it for many short ranges
        ratio = processor_seconds(rows, 256) / alone
    finally:
        set_threads(before)
    says = f"two threads work {ratio:.1f} times as long as one: compute only the items begin .. end - 1"
    assert ratio < 4, says


@pytest.mark.usefixtures("compiled")
def test_task_6_an_item_has_at_most_48_rows() -> None:
    """Oracle: processor time: 10 blocks of rows take about 10 times as long as one.

    An item that continues to row M - 1 gives the right numbers, but computes most rows many times.
    """
    outputs = 160
    while (alone := processor_seconds(48, outputs)) < 0.0004 and outputs < 4_000:
        outputs *= 4  # a fast kernel needs a longer product, so that starting it does not matter
    ratio = processor_seconds(480, outputs) / alone
    says = f"480 rows take {ratio:.0f} times as long as 48: an item ends with its block of 48 rows"
    assert ratio < 30, says
