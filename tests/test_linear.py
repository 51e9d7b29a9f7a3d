"""Linear layers in three forms: each equals the plain product, and a stack equals its parts bit for bit."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.kernels import twins
from tiny_llm.linear import Linear, LinearLike, quantized_linear
from tiny_llm.stacked_linear import StackedLinear, stack

K = 64


def random_matrix(outputs: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(outputs, K)).astype(np.float32))


def quantized(outputs: int, seed: int, bits: int = 4) -> LinearLike:
    weight, scales, biases = mx.quantize(random_matrix(outputs, seed), group_size=32, bits=bits)
    return quantized_linear(weight, scales.astype(mx.float16), biases.astype(mx.float16), 32, bits)


def dense(outputs: int, seed: int) -> LinearLike:
    return Linear(random_matrix(outputs, seed))


def mixed(outputs: int, seed: int) -> LinearLike:
    return quantized(outputs, seed, bits=8 if seed % 2 else 4)


@pytest.mark.parametrize("make", [quantized, dense, mixed])
@pytest.mark.parametrize("sizes", [(32, 16, 16), (48, 48), (24, 10)])
def test_a_stack_concatenates_the_outputs_of_its_parts(
    make: Callable[[int, int], LinearLike], sizes: tuple[int, ...]
) -> None:
    parts = [make(outputs, seed) for seed, outputs in enumerate(sizes)]
    x = random_matrix(5, seed=99)
    want = np.concatenate([np.array(part(x)) for part in parts], axis=-1)
    assert np.array_equal(np.array(stack(parts)(x)), want)


def test_stacking_packed_matrices_of_whole_tiles_gives_one_packed_matrix() -> None:
    parts = [quantized(32, 1), quantized(16, 2)]
    if any(type(part).__name__ != "PackedLinear" for part in parts):
        pytest.skip("compiled kernels are unavailable, so nothing is packed")
    assert type(stack(parts)) is type(parts[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantized_matmul_agrees_with_its_readable_twin(bits: int) -> None:
    x = random_matrix(3, seed=7)
    fast = quantized(40, 5, bits)
    with twins():
        readable = quantized(40, 5, bits)
        want_product, want_rows = np.array(readable(x)), np.array(readable.rows(mx.array([0, 39, 7])))
    assert np.linalg.norm(np.array(fast(x)) - want_product) < 1e-4 * np.linalg.norm(want_product)
    assert np.array_equal(np.array(fast.rows(mx.array([0, 39, 7], mx.int32))), want_rows)


def test_rows_of_a_stack_cannot_be_looked_up() -> None:
    with pytest.raises(TypeError, match="looking up rows is not supported"):
        StackedLinear((dense(4, 1),)).rows(mx.array([0]))
