"""What a configuration says about rotary frequencies beyond the first context: one factor for each pair."""

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
