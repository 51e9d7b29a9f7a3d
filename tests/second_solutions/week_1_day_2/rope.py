# A second solution of day 1.2, written from the docstrings alone.
"""Rotary position embedding: each pair of a head's values is turned by its position times a frequency.

The pairs are (i, i + D/2), Hugging Face's layout; a GGUF file stores some architectures interleaved
and its reader undoes that. Source: Su et al., "RoFormer" (2021).
"""

import mlx.core as mx


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """Return the angle in radians by which each pair turns per position: [D/2] float32.

    Pair i turns by base ** (-2i / D), where D is head_dim: the first pair by 1 radian whatever the base, each
    further pair more slowly. Fast pairs tell neighbours apart, slow ones distant tokens. In MLX `mx.arange`
    of whole numbers is int32 unless a dtype is given. Raises ValueError for an odd head_dim: one value would
    have no partner.

    >>> inverse_frequencies(4, 16.0).tolist()
    [1.0, 0.25]
    """
    if head_dim % 2 != 0:
        raise ValueError(f"head_dim {head_dim} is odd: one value would have no partner")
    exponents = mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim
    return mx.power(base, -exponents)


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Rotate every pair of values by its token's position times the pair's frequency.

    x [B, H, L, D], positions [L] int32, inv_freq [D/2] -> [B, H, L, D]. Token l is at positions[l]; they
    may be in any order and repeat, and all heads and sequences share them. Pair i is
    (a, b) = (x[i], x[i + D/2]), half a head apart; with angle = position * inv_freq[i] it becomes
    (a cos - b sin, b cos + a sin). The product of a rotated query and a rotated key depends only on how far
    apart the two tokens are. Compute angles in float32, because float16 cannot hold a position above 2048
    exactly; the result has x's type (in MLX float16 times float32 is float32).

    >>> x = mx.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> turned = rope(x, mx.array([1]), mx.array([mx.pi / 2, 0.0]))  # the pair (1, 3) makes a quarter turn
    >>> mx.round(turned).tolist()
    [[[[-3.0, 2.0, 1.0, 4.0]]]]
    """
    angles = positions.astype(mx.float32)[:, None] * inv_freq.astype(mx.float32)
    cos, sin = mx.cos(angles), mx.sin(angles)
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
