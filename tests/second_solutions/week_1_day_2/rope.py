"""Rotary positions by complex numbers, with frequencies from logarithms."""

from math import log

import mlx.core as mx


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """e to the power of -ln(base) times 0, 2/D, 4/D and so on."""
    pairs, left_over = divmod(head_dim, 2)
    if left_over:
        raise ValueError(f"a head of {head_dim} values has one without a partner")
    return mx.exp(mx.arange(pairs).astype(mx.float32) * (-2 * log(base) / head_dim))


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """A pair is a complex number; a rotation is a product with e^(i angle)."""
    half = x.shape[-1] // 2
    angles = mx.outer(positions.astype(mx.float32), inv_freq)
    turns = mx.cos(angles) + 1j * mx.sin(angles)
    wide = x.astype(mx.float32)
    turned = (wide[..., :half] + 1j * wide[..., half:]) * turns
    return mx.concatenate([mx.real(turned), mx.imag(turned)], axis=-1).astype(x.dtype)
