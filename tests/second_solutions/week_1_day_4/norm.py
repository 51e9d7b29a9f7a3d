"""RMSNorm by a dot product of each row with itself."""

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """The sum of squares is a product of the row with itself."""
    rows = x.astype(mx.float32)
    sums = mx.matmul(rows[..., None, :], rows[..., :, None])[..., 0]
    size = mx.sqrt(sums / x.shape[-1] + eps)
    return mx.divide(rows * weight.astype(mx.float32), size).astype(x.dtype)
