"""A model's matrices, each in its stored form: dense, quantized, or packed for the kernels.

A matrix is one object that multiplies and looks up rows, so an embedding and the output projection tied to it
are one matrix in memory. The loader makes these objects; the model only calls them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from .kernels import accelerated, compiled_kernel, is_reference, use_compiled
from .quantize import dequantize, quantized_matmul

PACKED_TILE = 16  # outputs in one tile of the compiled kernels' layout
PACKED_GROUP = 32  # inputs that share a scale in that layout


class LinearLike(Protocol):
    """A matrix W [N, K] with an optional bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> x W^T + bias, [..., N]."""

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows of the matrix by index, without the bias: ids [...] -> [..., K] in float32."""


@accelerated(compiled="dense_matmul")
def dense_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """Multiply x [..., K] by the transpose of weight [N, K] -> [..., N], summed in x's type."""
    return x @ weight.astype(x.dtype).T


@dataclass(frozen=True)
class Linear:
    """A dense matrix: weight [N, K] in float32, float16 or bfloat16, as in the checkpoint."""

    weight: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> [..., N]."""
        return dense_matmul(x, self.weight)

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows: ids [...] -> [..., K] in float32."""
        return self.weight[ids].astype(mx.float32)


@dataclass(frozen=True)
class QuantizedLinear:
    """A matrix in MLX's quantized layout.

    weight [N, K * bits / 32], scales and biases [N, K / group_size].
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> [..., N]."""
        return quantized_matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows: ids [...] -> [..., K], dequantized."""
        return dequantize(self.weight[ids], self.scales[ids], self.biases[ids], self.group_size, self.bits)


@dataclass(frozen=True)
class PackedLinear:
    """A quantized matrix repacked for the compiled kernels, in one array of bytes.

    A product rounds x to integers of `activation_bits`, in groups of 32 that share a scale: see
    ARCHITECTURE.md, "Kernels".
    """

    packed: mx.array
    in_features: int
    out_features: int
    bits: int
    activation_bits: int = 16

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> [..., N]."""
        bits = {"bits": self.bits, "activation_bits": self.activation_bits}
        out: mx.array = compiled_kernel("quantized_matmul")(x, self.packed, self.out_features, **bits)
        return out

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows: ids [...] -> [..., K], dequantized."""
        out: mx.array = compiled_kernel("dequantize_rows")(self.packed, ids, self.in_features, bits=self.bits)
        return out


@dataclass(frozen=True)
class BiasedLinear:
    """A matrix in any form, and a bias [N] that is added to its products."""

    matrix: LinearLike
    bias: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> x W^T + bias, [..., N]."""
        return self.matrix(x) + self.bias

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows of the matrix, without the bias: ids [...] -> [..., K]."""
        return self.matrix.rows(ids)


@dataclass(frozen=True)
class ScaledRows:
    """A matrix whose rows are multiplied by a scale when they are looked up; products are not scaled.

    Gemma scales its embedding, but not the output projection, which is the same matrix.
    """

    matrix: LinearLike
    scale: float

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> [..., N], unscaled."""
        return self.matrix(x)

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows: ids [...] -> [..., K], scaled."""
        return self.matrix.rows(ids) * self.scale


def stack_packed(parts: Sequence[LinearLike]) -> PackedLinear | None:
    """Join matrices that are packed for the compiled kernels into one; None if they cannot be joined.

    They can be joined if all are packed, have the same inputs and bits, and consist of whole tiles.
    """
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    if len(packed) < len(parts) or any(part.out_features % PACKED_TILE for part in packed):
        return None
    if len({(part.packed.shape[1:], part.bits) for part in packed}) > 1:
        return None
    blob: mx.array = compiled_kernel("stack_packed")([part.packed for part in packed])
    mx.eval(blob)  # so that the parts can be freed
    return replace(packed[0], packed=blob, out_features=sum(part.out_features for part in packed))


def dense_linear(weight: mx.array) -> LinearLike:
    """Make a dense matrix of weight [N, K], evaluated, so that the arrays it was made from can be freed."""
    mx.eval(weight)
    return Linear(weight)


def quantized_linear(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    *,
    activation_bits: int = 16,
) -> LinearLike:
    """Make the best form of a quantized matrix for this device: packed if the compiled kernels run.

    Packing changes none of the matrix's numbers: scales and biases are stored in float16 if it holds all of
    them exactly, otherwise in float32. A matrix stays in MLX's layout if its group size is not a multiple of
    the kernels'.
    """
    packs = use_compiled() and is_reference(quantized_matmul) and group_size % PACKED_GROUP == 0
    if not packs:
        mx.eval(weight, scales, biases)
        return QuantizedLinear(weight, scales, biases, group_size, bits)
    scale_type = mx.float16 if _fits_float16(scales) and _fits_float16(biases) else mx.float32
    scales, biases = scales.astype(scale_type), biases.astype(scale_type)
    packed = compiled_kernel("pack")(weight, scales, biases, group_size=group_size, bits=bits)
    mx.eval(packed)
    in_features = weight.shape[-1] * 32 // bits
    wide = compiled_kernel("packed_bits")(bits)
    return PackedLinear(packed, in_features, weight.shape[0], wide, activation_bits)


def _fits_float16(values: mx.array) -> bool:
    """True if float16 holds every value exactly."""
    if values.dtype == mx.float16:
        return True
    narrow = values.astype(mx.float16).astype(values.dtype)
    return bool(mx.array_equal(narrow, values))
