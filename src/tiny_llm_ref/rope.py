"""Rotary position embedding: each pair of a head's values is turned by its position times a frequency.

The pairs are (i, i + D/2), Hugging Face's layout; a GGUF file stores some architectures interleaved
and its reader undoes that. Source: Su et al., "RoFormer" (2021).
"""

from math import pi

import mlx.core as mx

from .kernels import accelerated


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """[D/2] float32: base ** (-2i / D), radians per position of each pair. ValueError for an odd head_dim."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    return mx.power(base, -mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)


def llama3_factors(
    head_dim: int,
    base: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """What llama 3.1 divides each of the head_dim / 2 frequencies by, to reach beyond its first context.

    A pair that turns fewer than `low_freq_factor` times over the original context is slowed down by `factor`,
    one that turns more than `high_freq_factor` times is left alone, and between them the two are mixed.
    Source: the Llama 3.1 release.
    """
    if not 0.0 < low_freq_factor < high_freq_factor or factor <= 0.0:
        raise ValueError(
            f"rope scaling needs factor > 0 and 0 < low_freq_factor < high_freq_factor, not {factor}, "
            f"{low_freq_factor} and {high_freq_factor}"
        )
    factors = []
    for pair in range(head_dim // 2):
        turns = original_context * base ** (-2 * pair / head_dim) / (2 * pi)
        kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        factors.append(1 / (kept + (1 - kept) / factor))
    return tuple(factors)


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
