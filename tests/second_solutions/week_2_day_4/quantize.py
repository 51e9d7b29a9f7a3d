"""Weights in a few bits: a value is scale * q + bias, and groups of values share a scale and a bias.

q is an integer of a few bits. The layout is MLX's: a row is one stream of bits in uint32 words, lowest bits
first; groups are along the input axis. The readable matmul unpacks the weights; the fast ones never do.
"""

import mlx.core as mx

from tiny_llm_checkpoints.quantized import Quantized


def pack_bits(q: mx.array, bits: int) -> mx.array:
    stream = (q[:, :, None] >> mx.arange(bits, dtype=mx.uint32)) & 1  # [N, K, bits]
    by_word = stream.reshape(q.shape[0], -1, 32)
    return mx.sum(by_word << mx.arange(32, dtype=mx.uint32), axis=-1)


def unpack_bits(words: mx.array, bits: int) -> mx.array:
    stream = (words[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1  # [..., W, 32]
    by_number = stream.reshape(*words.shape[:-1], -1, bits)
    return mx.sum(by_number << mx.arange(bits, dtype=mx.uint32), axis=-1)


def quantize(w: mx.array, group_size: int, bits: int) -> Quantized:
    rows, columns = w.shape
    groups = w.reshape(rows, columns // group_size, group_size).astype(mx.float32)
    largest_q = 2**bits - 1
    low = mx.min(groups, axis=-1)
    step = (mx.max(groups, axis=-1) - low) / largest_q
    scales, biases = step.astype(w.dtype), low.astype(w.dtype)
    scales = mx.where(scales == 0, mx.ones_like(scales), scales)
    stored_scale, stored_bias = (a.astype(mx.float32)[:, :, None] for a in (scales, biases))
    q = mx.clip(mx.round((groups - stored_bias) / stored_scale), 0, largest_q).astype(mx.uint32)
    return Quantized(pack_bits(q.reshape(rows, columns), bits), scales, biases, group_size, bits)


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    q = unpack_bits(weight, bits).astype(mx.float32)
    groups = q.reshape(*q.shape[:-1], -1, group_size)
    values = scales.astype(mx.float32)[..., None] * groups + biases.astype(mx.float32)[..., None]
    return values.reshape(q.shape)


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    return x @ dequantize(weight, scales, biases, group_size, bits).T
