# A second solution of day 1.2, written only from the docstrings.
"""Rotary position embedding: rotates each pair of a head's values by the token's position times a frequency.

A head is one of several attention operations that run side by side; it has D values in each token's query,
key and value. The pairs are (i, i + D/2), as in Hugging Face's checkpoints (the files of a model's weights).
GGUF files store some architectures with interleaved pairs; the GGUF reader undoes that. Source: Su et al.,
"RoFormer" (2021).
"""

import mlx.core as mx


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    if head_dim % 2 != 0:
        raise ValueError(f"head_dim {head_dim} is odd: one value would have no partner")
    exponents = mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim
    return mx.power(base, -exponents)


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    angles = positions.astype(mx.float32)[:, None] * inv_freq.astype(mx.float32)
    cos, sin = mx.cos(angles), mx.sin(angles)
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
