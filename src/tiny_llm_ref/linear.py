"""Matrices of a model, in the form that they are stored in: dense, quantized, or packed for the kernels.

Each is one object that multiplies and that looks rows up, so that an embedding and the output
projection tied to it are one matrix, held once. The loader makes them; the model only calls them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from .kernels import accelerated, compiled_kernel, is_reference, use_compiled
from .quantize import dequantize, quantized_matmul

PACKED_TILE = 16  # outputs in one tile of the compiled kernels' layout
PACKED_GROUP = 32  # inputs that share a scale in it


class LinearLike(Protocol):
    """A matrix [N, K] with an optional bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> x W^T + bias, [..., N]."""

    def rows(self, ids: mx.array) -> mx.array:
        """Look up rows of W by index, without the bias: ids [...] -> [..., K] in float32."""


@accelerated(compiled="dense_matmul")
def dense_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., K] times the transpose of weight [N, K] -> [..., N], summed in x's type."""
    return x @ weight.astype(x.dtype).T


@dataclass(frozen=True)
class Linear:
    """A dense matrix: weight [N, K] in float32, float16 or bfloat16, as the checkpoint has it."""

    weight: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return dense_matmul(x, self.weight)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K] in float32."""
        return self.weight[ids].astype(mx.float32)


@dataclass(frozen=True)
class QuantizedLinear:
    """A matrix in MLX's quantized layout: weight [N, K*bits/32], scales and biases [N, K/group_size]."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return quantized_matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K], dequantized."""
        return dequantize(self.weight[ids], self.scales[ids], self.biases[ids], self.group_size, self.bits)


@dataclass(frozen=True)
class PackedLinear:
    """A quantized matrix repacked for the compiled kernels, in one blob of bytes.

    Products take x in integers of `activation_bits`, by groups of 32: see ARCHITECTURE.md, "Kernels".
    """

    packed: mx.array
    in_features: int
    out_features: int
    bits: int
    activation_bits: int = 16

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        bits = {"bits": self.bits, "activation_bits": self.activation_bits}
        out: mx.array = compiled_kernel("quantized_matmul")(x, self.packed, self.out_features, **bits)
        return out

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K], dequantized."""
        out: mx.array = compiled_kernel("dequantize_rows")(self.packed, ids, self.in_features, bits=self.bits)
        return out


@dataclass(frozen=True)
class BiasedLinear:
    """A matrix in any form, and a bias [N] that is added to its products."""

    matrix: LinearLike
    bias: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> x W^T + bias [..., N]."""
        return self.matrix(x) + self.bias

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K]: rows of the matrix, without the bias."""
        return self.matrix.rows(ids)


@dataclass(frozen=True)
class ScaledRows:
    """A matrix whose rows are multiplied by a scale when they are looked up; products have no scale.

    Gemma's embedding: the output projection tied to it is the same matrix without the scale.
    """

    matrix: LinearLike
    scale: float

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N], unscaled."""
        return self.matrix(x)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K], scaled."""
        return self.matrix.rows(ids) * self.scale


def stack_packed(parts: Sequence[LinearLike]) -> PackedLinear | None:
    """Join matrices that are packed for the compiled kernels into one; None if they cannot be joined.

    They can if all are packed, have the same inputs and bits, and consist of whole tiles.
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
    """A dense matrix [N, K], evaluated, so that what it was made from can go."""
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
    """The best form of a quantized matrix on this device: packed where the compiled kernels run.

    Packed, a matrix says the same numbers exactly: scales and biases in float16 where that holds all of
    them, in float32 otherwise. One whose groups are no multiples of the kernels' stays in MLX's layout.
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
    """True where float16 holds every one of the values exactly."""
    if values.dtype == mx.float16:
        return True
    narrow = values.astype(mx.float16).astype(values.dtype)
    return bool(mx.array_equal(narrow, values))
