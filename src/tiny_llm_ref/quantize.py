"""Weights in a few bits: groups of values share a scale and a bias, and a value is scale * q + bias.

MLX's layout: a row is one stream of bits in uint32 words, lowest bits first, groups along the input
axis. The readable matmul unpacks the weights; the fast ones never do.
"""

import mlx.core as mx

from .kernels import accelerated


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """weight [..., K * bits / 32] uint32, scales and biases [..., K / group_size] -> [..., K] float32.

    bits: 2, 3, 4, 5, 6 or 8. Value i of a row is the bits i * bits .. i * bits + bits - 1 of the row's
    words, so with 3, 5 and 6 bits it may lie in two of them.
    """
    first_bit = mx.arange(weight.shape[-1] * 32 // bits, dtype=mx.uint32) * bits  # [K]
    word, shift = first_bit // 32, first_bit % 32
    low = weight[..., word] >> shift
    next_word = mx.minimum(word + 1, weight.shape[-1] - 1)
    high = mx.where(shift + bits > 32, weight[..., next_word] << (32 - shift), 0)
    q = (low | high) & ((1 << bits) - 1)
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
