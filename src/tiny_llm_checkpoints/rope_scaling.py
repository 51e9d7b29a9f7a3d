"""Scaling of rotary frequencies for contexts longer than the original one: one factor per frequency."""

from math import pi


def llama3_factors(
    head_dim: int,
    base: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """Llama 3.1's divisors of the head_dim / 2 rotary frequencies, which extend the context.

    A pair that makes fewer than `low_freq_factor` rotations over the original context is slowed down by
    `factor`; one that makes more than `high_freq_factor` is unchanged; in between, the two are interpolated.
    Source: the Llama 3.1 release.
    """
    if not 0.0 < low_freq_factor < high_freq_factor or factor <= 0.0:
        raise ValueError(
            f"rope scaling needs factor > 0 and 0 < low_freq_factor < high_freq_factor, not {factor}, "
            f"{low_freq_factor} and {high_freq_factor}"
        )
    factors = []
    for pair in range(head_dim // 2):
        rotations = original_context * base ** (-2 * pair / head_dim) / (2 * pi)
        unscaled = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
        unscaled = min(1.0, max(0.0, unscaled))
        factors.append(1 / (unscaled + (1 - unscaled) / factor))
    return tuple(factors)
