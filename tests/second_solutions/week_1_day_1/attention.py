"""Scaled dot-product attention in plain MLX operators: slow and simple. Faster kernels are tested against it.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
"""

import mlx.core as mx


def softmax(x: mx.array) -> mx.array:
    scores = x.astype(mx.float32)
    weights = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(x.dtype)


def causal_mask(length: int, total: int) -> mx.array:
    if not 0 <= length <= total:
        raise ValueError(f"length must be in 0 .. {total}, not {length}")
    positions = mx.arange(total)
    own = mx.arange(total - length, total)[:, None]
    return mx.where(positions <= own, 0.0, -mx.inf)


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    scores = q @ k.swapaxes(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    return softmax(scores) @ v
