"""Rotary positions by complex numbers, with frequencies from logarithms."""

from math import log, pi

import mlx.core as mx


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """e to the power of -ln(base) times 0, 2/D, 4/D and so on."""
    pairs, left_over = divmod(head_dim, 2)
    if left_over:
        raise ValueError(f"a head of {head_dim} values has one without a partner")
    return mx.exp(mx.arange(pairs).astype(mx.float32) * (-2 * log(base) / head_dim))


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


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """A pair is a complex number; a rotation is a product with e^(i angle)."""
    half = x.shape[-1] // 2
    angles = mx.outer(positions.astype(mx.float32), inv_freq)
    turns = mx.cos(angles) + 1j * mx.sin(angles)
    wide = x.astype(mx.float32)
    turned = (wide[..., :half] + 1j * wide[..., half:]) * turns
    return mx.concatenate([mx.real(turned), mx.imag(turned)], axis=-1).astype(x.dtype)
