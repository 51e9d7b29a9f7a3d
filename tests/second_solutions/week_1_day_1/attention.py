"""Scaled dot-product attention: base 2, a mask from triangles, scaled queries."""

import math

import mlx.core as mx


def softmax(x: mx.array) -> mx.array:
    """Powers of 2 of the scores in bits: 2 ** (x / ln 2) is e ** x."""
    bits = (x - x.max(axis=-1, keepdims=True)) * (1 / math.log(2))
    powers = mx.power(2.0, bits)
    return powers / powers.sum(axis=-1, keepdims=True)


def causal_mask(length: int, total: int) -> mx.array:
    """Everything is hidden above a diagonal that ends in the last corner."""
    if length < 0 or length > total:
        raise ValueError(f"{length} of {total} tokens")
    return mx.triu(mx.full((length, total), -mx.inf), k=total - length + 1)


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """The queries are scaled, not the scores."""
    visible = mx.zeros((1,)) if mask is None else mask
    return softmax(mx.matmul(q * scale, mx.moveaxis(k, -1, -2)) + visible) @ v
