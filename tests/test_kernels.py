"""The compiled kernels, each against a plain oracle, and the promise that a row's bits never change.

Every test runs for each instruction set that this processor has. "Same bits" means np.array_equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tiny_llm_kernels as kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_unavailable() or "")

INSTRUCTION_SETS = kernels.instruction_sets() if kernels.available() else []
THREADS = [1, 2, 3, 5]
ROWS = [*range(1, 21), 33, 130]
SEED = 7


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def isa(request: pytest.FixtureRequest) -> str:
    """The set in use; conftest.py puts set and threads back."""
    kernels.select_instruction_set(request.param)
    return request.param


def normal(*shape: int, seed: int = SEED) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_property(examples: int) -> Callable:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


# ---- linear layers ----


@dataclass
class Layer:
    """One quantized matrix: as the kernels hold it, and as the floats that it stands for."""

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
    """What the kernel makes of x: 8 or 16 bits per group of 32, absmax / most, ties to even. As float64."""
    most = np.float32(2 ** (bits - 1) - 1)
    groups = x.reshape(*x.shape[:-1], -1, 32)
    absmax = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = most / np.where(absmax < 1e-30, np.float32(np.inf), absmax)
    q = np.rint(groups * inverse).astype(np.float64)
    return (q * (absmax / most)).reshape(x.shape)


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
def test_a_full_scale_group_does_not_overflow(bits: int, activation_bits: int) -> None:
    """All weights and all activations at their largest: the sums come to their limit."""
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
def test_a_row_has_the_same_bits_in_any_batch(outputs: int, bits: int, activation_bits: int) -> None:
    layer, x = make_layer(outputs, 576, bits), normal(130, 576)
    kernels.set_num_threads(1)
    alone = np.concatenate([layer(x[i : i + 1], activation_bits) for i in range(len(x))])
    for rows in ROWS:
        kernels.set_num_threads(THREADS[rows % len(THREADS)])
        assert np.array_equal(layer(x[-rows:], activation_bits), alone[-rows:])


def test_other_numbers_of_bits_are_refused() -> None:
    layer = make_layer(16, 32, 4)
    with pytest.raises(ValueError, match="activation_bits 4 is not supported: only 8 and 16"):
        layer(normal(1, 32), 4)


def test_the_way_activations_lie_in_memory_changes_nothing() -> None:
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


def test_zero_rows_and_zero_activations() -> None:
    layer = make_layer(40, 64, 4)
    assert layer(np.zeros((0, 64), np.float32)).shape == (0, 40)
    assert np.array_equal(layer(np.zeros((2, 64), np.float32)), np.zeros((2, 40)))


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_rows_gives_the_stored_floats(bits: int) -> None:
    layer = make_layer(40, 96, bits)
    ids = np.array([[0, 39, 7], [16, 15, 0]], np.int32)
    rows = kernels.dequantize_rows(layer.packed, mx.array(ids), 96, bits=bits)
    assert np.array_equal(np.array(rows), layer.floats[ids])


def test_an_id_outside_the_weights_gives_nan() -> None:
    layer = make_layer(16, 32, 4)
    rows = np.array(kernels.dequantize_rows(layer.packed, mx.array([-1, 16, 2**30], mx.int32), 32, bits=4))
    assert np.isnan(rows).all()


@pytest.mark.parametrize("scale_type", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_keeps_every_number(bits: int, group_size: int, scale_type: mx.Dtype) -> None:
    """Oracle: MLX's own dequantize, in float32. The product must be that of a matrix with these numbers."""
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
def test_stacked_weights_give_every_matrix_its_own_bits(bits: int) -> None:
    x = mx.array(normal(3, 96))
    layers = [make_layer(outputs, 96, bits) for outputs in (16, 48, 32)]
    stacked = kernels.stack_packed([layer.packed for layer in layers])
    got = kernels.quantized_matmul(x, stacked, 96, bits=kernels.packed_bits(bits))
    want = [
        kernels.quantized_matmul(x, layer.packed, n, bits=bits)
        for layer, n in zip(layers, (16, 48, 32), strict=True)
    ]
    assert np.array_equal(np.array(got), np.concatenate([np.array(part) for part in want], axis=-1))


def test_packed_weights_begin_at_cache_lines() -> None:
    """Small ones and such as lie on huge pages, alone and stacked: the kernels read whole lines."""
    for outputs, inputs in ((16, 32), (48, 576), (1536, 576)):
        packed = make_layer(outputs, inputs, 4).packed
        both = kernels.stack_packed([packed, packed])
        mx.eval(packed, both)
        assert address_of(packed) % 64 == address_of(both) % 64 == 0


def test_memory_of_weights_that_are_gone_is_used_again() -> None:
    """Sixty matrices of 0.9 MB one after the other take each other's places, if not at once, then soon.

    They lie beside one that stays, for memory of which nothing is in use goes back to the system.
    """
    seen = set()
    kept = make_layer(1536, 1024, 4).packed
    mx.eval(kept)
    for _ in range(60):
        packed = make_layer(1536, 1024, 4).packed
        mx.eval(packed)
        seen.add(address_of(packed))
        del packed
        mx.synchronize()  # the stream's thread may hold it a little longer
    assert len(seen) <= 20
    assert kept.size


def test_weights_outlive_their_neighbours() -> None:
    """Gaps between matrices join again, and what lies beside them stays as it was."""
    layers = [make_layer(768, 1024, 4) for _ in range(12)]
    expected = [np.array(layer.packed) for layer in layers]
    for i in (3, 4, 8, 5, 0):
        layers[i] = make_layer(2 * 768, 1024, 4) if i % 2 else make_layer(400, 1024, 4)
        expected[i] = np.array(layers[i].packed)
    for layer, want in zip(layers, expected, strict=True):
        assert np.array_equal(np.array(layer.packed), want)


# ---- plain weights ----

STORED = [mx.float32, mx.float16, mx.bfloat16]


def stored(outputs: int, inputs: int, dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """A weight as it is stored, and its numbers in float64."""
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
        some = kernels.dense_matmul(mx.array(x[-rows:]), weight[:rows])  # other tiles, the same outputs
        assert np.array_equal(np.array(some), alone[-rows:, :rows])


def test_dense_matmul_takes_any_layout_and_passes_nan_on() -> None:
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


# ---- the operators between ----


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
def test_a_gate_at_the_ends(gated: str) -> None:
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


def test_rope_takes_a_transposed_view_and_its_result_transposes_back_for_free() -> None:
    x = mx.array(normal(1, 5, 3, 64))
    positions, inv_freq = mx.arange(5, dtype=mx.int32), mx.array(normal(32) ** 2)
    rotated = kernels.rope(x.transpose(0, 2, 1, 3), positions, inv_freq)
    back = rotated.transpose(0, 2, 1, 3).reshape(1, 5, 192)
    mx.eval(rotated, back)
    assert address_of(back) == address_of(rotated)
    copied = kernels.rope(mx.contiguous(x.transpose(0, 2, 1, 3)), positions, inv_freq)
    assert np.array_equal(np.array(rotated), np.array(copied))


@by_property(40)
@given(rows=st.integers(1, 200), first=st.integers(0, 199), threads=st.sampled_from(THREADS))
def test_operators_give_a_row_the_same_bits_in_any_batch(rows: int, first: int, threads: int) -> None:
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


# ---- blocks ----


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("within", [False, True])
def test_blocks_are_copied_as_if_all_were_read_first(dtype: mx.Dtype, within: bool) -> None:
    """Oracle: NumPy, whose indexed assignment reads everything first."""
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
def test_a_block_that_is_not_there_is_not_copied_and_nothing_else_is_touched(within: bool) -> None:
    target, source = mx.array(normal(6, 4)), mx.array(normal(3, 4, seed=1))
    read, write = [0, -1, 2, 6, 2**30, 1], [1, 2, -1, 3, 4, 6]  # the first is the only one that is there
    copied = kernels.copy_blocks(target, mx.array(read), mx.array(write), None if within else source)
    want = np.array(target)
    want[1] = np.array(target if within else source)[0]
    assert np.array_equal(np.array(copied), want)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 5, 6), (200, 3, 16, 64)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_zeros_are_zero_and_nobody_elses(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Arrays that are asked for together are written to one by one, in place."""
    arrays = kernels.zeros(5, shape, dtype)
    assert all(array.shape == shape and array.dtype == dtype and not array.any() for array in arrays)
    block, ones = mx.array([0], mx.int32), mx.ones((1, *shape[1:]), dtype)
    where = address_of(arrays[2])
    arrays[2] = kernels.copy_blocks(arrays[2], block, block, ones)
    mx.eval(arrays)
    assert address_of(arrays[2]) == where
    assert [int(array[0].all()) for array in arrays] == [0, 0, 1, 0, 0]
    assert int((arrays[2] != 0).sum()) == ones.size


def test_blocks_are_copied_in_place_unless_somebody_looks() -> None:
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
        ({"source": mx.zeros((5, 7))}, "source must have shape"),
        ({"source": mx.zeros((5, 4), mx.float16)}, "source must be float32"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change: dict[str, mx.array], named: str) -> None:
    ids = {"from_blocks": mx.zeros(2, mx.int32), "to_blocks": mx.arange(2, dtype=mx.int32)}
    with pytest.raises(ValueError, match=named):
        kernels.copy_blocks(**{"target": mx.zeros((5, 4)), **ids, **change})


# ---- from logits to a token ----


def sampled(logits: np.ndarray, **how: float) -> int:
    """The token of a row; the filters are off where nothing is said, and the draw is in the middle."""
    how = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0, "uniform": 0.5, **how}
    return kernels.sample(mx.array(logits.astype(np.float32)), **how).item()


def shares_that_stay(
    logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float
) -> tuple[np.ndarray, float]:
    """The definitions in float64, with a sort: probabilities [V]; and how near the nearest decision was."""
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


@by_property(300)
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
def test_a_sampled_token_is_the_one_that_the_definitions_give(
    size: int, spread: float, temperature: float, min_p: float, top_k: int, top_p: float, uniform: float,
    forbidden: float, seed: int,
) -> None:  # fmt: skip
    """Rounded logits, so that many of them tie; decisions that float32 may take otherwise are left out."""
    rng = np.random.default_rng(seed)
    logits = np.round(spread * rng.normal(size=size), 2)
    logits[(rng.random(size) < forbidden) & (np.arange(size) > 0)] = -np.inf
    how = {"temperature": temperature, "min_p": min_p, "top_k": top_k, "top_p": top_p}
    shares, margin = shares_that_stay(logits, **how)
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
def test_a_row_that_is_no_row_of_numbers_gives_what_breaks_it(
    place: int, broken: float, temperature: float
) -> None:
    logits = normal(20)
    logits[place] = broken
    assert sampled(logits, temperature=temperature, top_p=0.5, top_k=3) == place


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = np.full(600, -np.inf)
    logits[[300, 400]] = [1.0, 2.0]
    drawn = {sampled(logits, uniform=number) for number in np.linspace(0, 1, 200, endpoint=False)}
    assert drawn == {300, 400}
    assert sampled(np.full(9, -np.inf)) == 0  # nothing may be drawn


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or above, got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"uniform": 1.0}, "uniform must be at least 0 and below 1, got 1"),
    ],
)
def test_a_draw_that_makes_no_sense_is_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sampled(normal(4), **change)


def test_logits_that_are_no_row_are_refused() -> None:
    for logits, named in (
        (mx.zeros((2, 3)), "1 axes"),
        (mx.zeros(0), "empty"),
        (mx.zeros(3, mx.float16), "float32"),
    ):
        with pytest.raises(ValueError, match=named):
            kernels.sample(logits, 1.0, 0.0, 0, 1.0, 0.5)


# ---- attention over pages ----


def address_of(a: mx.array) -> int:
    return np.array(a, copy=False).__array_interface__["data"][0]


@dataclass
class Chunk:
    """Some next tokens of one sequence: their numbers within it."""

    sequence: int
    first: int
    count: int


class Pages:
    """A pool, a shuffled table for each sequence, and the q, k, v that its tokens will have."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: tuple[int, int] = (9, 3),
        size: int = 32,
        block_size: int = 16,
        dtype: mx.Dtype = mx.float32,
        seed: int = 0,
        window: int | None = None,
    ) -> None:
        self.block_size, self.size, self.scale, self.window = block_size, size, size**-0.5, window
        per_sequence = max(-(-length // block_size) for length in lengths)
        total = per_sequence * len(lengths) + 1
        order = np.random.default_rng(seed).permutation(total)[: total - 1]
        self.tables = order.reshape(len(lengths), per_sequence).astype(np.int32)
        nan = mx.full((total, heads[1], block_size, size), float("nan"), dtype=dtype)
        self.keys, self.values = nan, nan + 0  # unwritten memory must never be read
        mx.eval(self.keys, self.values)
        self.q = [normal(n, heads[0], size, seed=100 + i) for i, n in enumerate(lengths)]
        self.k = [normal(n, heads[1], size, seed=200 + i) for i, n in enumerate(lengths)]
        self.v = [normal(n, heads[1], size, seed=300 + i) for i, n in enumerate(lengths)]

    def step(self, *chunks: Chunk) -> list[np.ndarray]:
        """Runs one packed step; returns each chunk's output, [count, H, D]."""
        rows = np.concatenate([np.full(c.count, c.sequence) for c in chunks]).astype(np.int32)
        positions = np.concatenate([np.arange(c.first, c.first + c.count) for c in chunks]).astype(np.int32)
        blocks = self.tables[rows, positions // self.block_size]
        slots = (blocks * self.block_size + positions % self.block_size).astype(np.int32)
        q, k, v = (
            mx.array(np.concatenate([a[c.sequence][c.first : c.first + c.count] for c in chunks]))[
                None
            ].transpose(0, 2, 1, 3)
            for a in (self.q, self.k, self.v)
        )
        where = mx.array(self.tables), mx.array(rows), mx.array(positions), self.scale, self.window
        out, self.keys, self.values = kernels.write_and_attend(
            q, k, v, self.keys, self.values, mx.array(slots), *where
        )
        again = kernels.paged_attention(q, self.keys, self.values, *where)
        assert np.array_equal(np.array(again), np.array(out), equal_nan=True), (
            "reading alone gives the same bits"
        )
        tokens = np.array(out)[0].transpose(1, 0, 2)
        return np.split(tokens, np.cumsum([c.count for c in chunks])[:-1])

    def read(self, sequence: int, first: int, count: int) -> np.ndarray:
        """What some tokens see of the pool as it is, without a write, [count, H, D]."""
        q = mx.array(self.q[sequence][None, first : first + count]).transpose(0, 2, 1, 3)
        rows = mx.full(count, sequence, dtype=mx.int32)
        positions = mx.arange(first, first + count, dtype=mx.int32)
        where = mx.array(self.tables), rows, positions, self.scale, self.window
        out = kernels.paged_attention(q, self.keys, self.values, *where)
        return np.array(out)[0].transpose(1, 0, 2)


def attention_oracle(pages: Pages, sequence: int, dtype: mx.Dtype) -> np.ndarray:
    """Causal attention of one whole sequence, in the window, in float64 over K and V as stored."""
    stored = [np.array(mx.array(a[sequence]).astype(dtype).astype(mx.float32)) for a in (pages.k, pages.v)]
    q = pages.q[sequence].astype(np.float64)
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1).astype(np.float64) for a in stored)
    scores = np.einsum("thd,shd->hts", q, k) * pages.scale
    seen = np.tri(len(q), dtype=bool)
    if pages.window is not None:
        seen &= ~np.tri(len(q), k=-pages.window, dtype=bool)  # position - window and before
    scores[:, ~seen] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_attention_agrees_with_float64_over_the_stored_values(block_size: int, dtype: mx.Dtype) -> None:
    pages = Pages([100, 33], block_size=block_size, dtype=dtype)
    pages.step(Chunk(0, 0, 40), Chunk(1, 0, 32))
    later = pages.step(Chunk(1, 32, 1), Chunk(0, 40, 60))
    np.testing.assert_allclose(later[0], attention_oracle(pages, 1, dtype)[32:], atol=2e-6)
    np.testing.assert_allclose(later[1], attention_oracle(pages, 0, dtype)[40:], atol=2e-6)


@pytest.mark.parametrize("size", [2, 6, 16, 20, 40, 64, 72, 80, 94, 128, 256, 320, 510, 512])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (15, 3), (70, 1)])
def test_attention_takes_any_head_size_and_grouping(heads: tuple[int, int], size: int) -> None:
    pages = Pages([37], heads=heads, size=size, block_size=5)
    (out,) = pages.step(Chunk(0, 0, 37))
    np.testing.assert_allclose(out, attention_oracle(pages, 0, mx.float32), atol=2e-6)


def one_token_at_a_time(dtype: mx.Dtype, heads: tuple[int, int], size: int, window: int | None) -> np.ndarray:
    kernels.set_num_threads(1)
    pages = Pages([70], heads=heads, size=size, dtype=dtype, window=window)
    return np.concatenate([pages.step(Chunk(0, t, 1))[0] for t in range(70)])


@by_property(100)
@given(
    cuts=st.lists(st.integers(1, 69), max_size=4),
    neighbours=st.lists(st.integers(1, 40), max_size=3),
    block_size=st.sampled_from([1, 3, 16, 64]),
    threads=st.sampled_from(THREADS),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    heads=st.sampled_from([(9, 3), (4, 4), (8, 1)]),
    size=st.sampled_from([32, 32, 20]),
    window=st.one_of(st.none(), st.integers(1, 70)),
    seed=st.integers(0, 1000),
)
def test_a_token_has_the_same_bits_however_it_is_served(
    cuts: list[int], neighbours: list[int], block_size: int, threads: int, dtype: mx.Dtype,
    heads: tuple[int, int], size: int, window: int | None, seed: int,
) -> None:  # fmt: skip
    """Any prefill chunks, neighbours in the step, block size, table order and number of threads."""
    want = one_token_at_a_time(dtype, heads, size, window)
    kernels.set_num_threads(threads)
    pages = Pages(
        [70, *neighbours],
        heads=heads, size=size, dtype=dtype, block_size=block_size, seed=seed, window=window,
    )  # fmt: skip
    others = [Chunk(i + 1, 0, n) for i, n in enumerate(neighbours)]
    edges = [0, *sorted(set(cuts)), 70]
    got = [pages.step(*others, Chunk(0, begin, end - begin))[-1] for begin, end in pairwise(edges)]
    assert np.array_equal(np.concatenate(got), want)


# Positions around the ends of partitions of 128, and of the sequence.
LATE = [0, 126, 127, 128, 129, 255, 256, 300, 511, 512, 599]


@pytest.mark.parametrize("window", [None, 1, 128, 129, 400])
@pytest.mark.parametrize(
    ("heads", "size", "dtype"),
    [((9, 3), 64, mx.float16), ((4, 4), 20, mx.float32), ((70, 1), 16, mx.bfloat16)],
)
def test_a_long_context_shared_out_in_partitions_keeps_its_bits(
    heads: tuple[int, int], size: int, window: int | None, dtype: mx.Dtype
) -> None:
    """Oracles: the same tokens in one long chunk, where one thread goes through all partitions; float64."""
    pages = Pages([600, 40], heads=heads, size=size, dtype=dtype, window=window)
    kernels.set_num_threads(1)
    want, _ = pages.step(Chunk(0, 0, 600), Chunk(1, 0, 40))
    np.testing.assert_allclose(want, attention_oracle(pages, 0, dtype), atol=3e-6)
    for threads in THREADS:
        kernels.set_num_threads(threads)
        for position in LATE:
            assert np.array_equal(pages.read(0, position, 1)[0], want[position])
        beside, few = pages.step(Chunk(1, 39, 1), Chunk(0, 597, 3))
        assert np.array_equal(few, want[597:])
        np.testing.assert_allclose(beside, attention_oracle(pages, 1, dtype)[39:], atol=3e-6)


@pytest.mark.parametrize("block", [0, 8, 20, 37])
def test_a_missing_block_shows_in_whatever_partition_it_is(block: int) -> None:
    pages = Pages([600])
    pages.step(Chunk(0, 0, 600))
    pages.tables[0, block] = -1
    sees = np.array([position // 16 >= block for position in LATE])
    finite = [np.isfinite(pages.read(0, position, 1)).all() for position in LATE]
    broken = [np.isnan(pages.read(0, position, 1)).all() for position in LATE]
    assert broken == sees.tolist()
    assert finite == (~sees).tolist()


@pytest.mark.parametrize("spoilt", ["slot", "row"])
def test_an_unsound_token_with_a_long_context_gets_nan_and_its_neighbour_does_not(spoilt: str) -> None:
    pages = Pages([600, 600])
    pages.step(Chunk(0, 0, 600), Chunk(1, 0, 600))
    slots = pages.tables[:, 599 // 16] * 16 + 599 % 16
    where = {"slot": slots.astype(np.int32), "row": np.arange(2, dtype=np.int32)}
    where[spoilt][1] = -1
    q, k, v = (
        mx.array(np.stack([a[0][599], a[1][599]])[None]).transpose(0, 2, 1, 3)
        for a in (pages.q, pages.k, pages.v)
    )
    tables, positions = mx.array(pages.tables), mx.array([599, 599], mx.int32)
    out, _, _ = kernels.write_and_attend(
        q, k, v, pages.keys, pages.values,
        mx.array(where["slot"]), tables, mx.array(where["row"]), positions, pages.scale,
    )  # fmt: skip
    assert np.isfinite(np.array(out[:, :, 0])).all()
    assert np.isnan(np.array(out[:, :, 1])).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_what_is_stored_is_rounded_to_nearest_even(dtype: mx.Dtype) -> None:
    pages = Pages([8], dtype=dtype, block_size=8)
    ties = [1 + odd * 2**-bits for bits in (11, 8) for odd in (1, 3)]  # float16's and bfloat16's
    special = np.array([0, -0.0, 1e-8, 6e-8, 65519, 65520, 3e38, np.inf, *ties], np.float32)
    pages.k[0][:, 0, : len(special)] = special
    pages.k[0][:, 1, : len(special)] = -special
    pages.step(Chunk(0, 0, 8))
    want = mx.array(pages.k[0]).astype(dtype).astype(mx.float32)
    stored = pages.keys[int(pages.tables[0, 0])].transpose(1, 0, 2).astype(mx.float32)
    assert np.array_equal(np.array(stored), np.array(want))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_writing_leaves_the_pool_where_it_is(dtype: mx.Dtype) -> None:
    pages = Pages([4, 3000], dtype=dtype, size=64)
    before = address_of(pages.keys), address_of(pages.values)
    bytes_before = mx.get_active_memory()
    mx.reset_peak_memory()
    for t in range(4):
        pages.step(Chunk(0, t, 1))
        assert (address_of(pages.keys), address_of(pages.values)) == before
    assert mx.get_peak_memory() - bytes_before < pages.keys.nbytes // 4


def test_writing_touches_only_its_own_slots() -> None:
    pages = Pages([20, 20], block_size=4)
    pages.step(Chunk(0, 0, 7))
    used = [int(pages.tables[0, 0]), int(pages.tables[0, 1])]
    written = ~np.isnan(np.array(pages.keys)).any(axis=(1, 3))  # [num_blocks, block_size]
    assert written[used[0]].tolist() == [True] * 4
    assert written[used[1]].tolist() == [True] * 3 + [False]
    assert written.sum() == 7


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_reading_neither_writes_nor_copies_the_pool(dtype: mx.Dtype) -> None:
    pages = Pages([40, 3000], dtype=dtype, size=64)
    pages.step(Chunk(0, 0, 40))
    before = np.array(pages.keys.astype(mx.float32))
    q, rows = mx.zeros((1, 9, 2, 64)), mx.zeros(2, mx.int32)
    bytes_before = mx.get_active_memory()
    mx.reset_peak_memory()
    where = mx.array(pages.tables), rows, mx.array([39, 3], mx.int32)
    out = kernels.paged_attention(q, pages.keys, pages.values, *where, 1.0)
    mx.eval(out)
    assert mx.get_peak_memory() - bytes_before < pages.keys.nbytes // 4
    assert np.isfinite(np.array(out)).all()
    assert np.array_equal(np.array(pages.keys.astype(mx.float32)), before, equal_nan=True)


def test_reading_takes_views_of_a_pool() -> None:
    """Unlike a write, whose copy would be lost: [block_size, blocks, Hkv, D] turned round."""
    pool = mx.array(normal(16, 4, 2, 32)).transpose(1, 2, 0, 3)
    q = mx.array(normal(1, 4, 2, 32, seed=8))
    where = mx.array([[3, 1]], mx.int32), mx.zeros(2, mx.int32), mx.array([16, 30], mx.int32)
    from_view = kernels.paged_attention(q, pool, 2 * pool, *where, 1.0)
    dense = mx.contiguous(pool)
    from_dense = kernels.paged_attention(q, dense, 2 * dense, *where, 1.0)
    assert np.array_equal(np.array(from_view), np.array(from_dense))


@pytest.mark.parametrize("spoilt", ["slot", "row", "position", "table"])
@pytest.mark.parametrize("value", [-1, 2**20])
def test_a_token_with_an_index_out_of_range_gets_nan_and_its_neighbour_does_not(
    spoilt: str, value: int
) -> None:
    q = k = mx.array(normal(1, 2, 2, 32))
    pool = mx.zeros((4, 2, 16, 32))
    slots, rows, positions, tables = [0, 16], [0, 1], [0, 0], [[0], [1]]
    for name, indices in (("slot", slots), ("row", rows), ("position", positions)):
        if name == spoilt:
            indices[1] = value
    if spoilt == "table":
        tables[1][0] = value
    where = [mx.array(a, mx.int32) for a in (slots, tables, rows, positions)]
    if spoilt != "slot":
        read = kernels.paged_attention(q, pool, pool + 0, *where[1:], 1.0)
        assert np.isfinite(np.array(read[:, :, 0])).all()
        assert np.isnan(np.array(read[:, :, 1])).all()
    out, _, _ = kernels.write_and_attend(q, k, k, pool, pool + 0, *where, 1.0)
    assert np.isfinite(np.array(out[:, :, 0])).all()
    assert np.isnan(np.array(out[:, :, 1])).all()


# ---- attention over pages, in a window ----

WINDOWS = [1, 2, 31, 32, 33, 64, 100]  # shorter than a tile of 32, longer, and longer than the sequence


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 256])
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (4, 1)])
def test_attention_in_a_window_agrees_with_float64(
    heads: tuple[int, int], size: int, dtype: mx.Dtype
) -> None:
    """Oracle: float64 over the stored values, for each position of a sequence, window and block size."""
    in_blocks = [Pages([75], heads=heads, size=size, dtype=dtype, block_size=n) for n in (1, 4, 16, 32)]
    for window in WINDOWS:
        in_blocks[0].window = window
        want = attention_oracle(in_blocks[0], 0, dtype)
        for pages in in_blocks:
            pages.window = window
            np.testing.assert_allclose(pages.step(Chunk(0, 0, 75))[0], want, atol=3e-6)


@pytest.mark.parametrize("window", [1, 7, 32, 50])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_chunks_and_decodes_in_one_step_see_their_own_windows(block_size: int, window: int) -> None:
    """Oracle: float64, each sequence by itself."""
    pages = Pages([150, 41, 97, 20], block_size=block_size, window=window)
    pages.step(Chunk(0, 0, 60), Chunk(1, 0, 40), Chunk(2, 0, 96))
    chunks = Chunk(1, 40, 1), Chunk(0, 60, 90), Chunk(2, 96, 1), Chunk(3, 0, 20)
    for chunk, out in zip(chunks, pages.step(*chunks), strict=True):
        want = attention_oracle(pages, chunk.sequence, mx.float32)
        np.testing.assert_allclose(out, want[chunk.first : chunk.first + chunk.count], atol=2e-6)


@pytest.mark.parametrize("window", [100, 2**31 - 1, 2**31, 2**62])
def test_a_window_as_long_as_the_sequence_changes_no_bit(window: int) -> None:
    pages = Pages([100])
    (want,) = pages.step(Chunk(0, 0, 100))
    pages.window = window
    assert np.array_equal(pages.step(Chunk(0, 0, 100))[0], want)


@pytest.mark.parametrize("spoilt", [-1, -(2**31), 2**31 - 1, "not a number", "infinite"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_blocks_before_the_window_may_be_anything(block_size: int, spoilt: int | str) -> None:
    """Oracle: the bits before the table was spoilt, with no blocks at all or a broken neighbour's."""
    for window in WINDOWS[:-1]:
        pages = Pages([120, 32], block_size=block_size, window=window)
        pages.step(Chunk(0, 0, 120), Chunk(1, 0, 32))
        for first, count in ((64, 1), (70, 1), (95, 25), (119, 1)):
            want = pages.read(0, first, count)
            out_of_reach = max(0, first - window + 1) // block_size
            whole = pages.tables.copy()
            if isinstance(spoilt, int):
                pages.tables[0, :out_of_reach] = spoilt
            else:
                broken = float("nan") if spoilt == "not a number" else float("inf")
                pages.keys[int(pages.tables[1, 0])] = pages.values[int(pages.tables[1, 0])] = broken
                pages.tables[0, :out_of_reach] = pages.tables[1, 0]
            assert np.array_equal(pages.read(0, first, count), want)
            pages.tables = whole


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_row_sees_nothing_of_positions_outside_its_window(dtype: mx.Dtype, broken: float) -> None:
    """One broken token: the rows that see it are broken, and all others keep their bits, in one run too."""
    for window in (1, 5, 32, 33):
        sound = Pages([100], dtype=dtype, window=window)
        (want,) = sound.step(Chunk(0, 0, 100))
        for position in (0, 30, 31, 32, 66):
            pages = Pages([100], dtype=dtype, window=window)
            pages.k[0][position] = pages.v[0][position] = broken
            sees = np.zeros(100, dtype=bool)
            sees[position : position + window] = True
            (out,) = pages.step(Chunk(0, 0, 100))
            assert np.array_equal(out[~sees], want[~sees])
            assert not np.isfinite(out[sees]).any()


@pytest.mark.parametrize("window", WINDOWS)
def test_in_a_window_a_token_has_the_same_bits_anywhere_in_its_sequence(window: int) -> None:
    """Oracle: the same tokens near the beginning, moved by a multiple of 32, as tiles do not move."""
    near = Pages([160], block_size=16, window=window)
    near.step(Chunk(0, 0, 160))
    want = near.read(0, 128, 20)
    far = 32 * 100_000
    tables = np.full((1, far // 16 + 10), -1, np.int32)
    tables[:, -10:] = near.tables
    q = mx.array(near.q[0][None, 128:148]).transpose(0, 2, 1, 3)
    where = mx.array(tables), mx.zeros(20, mx.int32), mx.arange(far + 128, far + 148, dtype=mx.int32)
    out = kernels.paged_attention(q, near.keys, near.values, *where, near.scale, window)
    assert np.array_equal(np.array(out)[0].transpose(1, 0, 2), want)


def test_a_decode_in_a_window_costs_the_window_and_not_the_context() -> None:
    """Oracle: the same decode without a window, which visits 10,000 tiles for each that the window has."""
    q, pool = mx.array(normal(1, 3, 1, 64)), mx.array(normal(1, 3, 32, 64))
    position = 32 * 10_000 - 1
    where = mx.zeros((1, 10_000), mx.int32), mx.zeros(1, mx.int32), mx.array([position], mx.int32), 0.125

    def seconds(window: int | None) -> float:
        start = perf_counter()
        mx.eval(kernels.paged_attention(q, pool, pool, *where, window))
        return perf_counter() - start

    assert min(seconds(32) for _ in range(5)) < min(seconds(None) for _ in range(5)) / 20


def test_in_a_window_a_token_without_a_position_gets_nan_and_its_neighbours_do_not() -> None:
    pages = Pages([64], window=5)
    (want,) = pages.step(Chunk(0, 0, 64))
    pages.tables[0, :2] = -1
    q = mx.array(pages.q[0][None, 60:63]).transpose(0, 2, 1, 3)
    where = mx.array(pages.tables), mx.zeros(3, mx.int32), mx.array([60, -1, 62], mx.int32)
    out = kernels.paged_attention(q, pages.keys, pages.values, *where, pages.scale, 5)
    rows = np.array(out)[0].transpose(1, 0, 2)
    assert np.isnan(rows[1]).all()
    assert np.array_equal(rows[[0, 2]], want[[60, 62]])


# ---- wrong input ----

Good = dict[str, object]


def good_attention() -> Good:
    token = mx.zeros(3, mx.int32)
    return {
        "q": mx.zeros((1, 4, 3, 32)), "k": mx.zeros((1, 2, 3, 32)), "v": mx.zeros((1, 2, 3, 32)),
        "key_pool": mx.zeros((5, 2, 16, 32)), "value_pool": mx.zeros((5, 2, 16, 32)), "slots": token,
        "tables": mx.zeros((1, 2), mx.int32), "row_of_token": token, "positions": token, "scale": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": mx.zeros((1, 4, 3, 32), mx.float16)}, "q must be float32, got float16"),
        ({"q": mx.zeros((4, 3, 32))}, "q must have 4 axes"),
        ({"q": mx.zeros((2, 4, 3, 32))}, r"q must have shape \[1, H, T, D\]"),
        ({"q": mx.zeros((1, 5, 3, 32))}, "multiple of Hkv, got H = 5 and Hkv = 2"),
        ({"q": mx.zeros((1, 4, 3, 33))}, "even, from 2 to 512, got 33"),
        ({"q": mx.zeros((1, 4, 3, 514))}, "even, from 2 to 512, got 514"),
        ({"k": mx.zeros((1, 2, 4, 32))}, "k must have shape"),
        ({"v": mx.zeros((1, 1, 3, 32))}, "v must have shape"),
        ({"key_pool": mx.zeros((5, 2, 16, 32), mx.int32)}, "float32, float16 or bfloat16, got int32"),
        ({"key_pool": mx.zeros((5, 1, 16, 32))}, "key_pool must have shape"),
        ({"key_pool": mx.zeros((0, 2, 16, 32))}, "key_pool must not be empty"),
        ({"value_pool": mx.zeros((5, 2, 16, 32), mx.float16)}, "value_pool must be float32"),
        ({"value_pool": mx.zeros((6, 2, 16, 32))}, "value_pool must have shape"),
        ({"slots": mx.zeros(3)}, "slots must be int32"),
        ({"slots": mx.zeros(2, mx.int32)}, "slots must have shape"),
        ({"tables": mx.zeros(2, mx.int32)}, "tables must have 2 axes"),
        ({"row_of_token": mx.zeros(4, mx.int32)}, "row_of_token must have shape"),
        ({"positions": mx.zeros(3, mx.int64)}, "positions must be int32"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -7}, "window must be at least 1, got -7"),
    ],
)
def test_attention_refuses_wrong_arguments(wrong: Good, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.write_and_attend(**(good_attention() | wrong))


READING = ("q", "key_pool", "value_pool", "tables", "row_of_token", "positions", "scale")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": mx.zeros((1, 4, 3, 32), mx.float16)}, "q must be float32, got float16"),
        ({"q": mx.zeros((4, 3, 32))}, "q must have 4 axes"),
        ({"q": mx.zeros((2, 4, 3, 32))}, r"q must have shape \[1, H, T, D\]"),
        ({"q": mx.zeros((1, 5, 3, 32))}, "multiple of Hkv, got H = 5 and Hkv = 2"),
        ({"q": mx.zeros((1, 4, 3, 64))}, "key_pool must have shape"),
        ({"key_pool": mx.zeros((2, 16, 32))}, "key_pool must have 4 axes"),
        ({"value_pool": mx.zeros((5, 2, 16, 32), mx.float16)}, "value_pool must be float32"),
        ({"row_of_token": mx.zeros(4, mx.int32)}, "row_of_token must have shape"),
        ({"positions": mx.zeros(3, mx.int64)}, "positions must be int32"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -7}, "window must be at least 1, got -7"),
    ],
)
def test_reading_attention_refuses_wrong_arguments(wrong: Good, message: str) -> None:
    good = {name: value for name, value in good_attention().items() if name in READING}
    with pytest.raises(ValueError, match=message):
        kernels.paged_attention(**(good | wrong))


# ---- attention over contiguous keys and values ----


def flash(q: tuple[int, ...], kv: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    k = mx.zeros(kv, dtype)
    return kernels.flash_attention(mx.zeros(q, dtype), k, k, 1.0, True)


def flash_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> np.ndarray:
    """Plain attention in float64."""
    group, L, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) * scale
    if causal:
        scores = np.where(np.arange(S) <= np.arange(S - L, S)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("size", [2, 8, 20, 64, 94, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 1)])
def test_flash_attention_agrees_with_float64(heads: tuple[int, int], causal: bool, size: int) -> None:
    for length, total in ((1, 1), (1, 70), (33, 33), (5, 64), (40, 97)):
        q = normal(2, heads[0], length, size)
        k, v = normal(2, heads[1], total, size, seed=8), normal(2, heads[1], total, size, seed=9)
        out = kernels.flash_attention(*map(mx.array, (q, k, v)), size**-0.5, causal)
        np.testing.assert_allclose(
            np.array(out), flash_oracle(q, k, v, size**-0.5, causal), rtol=2e-5, atol=2e-6
        )


def test_large_scores_neither_overflow_nor_lose_the_rest() -> None:
    q, k = normal(1, 1, 3, 16), normal(1, 1, 50, 16, seed=8)
    k[0, 0, 40] = 1e4 * q[0, 0, 1]
    v = normal(1, 1, 50, 16, seed=9)
    out = np.array(kernels.flash_attention(*map(mx.array, (q, k, v)), 1.0, False))
    np.testing.assert_allclose(out, flash_oracle(q, k, v, 1.0, False), rtol=1e-3, atol=1e-5)


@by_property(40)
@given(length=st.integers(1, 60), past=st.integers(0, 60), threads=st.sampled_from(THREADS))
def test_a_row_of_flash_attention_has_the_same_bits_alone(length: int, past: int, threads: int) -> None:
    """A causal row sees the same keys, whether the rows behind it are computed with it or not."""
    total = past + length
    q, k, v = (mx.array(normal(1, heads, total, 24, seed=heads)) for heads in (6, 2, 3))
    v = v[:, :2]
    kernels.set_num_threads(1)
    whole = np.array(kernels.flash_attention(q, k, v, 0.2, True))
    kernels.set_num_threads(threads)
    rows = np.array(kernels.flash_attention(q[:, :, past:], k, v, 0.2, True))
    assert np.array_equal(rows, whole[:, :, past:])
    first = np.array(kernels.flash_attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], 0.2, True))
    assert np.array_equal(first, whole[:, :, :length])


def test_flash_attention_takes_transposed_views() -> None:
    q, k, v = (mx.array(normal(1, 30, heads, 16, seed=heads)) for heads in (6, 2, 3))
    views = [x.swapaxes(1, 2) for x in (q, k, v[:, :, :2])]
    copies = [mx.contiguous(view) for view in views]
    found, expected = (np.array(kernels.flash_attention(*x, 0.25, True)) for x in (views, copies))
    assert np.array_equal(found, expected)


WEIGHT, HALF = mx.zeros((16, 8), mx.uint32), mx.zeros((16, 2), mx.float16)
BLOB = mx.zeros((2, 1, 320), mx.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=48, bits=4), "group_size 48 is not supported"),
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=128, bits=4), "group_size 128 does not divide"),
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=64, bits=4), "scales must have shape"),
        (lambda: kernels.pack(WEIGHT, HALF, HALF, group_size=32, bits=7), "bits 7"),
        (lambda: flash((1, 3, 4, 8), (1, 2, 4, 8)), "q has 3 heads: no multiple of the 2"),
        (lambda: flash((1, 2, 5, 8), (1, 2, 4, 8)), "q has 5 rows, more than the 4 positions"),
        (lambda: flash((1, 2, 4, 8), (1, 2, 0, 8)), "k and v hold no keys"),
        (lambda: flash((1, 2, 4, 8), (2, 2, 4, 8)), "k must have shape"),
        (lambda: flash((1, 2, 4, 8), (1, 2, 4, 8), mx.float16), "q must be float32"),
        (lambda: kernels.pack(WEIGHT.astype(mx.int32), HALF, HALF, group_size=32, bits=4), "weight must be"),
        (
            lambda: kernels.pack(WEIGHT, HALF.astype(mx.bfloat16), HALF, group_size=32, bits=4),
            "scales must be",
        ),
        (
            lambda: kernels.pack(WEIGHT, HALF.astype(mx.float32), HALF, group_size=32, bits=4),
            "biases must be float32",
        ),
        (lambda: kernels.pack(WEIGHT, HALF, HALF[:, :1], group_size=32, bits=4), "biases must have shape"),
        (lambda: kernels.pack(WEIGHT[:, :6], HALF, HALF, group_size=32, bits=4), "multiple of 4 words"),
        (lambda: kernels.pack(WEIGHT[0], HALF, HALF, group_size=32, bits=4), "weight must have 2 axes"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 20, bits=5), "bits 5"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 20, bits=8), "does not hold 8-bit"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 33, bits=4), "out_features 33"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 32)), BLOB, 16, bits=4), "out_features 16"),
        (lambda: kernels.quantized_matmul(mx.zeros((1, 64)), BLOB, 20, bits=4), "K = 32"),
        (
            lambda: kernels.quantized_matmul(mx.zeros((1, 32), mx.float16), BLOB, 20, bits=4),
            "x must be float32",
        ),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32)), mx.zeros((4, 31))), "K = 31"),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32)), mx.zeros((4, 32), mx.int8)), "bfloat16, got int8"),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32), mx.float16), mx.zeros((4, 32))), "x must be float32"),
        (lambda: kernels.dense_matmul(mx.zeros((1, 32)), mx.zeros((0, 32))), "weight must not be empty"),
        (lambda: kernels.dequantize_rows(BLOB, mx.zeros(1), 32, bits=4), "ids must be int32"),
        (lambda: kernels.dequantize_rows(BLOB, mx.zeros(1, mx.int32), 64, bits=4), "in_features 64"),
        (lambda: kernels.rms_norm(mx.zeros((2, 8)), mx.zeros(9), 1e-5), "weight must have shape"),
        (lambda: kernels.rms_norm(mx.zeros((2, 8), mx.float16), mx.zeros(8), 1e-5), "x must be float32"),
        (lambda: kernels.rms_norm(mx.array(1.0), mx.zeros(1), 1e-5), "last axis"),
        (lambda: kernels.swiglu(mx.zeros((2, 8)), mx.zeros((2, 9))), "up must have shape"),
        (lambda: kernels.rope(mx.zeros((1, 1, 2, 7)), mx.zeros(2, mx.int32), mx.zeros(3)), "even last axis"),
        (
            lambda: kernels.rope(mx.zeros((1, 1, 2, 8)), mx.zeros(3, mx.int32), mx.zeros(4)),
            "positions must have",
        ),
        (
            lambda: kernels.rope(mx.zeros((1, 1, 2, 8)), mx.zeros(2, mx.int32), mx.zeros(3)),
            "inv_freq must have",
        ),
        (lambda: kernels.rope(mx.zeros((1, 2, 8)), mx.zeros(2, mx.int32), mx.zeros(4)), "x must have 4 axes"),
        (lambda: kernels.set_num_threads(0), "from 1 to 1024, got 0"),
        (lambda: kernels.zeros(0, (2, 3), mx.float16), "count must be at least 1, got 0"),
        (lambda: kernels.stack_packed([]), "parts must not be empty"),
        (
            lambda: kernels.stack_packed([mx.zeros((1, 2, 320), mx.uint8), mx.zeros((1, 3, 320), mx.uint8)]),
            "parts must have shape .* got .1, 3, 320",
        ),
        (lambda: kernels.select_instruction_set("mmx"), "'mmx' cannot be run here"),
    ],
)
def test_operators_refuse_wrong_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
