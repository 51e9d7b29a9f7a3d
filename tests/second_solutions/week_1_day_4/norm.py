# A second solution of day 1.4, written from the docstrings alone.
"""RMSNorm: every layer reads the stream at one size.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Scale each row to a root mean square of 1, then by a weight: x / sqrt(mean(x^2) + eps) * weight.

    x [..., E], weight [E] -> [..., E]; the mean is over the last axis, and eps is under the root, so that
    a row of zeros gives zeros. Square and average in float32: float16 ends at 65,504, so 300 squared is inf
    in it, and it has hardly a digit left for 0.001 squared. The result has x's type, also if the weight is
    float32 (in MLX float16 times float32 is float32).

    >>> rms_norm(mx.array([[0.0, 0.0, 0.0, 8.0]]), mx.array([1.0, 1.0, 1.0, 10.0]), 0.0).tolist()
    [[0.0, 0.0, 0.0, 20.0]]
    """
    wide = x.astype(mx.float32)
    mean_square = mx.mean(mx.square(wide), axis=-1, keepdims=True)
    return (wide * mx.rsqrt(mean_square + eps) * weight).astype(x.dtype)
