"""Weights in a few bits: groups of values share a scale and a bias, and a value is scale * q + bias.

MLX's layout: a row is one stream of bits in uint32 words, lowest bits first, groups along the input
axis. The readable matmul unpacks the weights; the fast ones never do.
"""

import mlx.core as mx

from tiny_llm_checkpoints.quantized import Quantized

from .kernels import accelerated


def quantize(w: mx.array, group_size: int, bits: int) -> Quantized:
    """The nearest to w [N, K] in `bits` bits: the steps of a group go from its least value to its greatest.

    bits: 2, 3, 4, 5, 6 or 8; group_size divides K, and 32 divides K * bits. A group's bias is its least
    value, its scale a step: both have w's type, and each value becomes the q from 0 to 2^bits - 1 whose
    scale * q + bias, with scale and bias as they are stored, is nearest. A group of equal values is exact.
    """
    groups = w.reshape(w.shape[0], -1, group_size)
    biases = mx.min(groups, axis=-1)
    scales = (mx.max(groups, axis=-1) - biases) / (2**bits - 1)
    scales = mx.where(scales == 0, 1, scales).astype(w.dtype)
    wide = groups.astype(mx.float32)
    q = mx.round((wide - biases[..., None].astype(mx.float32)) / scales[..., None].astype(mx.float32))
    q = mx.clip(q, 0, 2**bits - 1).astype(mx.uint32).reshape(*w.shape, 1)
    stream = (q >> mx.arange(bits, dtype=mx.uint32)) & 1  # [N, K, bits], lowest bit first
    words = stream.reshape(w.shape[0], -1, 32) << mx.arange(32, dtype=mx.uint32)
    return Quantized(mx.sum(words, axis=-1), scales, biases, group_size, bits)


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
    """x [..., K] times the transpose of a quantized weight [N, K] -> [..., N], in float32 for float32 x."""
    return x @ dequantize(weight, scales, biases, group_size, bits).T
