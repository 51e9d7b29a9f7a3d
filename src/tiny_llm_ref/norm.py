"""RMSNorm: scales the input of each layer to the same size.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

import mlx.core as mx

from .kernels import accelerated


def _fused(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


@accelerated(compiled="rms_norm", fused=_fused)
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Scale each row to a root mean square of 1, then by a weight: x / sqrt(mean(x^2) + eps) * weight.

    x [..., E], weight [E] -> [..., E]; the mean is over the last axis. eps is under the root, so that a row
    of zeros gives zeros. Square and average in float32: the largest float16 is 65,504, so in float16 300
    squared is inf, and 0.001 squared is off by 1%. The result has x's type, even if the weight is float32 (in
    MLX float16 times float32 is float32).

    >>> row = mx.array([[0.0, 0.0, 0.0, 8.0]])  # its root mean square is sqrt(64 / 4) = 4
    >>> rms_norm(row, mx.array([1.0, 1.0, 1.0, 10.0]), 0.0).tolist()
    [[0.0, 0.0, 0.0, 20.0]]
    """
    wide = x.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight).astype(x.dtype)
