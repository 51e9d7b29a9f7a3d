"""Scaled dot-product attention on MLX arrays, written out: the oracle of everything faster.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
"""

import mlx.core as mx


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, [..., S] -> [..., S]; a row of -inf and one finite value is exact."""
    shifted = x - mx.max(x, axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    return weights / mx.sum(weights, axis=-1, keepdims=True)


def causal_mask(length: int, total: int) -> mx.array:
    """Additive mask [length, total] for the last `length` of `total` tokens: 0 where a token may look.

    Row i is the token at position `total - length + i`; it sees positions up to its own, and the
    rest is -inf. Raises ValueError for a length below 0 or above total.
    """
    if not 0 <= length <= total:
        raise ValueError(f"length must be between 0 and total ({total}), not {length}")
    positions = mx.arange(total - length, total)[:, None]
    return mx.where(mx.arange(total)[None, :] <= positions, 0.0, -mx.inf)


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """softmax(q k^T * scale + mask) v.

    q [..., L, D], k and v [..., S, D], mask broadcastable to [..., L, S] -> [..., L, D]. The axes in front
    broadcast too, as in any matrix product.
    """
    scores = (q @ k.swapaxes(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    return softmax(scores) @ v
