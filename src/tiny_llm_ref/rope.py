"""Rotary position embedding: rotates each pair of a head's values by the token's position times a frequency.

A head is one of several attention operations that run side by side; it has D values in each token's query,
key and value. The pairs are (i, i + D/2), as in Hugging Face's checkpoints (the files of a model's weights).
GGUF files store some architectures with interleaved pairs; the GGUF reader undoes that. Source: Su et al.,
"RoFormer" (2021).
"""

import mlx.core as mx

from .kernels import accelerated


def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """Return the angle in radians by which each pair is rotated per position: [D/2] float32.

    Pair i is rotated by base ** (-2i / D), where D is head_dim: the first pair by 1 radian whatever the base,
    each later pair by less. Fast pairs tell neighbouring tokens apart, slow pairs distant ones. In MLX
    `mx.arange` of whole numbers is int32 unless you pass a dtype. Raises ValueError for an odd head_dim,
    because one value would have no partner.

    >>> inverse_frequencies(4, 16.0).tolist()
    [1.0, 0.25]
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    return mx.power(base, -mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)


@accelerated(compiled="rope")
def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Rotate every pair of values by its token's position times the pair's frequency.

    x [B, H, L, D], positions [L] int32, inv_freq [D/2] -> [B, H, L, D]. Token l is at positions[l], in every
    head and sequence; positions may be in any order and may repeat. Pair i of a head is
    (a, b) = (x[i], x[i + D/2]), half a head apart. With angle = position * inv_freq[i] it becomes
    (a cos - b sin, b cos + a sin). So the dot product of a rotated query and a rotated key depends only on
    the distance between the two tokens. Compute the angles in float32, because float16 cannot hold all
    positions above 2048 exactly. The result has x's type (in MLX float16 times float32 is float32).

    >>> x = mx.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> rotated = rope(x, mx.array([1]), mx.array([mx.pi / 2, 0.0]))  # the pair (1, 3), by a quarter turn
    >>> mx.round(rotated).tolist()
    [[[[-3.0, 2.0, 1.0, 4.0]]]]
    """
    angles = positions[:, None].astype(mx.float32) * inv_freq  # [L, D/2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
