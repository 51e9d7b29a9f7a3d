"""Matrices of a model, in the form that they are stored in: dense, quantized, or packed for the kernels.

Each is one object that multiplies and that looks rows up, so that an embedding and the output
projection tied to it are one matrix, held once. The loader makes them; the model only calls them.
"""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from .kernels import compiled_kernel, is_reference, use_compiled
from .quantize import dequantize, quantized_matmul


class LinearLike(Protocol):
    """A matrix [N, K] with an optional bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> x W^T + bias [..., N]."""

    def rows(self, ids: mx.array) -> mx.array:
        """Rows of W by index: ids [...] -> [..., K] in float32."""


@dataclass(frozen=True)
class Linear:
    """A dense matrix: weight [N, K]."""

    weight: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return x @ self.weight.T

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K]."""
        return self.weight[ids]


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

    Products take x in 16-bit integers, by groups of 32: see ARCHITECTURE.md, "Kernels".
    """

    packed: mx.array
    in_features: int
    out_features: int
    bits: int

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        out: mx.array = compiled_kernel("quantized_matmul")(x, self.packed, self.out_features, bits=self.bits)
        return out

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K], dequantized."""
        out: mx.array = compiled_kernel("dequantize_rows")(self.packed, ids, self.in_features, bits=self.bits)
        return out


def quantized_linear(
    weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> LinearLike:
    """The best form of a quantized matrix on this device: packed where the compiled kernels run."""
    in_features = weight.shape[-1] * 32 // bits
    packs = use_compiled() and is_reference(quantized_matmul) and group_size == 32 and bits in (4, 8)
    if not packs:
        return QuantizedLinear(weight, scales, biases, group_size, bits)
    packed = compiled_kernel("pack")(weight, scales, biases, group_size=group_size, bits=bits)
    return PackedLinear(packed, in_features, weight.shape[0], bits)
