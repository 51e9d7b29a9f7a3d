"""Rotary position embedding: each pair of a head's values is turned by its position times a frequency.

The pairs are (i, i + D/2), Hugging Face's layout; a GGUF file stores some architectures interleaved
and its reader undoes that. Source: Su et al., "RoFormer" (2021).
"""

import mlx.core as mx

from .kernels import accelerated


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """[D/2] float32: base ** (-2i / D), radians per position of each pair. ValueError for an odd head_dim."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    return mx.power(base, -mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)


@accelerated(compiled="rope")
def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Rotate x [B, H, L, D] by positions [L] (int32) with inv_freq [D/2] -> [B, H, L, D].

    For each pair (a, b) = (x[i], x[i + D/2]) and angle = position * inv_freq[i]:
    (a cos - b sin, b cos + a sin). Angles are computed in float32, and the result has x's type.
    """
    angles = positions[:, None].astype(mx.float32) * inv_freq  # [L, D/2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
