"""Weights in a few bits: groups of values share a scale and a bias, and a value is scale * q + bias.

MLX's layout: values of `bits` bits packed into uint32 words, lowest bits first, groups along the
input axis. The readable matmul unpacks the weights; the fast ones never do.
"""

import mlx.core as mx

from .kernels import accelerated


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """weight [..., K * bits / 32] uint32, scales and biases [..., K / group_size] -> [..., K] float32."""
    per_word = 32 // bits
    shifts = mx.arange(per_word, dtype=mx.uint32) * bits
    q = (weight[..., None] >> shifts) & ((1 << bits) - 1)  # [..., words, per_word]
    groups = q.astype(mx.float32).reshape(*weight.shape[:-1], -1, group_size)
    values = groups * scales[..., None].astype(mx.float32) + biases[..., None].astype(mx.float32)
    return values.reshape(*weight.shape[:-1], -1)


def _fused(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


@accelerated(fused=_fused)
def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """x [..., K] times the transpose of a quantized weight [N, K] -> [..., N]."""
    return x @ dequantize(weight, scales, biases, group_size, bits).T
