# A second solution of day 1.4, written only from the docstrings.
"""RMSNorm: scales the input of each layer to the same size.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    wide = x.astype(mx.float32)
    mean_square = mx.mean(mx.square(wide), axis=-1, keepdims=True)
    return (wide * mx.rsqrt(mean_square + eps) * weight).astype(x.dtype)
