"""Few bits a value: rows are packed as long integers of Python, and read bit by bit."""

from typing import NamedTuple

import mlx.core as mx


class Quantized(NamedTuple):
    """A matrix in MLX's layout."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


def pack_bits(q: mx.array, bits: int) -> mx.array:
    """A row is one integer."""
    streams = [sum(number << (bits * i) for i, number in enumerate(row)) for row in _rows(q)]
    words = range(q.shape[1] * bits // 32)
    return mx.array([[(stream >> (32 * word)) % 2**32 for word in words] for stream in streams], mx.uint32)


def unpack_bits(words: mx.array, bits: int) -> mx.array:
    """All bits, `bits` at a time."""
    stream = mx.bitwise_and(words[..., None] >> mx.arange(32, dtype=mx.uint32), 1)
    numbers = stream.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits, bits)
    return (numbers << mx.arange(bits, dtype=mx.uint32)).sum(axis=-1)


def quantize(w: mx.array, group_size: int, bits: int) -> Quantized:
    """Every value has its scale and bias beside it."""
    groups = w.reshape(w.shape[0], w.shape[1] // group_size, group_size)
    least = groups.min(axis=-1)
    step = ((groups.max(axis=-1) - least) / (2**bits - 1)).astype(w.dtype)
    step = mx.where(step > 0, step, mx.ones_like(step))
    scale, bias = (mx.repeat(x.astype(mx.float32), group_size, axis=-1) for x in (step, least))
    steps = mx.round((w.astype(mx.float32) - bias) / scale)
    q = mx.minimum(mx.maximum(steps, 0), 2**bits - 1).astype(mx.uint32)
    return Quantized(pack_bits(q, bits), step, least, group_size, bits)


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """Scales and biases are repeated."""
    scale, bias = (mx.repeat(x.astype(mx.float32), group_size, axis=-1) for x in (scales, biases))
    return bias + scale * unpack_bits(weight, bits).astype(mx.float32)


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Use MLX's own operator: unpacking all matrices of the real model in every step is too slow."""
    return mx.quantized_matmul(x, weight, scales, biases, True, group_size, bits)


def _rows(q: mx.array) -> list[list[int]]:
    rows: list[list[int]] = q.tolist()  # type: ignore[assignment]
    return rows
