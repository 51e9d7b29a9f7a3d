"""The compiled kernels: each agrees with a plain oracle, and a row has the same bits in any batch.

Attention is in `test_kernels_attention`, invalid arguments in `test_kernels_wrong_input`. Every test runs for
each instruction set of this processor. "Same bits" means np.array_equal.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tiny_llm_kernels as kernels
from kernel_inputs import SEED, THREADS, address_of, isa, normal, property_settings

__all__ = ["isa"]

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_unavailable() or "")

ROWS = [*range(1, 21), 33, 130]


# ---- linear layers ----


@dataclass
class Layer:
    """One quantized matrix: packed for the kernels, and the float values that it represents."""

    packed: mx.array
    floats: np.ndarray  # [N, K], scale * q + bias in float32
    bits: int

    def __call__(self, x: np.ndarray | mx.array, activation_bits: int = 16) -> np.ndarray:
        bits = {"bits": self.bits, "activation_bits": activation_bits}
        return np.array(kernels.quantized_matmul(mx.array(x), self.packed, len(self.floats), **bits))


def quantized(weight: np.ndarray, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    weight, scales, biases = mx.quantize(mx.array(weight).astype(mx.float16), group_size=32, bits=bits)
    return weight, scales, biases


def make_layer(outputs: int, inputs: int, bits: int) -> Layer:
    weight, scales, biases = quantized(normal(outputs, inputs), bits)
    packed = kernels.pack(weight, scales, biases, group_size=32, bits=bits)
    quants = np.array(weight).view(np.uint8)
    if bits == 4:
        quants = np.stack([quants & 15, quants >> 4], axis=-1).reshape(outputs, inputs)
    spread = [np.repeat(np.array(a).astype(np.float32), 32, axis=1) for a in (scales, biases)]
    return Layer(packed, spread[0] * quants + spread[1], bits)


def rounded_activations(x: np.ndarray, bits: int = 16) -> np.ndarray:
    """x as rounded by the kernel: 8 or 16 bits per group of 32, scale absmax / limit, ties to even."""
    limit = np.float32(2 ** (bits - 1) - 1)
    groups = x.reshape(*x.shape[:-1], -1, 32)
    absmax = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = limit / np.where(absmax < 1e-30, np.float32(np.inf), absmax)
    q = np.rint(groups * inverse).astype(np.float64)
    return (q * (absmax / limit)).reshape(x.shape)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (17, 96), (40, 64), (192, 576)])
def test_quantized_matmul_is_exact_for_the_rounded_activations(
    outputs: int, inputs: int, bits: int, activation_bits: int
) -> None:
    layer = make_layer(outputs, inputs, bits)
    for rows in ROWS:
        x = normal(rows, inputs, seed=rows)
        rounded = rounded_activations(x, activation_bits)
        want = rounded @ layer.floats.T.astype(np.float64)
        size = np.abs(rounded) @ np.abs(layer.floats.T).astype(np.float64)
        assert (np.abs(layer(x, activation_bits) - want) <= 1e-5 * size).all()


@pytest.mark.parametrize(("activation_bits", "tolerance"), [(8, 1e-2), (16, 1e-4)])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_matmul_is_close_to_the_float_product(
    bits: int, activation_bits: int, tolerance: float
) -> None:
    layer, x = make_layer(192, 576, bits), normal(5, 576)
    want = x @ layer.floats.T
    assert np.linalg.norm(layer(x, activation_bits) - want) < tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_largest_values_does_not_overflow(bits: int, activation_bits: int) -> None:
    """All weights and activations have their largest value, so the sums reach their limit."""
    weight = mx.full((16, 32 * bits // 32), 0xFFFFFFFF, dtype=mx.uint32)
    scales, biases = mx.ones((16, 1), mx.float16), mx.zeros((16, 1), mx.float16)
    packed = kernels.pack(weight, scales, biases, group_size=32, bits=bits)
    for sign in (1, -1):
        x = mx.full((11, 32), sign * 1.0)
        out = kernels.quantized_matmul(x, packed, 16, bits=bits, activation_bits=activation_bits)
        np.testing.assert_allclose(np.array(out), sign * 32 * (2**bits - 1), rtol=1e-6)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", [40, 192])
def test_a_row_of_quantized_matmul_has_the_same_bits_in_any_batch(
    outputs: int, bits: int, activation_bits: int
) -> None:
    layer, x = make_layer(outputs, 576, bits), normal(130, 576)
    kernels.set_num_threads(1)
    alone = np.concatenate([layer(x[i : i + 1], activation_bits) for i in range(len(x))])
    for rows in ROWS:
        kernels.set_num_threads(THREADS[rows % len(THREADS)])
        assert np.array_equal(layer(x[-rows:], activation_bits), alone[-rows:])


def test_unsupported_activation_bits_are_rejected() -> None:
    layer = make_layer(16, 32, 4)
    with pytest.raises(ValueError, match="activation_bits 4 is not supported: only 8 and 16"):
        layer(normal(1, 32), 4)


def test_the_memory_layout_of_activations_does_not_change_the_result() -> None:
    layer, x = make_layer(40, 64, 4), normal(6, 64)
    want = layer(x)
    column_major = mx.array(np.ascontiguousarray(x.T)).T
    every_second = mx.array(np.repeat(x, 2, axis=0))[::2]
    inside_wider = mx.array(np.pad(x, ((0, 0), (8, 24))))[:, 8:72]
    in_three_axes = mx.array(np.pad(x.reshape(2, 3, 64), ((0, 0), (0, 1), (0, 0))))[:, :3]
    for layout in (column_major, every_second, inside_wider):
        assert np.array_equal(layer(layout), want)
    assert np.array_equal(layer(in_three_axes).reshape(6, 40), want)
    assert np.array_equal(layer(x.reshape(1, 2, 3, 64)).reshape(6, 40), want)
    assert np.array_equal(layer(mx.broadcast_to(mx.array(x[0]), (4, 64))), np.repeat(want[:1], 4, axis=0))


def test_quantized_matmul_of_zero_rows_is_empty_and_of_zeros_is_zero() -> None:
    layer = make_layer(40, 64, 4)
    assert layer(np.zeros((0, 64), np.float32)).shape == (0, 40)
    assert np.array_equal(layer(np.zeros((2, 64), np.float32)), np.zeros((2, 40)))


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_rows_returns_the_stored_values(bits: int) -> None:
    layer = make_layer(40, 96, bits)
    ids = np.array([[0, 39, 7], [16, 15, 0]], np.int32)
    rows = kernels.dequantize_rows(layer.packed, mx.array(ids), 96, bits=bits)
    assert np.array_equal(np.array(rows), layer.floats[ids])


def test_dequantize_rows_returns_nan_for_an_id_out_of_range() -> None:
    layer = make_layer(16, 32, 4)
    rows = np.array(kernels.dequantize_rows(layer.packed, mx.array([-1, 16, 2**30], mx.int32), 32, bits=4))
    assert np.isnan(rows).all()


@pytest.mark.parametrize("scale_type", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_keeps_every_value(bits: int, group_size: int, scale_type: mx.Dtype) -> None:
    """Oracle: MLX's dequantize in float32. The product must also be that of a matrix with these values."""
    weight, *affine = mx.quantize(
        mx.array(normal(24, 384)).astype(scale_type), group_size=group_size, bits=bits
    )
    packed = kernels.pack(weight, *affine, group_size=group_size, bits=bits)
    wide = [a.astype(mx.float32) for a in affine]
    floats = np.array(mx.dequantize(weight, *wide, group_size=group_size, bits=bits))
    ids = mx.arange(24, dtype=mx.int32)
    rows = kernels.dequantize_rows(packed, ids, 384, bits=kernels.packed_bits(bits))
    np.testing.assert_allclose(np.array(rows), floats, rtol=1e-6, atol=1e-6)
    x = normal(15, 384)
    for some in (x[:1], x[:6], x):
        got = kernels.quantized_matmul(mx.array(some), packed, 24, bits=kernels.packed_bits(bits))
        want = rounded_activations(some) @ floats.T.astype(np.float64)
        size = np.abs(rounded_activations(some)) @ np.abs(floats.T).astype(np.float64)
        assert (np.abs(np.array(got) - want) <= 1e-5 * size).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_stacked_weights_give_the_same_bits_as_separate_matrices(bits: int) -> None:
    x = mx.array(normal(3, 96))
    layers = [make_layer(outputs, 96, bits) for outputs in (16, 48, 32)]
    stacked = kernels.stack_packed([layer.packed for layer in layers])
    got = kernels.quantized_matmul(x, stacked, 96, bits=kernels.packed_bits(bits))
    want = [
        kernels.quantized_matmul(x, layer.packed, n, bits=bits)
        for layer, n in zip(layers, (16, 48, 32), strict=True)
    ]
    assert np.array_equal(np.array(got), np.concatenate([np.array(part) for part in want], axis=-1))


def test_packed_weights_are_aligned_to_cache_lines() -> None:
    """Small ones and those on huge pages, single and stacked: the kernels read whole cache lines."""
    for outputs, inputs in ((16, 32), (48, 576), (1536, 576)):
        packed = make_layer(outputs, inputs, 4).packed
        both = kernels.stack_packed([packed, packed])
        mx.eval(packed, both)
        assert address_of(packed) % 64 == address_of(both) % 64 == 0


def test_memory_of_freed_weights_is_reused() -> None:
    """Sixty matrices of 0.9 MB, created one after the other, reuse a few addresses.

    One matrix stays alive, because memory with nothing in use returns to the system.
    """
    seen = set()
    kept = make_layer(1536, 1024, 4).packed
    mx.eval(kept)
    for _ in range(60):
        packed = make_layer(1536, 1024, 4).packed
        mx.eval(packed)
        seen.add(address_of(packed))
        del packed
        mx.synchronize()  # the stream's thread may release it a little later
    assert len(seen) <= 20
    assert kept.size


def test_freeing_weights_does_not_damage_their_neighbours() -> None:
    """Freed gaps between matrices merge and are reused; the other matrices keep their contents."""
    layers = [make_layer(768, 1024, 4) for _ in range(12)]
    expected = [np.array(layer.packed) for layer in layers]
    for i in (3, 4, 8, 5, 0):
        layers[i] = make_layer(2 * 768, 1024, 4) if i % 2 else make_layer(400, 1024, 4)
        expected[i] = np.array(layers[i].packed)
    for layer, want in zip(layers, expected, strict=True):
        assert np.array_equal(np.array(layer.packed), want)


# ---- unquantized weights ----

STORED = [mx.float32, mx.float16, mx.bfloat16]


def stored(outputs: int, inputs: int, dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """A weight in its stored type, and its values in float64."""
    weight = mx.array(normal(outputs, inputs)).astype(dtype)
    return weight, np.array(weight.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (17, 96), (40, 20), (191, 577)])
def test_dense_matmul_agrees_with_float64(outputs: int, inputs: int, dtype: mx.Dtype) -> None:
    weight, floats = stored(outputs, inputs, dtype)
    for rows in ROWS:
        x = normal(rows, inputs, seed=rows)
        got = np.array(kernels.dense_matmul(mx.array(x), weight))
        size = np.abs(x).astype(np.float64) @ np.abs(floats.T)
        assert (np.abs(got - x.astype(np.float64) @ floats.T) <= 2e-6 * size).all()


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_row_of_dense_matmul_has_the_same_bits_in_any_batch(dtype: mx.Dtype) -> None:
    (weight, _), x = stored(75, 300, dtype), normal(130, 300)
    kernels.set_num_threads(1)
    alone = np.concatenate([np.array(kernels.dense_matmul(mx.array(row[None]), weight)) for row in x])
    for rows in ROWS:
        kernels.set_num_threads(THREADS[rows % len(THREADS)])
        assert np.array_equal(np.array(kernels.dense_matmul(mx.array(x[-rows:]), weight)), alone[-rows:])
        some = kernels.dense_matmul(mx.array(x[-rows:]), weight[:rows])  # fewer outputs, in other tiles
        assert np.array_equal(np.array(some), alone[-rows:, :rows])


def test_dense_matmul_takes_any_layout_and_keeps_nan_in_its_row() -> None:
    (weight, _), x = stored(40, 65, mx.bfloat16), normal(6, 65)
    want = np.array(kernels.dense_matmul(mx.array(x), weight))
    column_major = mx.array(np.ascontiguousarray(x.T)).T
    assert np.array_equal(np.array(kernels.dense_matmul(column_major, weight)), want)
    in_three_axes = mx.array(np.pad(x.reshape(2, 3, 65), ((0, 0), (0, 1), (0, 0))))[:, :3]
    assert np.array_equal(np.array(kernels.dense_matmul(in_three_axes, weight)).reshape(6, 40), want)
    assert kernels.dense_matmul(mx.zeros((0, 65)), weight).shape == (0, 40)
    x[2, 64] = np.nan
    found = np.isnan(np.array(kernels.dense_matmul(mx.array(x), weight)))
    assert found[2].all()
    assert not found[[0, 1, 3, 4, 5]].any()


# ---- other operators of a layer ----


@pytest.mark.parametrize("size", [1, 7, 8, 31, 576, 579])
def test_rms_norm_agrees_with_float64(size: int) -> None:
    x, weight = normal(3, 5, size), normal(size, seed=1)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    got = np.array(kernels.rms_norm(mx.array(x), mx.array(weight), 1e-5))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 9, 1536])
def test_swiglu_agrees_with_float64(size: int) -> None:
    gate, up = normal(3, size) * 10, normal(3, size, seed=1)
    wide = gate.astype(np.float64)
    got = np.array(kernels.swiglu(mx.array(gate), mx.array(up)))
    np.testing.assert_allclose(got, wide / (1 + np.exp(-wide)) * up, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 9, 1536])
def test_geglu_agrees_with_float64(size: int) -> None:
    gate, up = normal(3, size) * 4, normal(3, size, seed=1)
    wide = gate.astype(np.float64)
    gelu = wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) / 2
    got = np.array(kernels.geglu(mx.array(gate), mx.array(up)))
    np.testing.assert_allclose(got, gelu * up, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("gated", ["swiglu", "geglu"])
def test_gates_handle_extreme_values(gated: str) -> None:
    gate = mx.array([0.0, 200.0, -200.0, -3e38, float("nan")])
    got = np.array(getattr(kernels, gated)(gate, mx.ones(5)))
    assert got[0] == 0
    assert got[1] == 200
    assert abs(got[2]) < 1e-30
    assert abs(got[3]) < 10
    assert np.isnan(got[4])


def rope_oracle(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    angle = positions[:, None].astype(np.float64) * inv_freq.astype(np.float64)
    c, s = np.cos(angle), np.sin(angle)
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


@pytest.mark.parametrize("size", [2, 32, 40, 64, 256])
def test_rope_agrees_with_float64_up_to_long_contexts(size: int) -> None:
    positions = np.array([0, 1, 2, 77, 8191, 100_003, 131_071], np.int32)
    inv_freq = (1 / 10_000 ** (np.arange(size // 2) / (size // 2))).astype(np.float32)
    x = normal(2, len(positions), 3, size).transpose(0, 2, 1, 3)
    got = kernels.rope(mx.array(np.ascontiguousarray(x)), mx.array(positions), mx.array(inv_freq))
    np.testing.assert_allclose(np.array(got), rope_oracle(x, positions, inv_freq), atol=1e-6)


def test_rope_takes_a_transposed_view_and_its_result_transposes_back_without_a_copy() -> None:
    x = mx.array(normal(1, 5, 3, 64))
    positions, inv_freq = mx.arange(5, dtype=mx.int32), mx.array(normal(32) ** 2)
    rotated = kernels.rope(x.transpose(0, 2, 1, 3), positions, inv_freq)
    back = rotated.transpose(0, 2, 1, 3).reshape(1, 5, 192)
    mx.eval(rotated, back)
    assert address_of(back) == address_of(rotated)
    copied = kernels.rope(mx.contiguous(x.transpose(0, 2, 1, 3)), positions, inv_freq)
    assert np.array_equal(np.array(rotated), np.array(copied))


@property_settings(40)
@given(rows=st.integers(1, 200), first=st.integers(0, 199), threads=st.sampled_from(THREADS))
def test_norm_gate_and_rope_give_a_row_the_same_bits_in_any_batch(
    rows: int, first: int, threads: int
) -> None:
    kernels.set_num_threads(threads)
    first = min(first, 200 - rows)
    part = slice(first, first + rows)
    x, weight, inv_freq = mx.array(normal(200, 76)), mx.array(normal(76)), mx.array(normal(19) ** 2)
    heads, positions = x.reshape(1, 200, 2, 38).transpose(0, 2, 1, 3), mx.arange(200, dtype=mx.int32)
    for whole, some in [
        (kernels.rms_norm(x, weight, 1e-5)[part], kernels.rms_norm(x[part], weight, 1e-5)),
        (kernels.swiglu(x, -x)[part], kernels.swiglu(x[part], -x[part])),
        (
            kernels.rope(heads, positions, inv_freq)[:, :, part],
            kernels.rope(heads[:, :, part], positions[part], inv_freq),
        ),
    ]:
        assert np.array_equal(np.array(whole), np.array(some))


# ---- copying blocks ----


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("within", [False, True])
def test_copy_blocks_reads_all_blocks_before_it_writes(dtype: mx.Dtype, within: bool) -> None:
    """Oracle: NumPy, whose indexed assignment reads everything before it writes."""
    draw = np.random.default_rng(SEED)
    for count in (0, 1, 7, 40):
        target, source = (mx.array(normal(blocks, 3, 5, seed=blocks)).astype(dtype) for blocks in (60, 41))
        read = draw.integers(0, 60 if within else 41, count)
        write = draw.permutation(60)[:count]
        want = np.array(target.astype(mx.float32))
        want[write] = np.array((target if within else source).astype(mx.float32))[read]
        ids = (mx.array(read.astype(np.int32)), mx.array(write.astype(np.int32)))
        copied = kernels.copy_blocks(target, *ids, None if within else source)
        assert np.array_equal(np.array(copied.astype(mx.float32)), want)


@pytest.mark.parametrize("within", [False, True])
def test_copies_with_ids_out_of_range_are_skipped(within: bool) -> None:
    target, source = mx.array(normal(6, 4)), mx.array(normal(3, 4, seed=1))
    read, write = [0, -1, 2, 6, 2**30, 1], [1, 2, -1, 3, 4, 6]  # only the first pair is in range
    copied = kernels.copy_blocks(target, mx.array(read), mx.array(write), None if within else source)
    want = np.array(target)
    want[1] = np.array(target if within else source)[0]
    assert np.array_equal(np.array(copied), want)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 5, 6), (200, 3, 16, 64)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_zeros_returns_separate_arrays_of_zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Arrays that are allocated together can be written one by one, in place."""
    arrays = kernels.zeros(5, shape, dtype)
    assert all(array.shape == shape and array.dtype == dtype and not array.any() for array in arrays)
    block, ones = mx.array([0], mx.int32), mx.ones((1, *shape[1:]), dtype)
    where = address_of(arrays[2])
    arrays[2] = kernels.copy_blocks(arrays[2], block, block, ones)
    mx.eval(arrays)
    assert address_of(arrays[2]) == where
    assert [int(array[0].all()) for array in arrays] == [0, 0, 1, 0, 0]
    assert int((arrays[2] != 0).sum()) == ones.size


def test_copy_blocks_works_in_place_unless_the_target_is_referenced() -> None:
    pool, ids = mx.zeros((50, 4)) + 1, (mx.array([3], mx.int32), mx.array([9], mx.int32))
    mx.eval(pool)
    where = address_of(pool)
    pool = kernels.copy_blocks(pool, *ids, mx.zeros((4, 4)))
    mx.eval(pool)
    assert address_of(pool) == where
    reader = pool.sum()
    copied = kernels.copy_blocks(pool, *ids, mx.zeros((4, 4)) - 7)
    mx.eval(copied)
    assert address_of(copied) != where
    assert float(reader) == 49 * 4
    assert float(copied.sum()) == 49 * 4 - 28


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": mx.zeros(5)}, "target must be"),
        ({"from_blocks": mx.zeros(2)}, "from_blocks must be int32"),
        ({"to_blocks": mx.zeros(3, mx.int32)}, "must have shape"),
        ({"source": mx.zeros((5, 7))}, "source must have the shape of target"),
        ({"source": mx.zeros((5, 4), mx.float16)}, "source must be float32"),
    ],
)
def test_copy_blocks_rejects_mismatched_arguments(change: dict[str, mx.array], named: str) -> None:
    ids = {"from_blocks": mx.zeros(2, mx.int32), "to_blocks": mx.arange(2, dtype=mx.int32)}
    with pytest.raises(ValueError, match=named):
        kernels.copy_blocks(**{"target": mx.zeros((5, 4)), **ids, **change})


# ---- from logits to a token ----


def sampled(logits: np.ndarray, **how: float) -> int:
    """Sample one row. By default the filters are off and the uniform number is 0.5."""
    how = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0, **how}
    number = how.pop("uniform", 0.5)
    row = mx.array(logits.astype(np.float32))
    tokens, chosen = kernels.sample(row[None], [0], uniforms=[number], **how)
    assert np.array_equal(chosen.item(), row[tokens.item()].item(), equal_nan=True)
    return tokens.item()


def probabilities_after_filters(
    logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float
) -> tuple[np.ndarray, float]:
    """Probabilities [V] by definition, in float64 with a sort; and the margin of the closest decision."""
    scaled = (logits.astype(np.float32) / np.float32(temperature)).astype(np.float64)
    weights = np.exp(scaled - scaled.max())
    kept, margin = weights >= min_p, np.abs(weights - min_p)[weights < 1].min(initial=1.0) if min_p else 1.0
    if top_k:
        kept &= scaled >= np.sort(np.where(kept, scaled, -np.inf))[::-1][min(top_k, len(scaled)) - 1]
    if top_p < 1:
        order = np.argsort(-np.where(kept, scaled, -np.inf), kind="stable")
        shares = np.where(kept, weights, 0)[order] / weights[kept].sum()
        before = np.cumsum(shares) - shares
        margin = min(margin, np.abs(before - top_p).min())
        kept &= scaled >= scaled[order[np.flatnonzero((before < top_p) & (shares > 0))[-1]]]
    return np.where(kept, weights, 0) / weights[kept].sum(), margin


@property_settings(300)
@given(
    size=st.sampled_from([1, 7, 8, 9, 300, 5000, 49_152]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.3, 0.7, 1.9]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-4]),
    uniform=st.floats(0, 1, exclude_max=True),
    forbidden=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sampled_token_equals_the_one_by_definition(
    size: int, spread: float, temperature: float, min_p: float, top_k: int, top_p: float, uniform: float,
    forbidden: float, seed: int,
) -> None:  # fmt: skip
    """Logits are rounded so that many tie. Decisions too close for float32 are skipped."""
    rng = np.random.default_rng(seed)
    logits = np.round(spread * rng.normal(size=size), 2)
    logits[(rng.random(size) < forbidden) & (np.arange(size) > 0)] = -np.inf
    how = {"temperature": temperature, "min_p": min_p, "top_k": top_k, "top_p": top_p}
    shares, margin = probabilities_after_filters(logits, **how)
    assume(margin > 1e-7)
    token = sampled(logits, uniform=uniform, **how)
    up_to, rounding = np.cumsum(shares), 1e-5
    assert shares[token] > 0
    assert up_to[token] - shares[token] - rounding < 1 - uniform < up_to[token] + rounding


@pytest.mark.parametrize("size", [1, 8, 13, 1000])
def test_temperature_zero_takes_the_first_of_the_largest_logits(size: int) -> None:
    for seed in range(20):
        logits = np.round(np.random.default_rng(seed).normal(size=size), 1)
        assert sampled(logits, temperature=0.0) == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 7, 8, 19])
def test_sampling_from_a_row_with_nan_or_infinity_returns_its_index(
    place: int, broken: float, temperature: float
) -> None:
    logits = normal(20)
    logits[place] = broken
    assert sampled(logits, temperature=temperature, top_p=0.5, top_k=3) == place


def test_a_token_with_logit_minus_infinity_is_never_sampled() -> None:
    logits = np.full(600, -np.inf)
    logits[[300, 400]] = [1.0, 2.0]
    drawn = {sampled(logits, uniform=number) for number in np.linspace(0, 1, 200, endpoint=False)}
    assert drawn == {300, 400}
    assert sampled(np.full(9, -np.inf)) == 0  # no token may be sampled


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or above, got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"uniform": 1.0}, "uniforms must be at least 0 and below 1, got 1"),
    ],
)
def test_sample_rejects_invalid_parameters(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sampled(normal(4), **change)


def test_sample_rejects_logits_of_wrong_shape_or_type() -> None:
    for logits, named in (
        (mx.zeros(3), "2 axes"),
        (mx.zeros((1, 0)), "empty"),
        (mx.zeros((1, 3), mx.float16), "float32"),
    ):
        with pytest.raises(ValueError, match=named):
            kernels.sample(logits, [0], 1.0, 0.0, 0, 1.0, [0.5])


@pytest.mark.parametrize(
    ("rows", "uniforms", "named"),
    [
        ([], [], "rows must not be empty"),
        ([2], [0.5], "rows must be between 0 and 1, got 2"),
        ([-1], [0.5], "rows must be between 0 and 1, got -1"),
        ([0, 1], [0.5], "one number for each row: 2, not 1"),
    ],
)
def test_sample_rejects_invalid_rows(rows: list[int], uniforms: list[float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.sample(mx.zeros((2, 3)), rows, 1.0, 0.0, 0, 1.0, uniforms)


@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 0.7]),
    threads=st.sampled_from(THREADS),
    seed=st.integers(0, 99),
)
def test_rows_that_are_sampled_together_get_the_tokens_that_each_gets_by_itself(
    rows: list[int], temperature: float, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = mx.array(rng.standard_normal((5, 300)).astype(np.float32))
    numbers = [float(number) for number in rng.random(len(rows))]
    how = {"temperature": temperature, "min_p": 0.01, "top_k": 40, "top_p": 0.9}
    kernels.set_num_threads(threads)
    tokens, chosen = kernels.sample(logits, rows, uniforms=numbers, **how)
    mx.eval(tokens, chosen)
    alone = [
        kernels.sample(logits, [row], uniforms=[number], **how)[0].item()
        for row, number in zip(rows, numbers, strict=True)
    ]
    assert tokens.tolist() == alone
    assert chosen.tolist() == [logits[row, token].item() for row, token in zip(rows, alone, strict=True)]


def masked(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The logits with -inf for every token that is not allowed."""
    return np.where(allowed, logits, -np.inf).astype(np.float32)


def words_of(allowed: np.ndarray) -> mx.array:
    """Masks [n, V] of booleans as words; the bits after the last token are 1, which must not matter."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)), constant_values=True)
    return mx.array(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


@given(
    size=st.sampled_from([1, 7, 8, 31, 32, 33, 100, 5000]),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    how=st.sampled_from([(0.0, 0.0, 0, 1.0), (1.0, 0.0, 0, 1.0), (0.7, 0.05, 0, 1.0), (1.3, 0.0, 5, 0.8)]),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    threads=st.sampled_from(THREADS),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_masked_row_gets_the_token_of_the_row_with_minus_infinity_in_place_of_other_tokens(
    size: int, rows: list[int], how: tuple[float, float, int, float], share: float, threads: int, seed: int
) -> None:
    """Oracle: the kernel without masks. A row that is listed several times has several masks."""
    rng = np.random.default_rng(seed)
    logits = np.round(3 * rng.standard_normal((3, size)), 1).astype(np.float32)
    allowed = rng.random((len(rows), size)) < share
    numbers = [float(number) for number in rng.random(len(rows))]
    kernels.set_num_threads(threads)
    tokens, chosen = kernels.sample(mx.array(logits), rows, *how, numbers, words_of(allowed))
    expected = [
        kernels.sample(mx.array(masked(logits[row], one))[None], [0], *how, [number])[0].item()
        for row, one, number in zip(rows, allowed, numbers, strict=True)
    ]
    assert tokens.tolist() == expected
    assert chosen.tolist() == [logits[row, token] for row, token in zip(rows, expected, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 9, 39])
def test_a_mask_hides_an_infinity_and_never_a_nan(temperature: float, place: int) -> None:
    allowed = np.arange(40)[None] != place
    for broken, expected in ((np.nan, {place}), (np.inf, set(range(40)) - {place})):
        logits = normal(40).astype(np.float32)
        logits[place] = broken
        row = mx.array(logits)[None]
        token, chosen = kernels.sample(row, [0], temperature, 0.0, 0, 1.0, [0.5], words_of(allowed))
        assert token.item() in expected
        assert np.isnan(chosen.item()) == np.isnan(broken)


def test_a_mask_of_all_tokens_changes_nothing() -> None:
    logits = mx.array(normal(4000).reshape(4, 1000).astype(np.float32))
    how = (1.0, 0.01, 40, 0.9, [0.1, 0.4, 0.6, 0.9])
    everything = mx.full((4, 32), -1, mx.int32)
    plain, allowed = (kernels.sample(logits, range(4), *how, masks) for masks in (None, everything))
    assert plain[0].tolist() == allowed[0].tolist()
    assert plain[1].tolist() == allowed[1].tolist()


@pytest.mark.parametrize(
    ("masks", "named"),
    [
        (mx.zeros((1, 2), mx.uint32), "masks must be int32"),
        (mx.zeros((1, 1), mx.int32), r"\[1, 2\], got \[1, 1\]"),
        (mx.zeros((2, 2), mx.int32), r"\[1, 2\], got \[2, 2\]"),
        (mx.zeros(2, mx.int32), r"got \[2\]"),
    ],
)
def test_sample_rejects_masks_of_another_type_or_shape(masks: mx.array, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.sample(mx.zeros((1, 33)), [0], 1.0, 0.0, 0, 1.0, [0.5], masks)


# ---- the processor's limit ----


@pytest.mark.parametrize("bits", [8, 16])
def test_the_peak_counts_the_multiplications_of_all_rounds(isa: str, bits: int) -> None:
    few, many = kernels.integer_peak(bits, 1_000), kernels.integer_peak(bits, 10_000)
    assert 8 * few < many < 12 * few
    assert kernels.integer_peak(bits, 1) > 0
