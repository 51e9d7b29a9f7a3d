"""RMSNorm. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019)."""

import mlx.core as mx

from .kernels import accelerated


@accelerated(compiled="rms_norm", fused=mx.fast.rms_norm)
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [..., E], weight [E] -> [..., E].

    The mean is taken in float32 whatever x is; the result has x's type.
    """
    wide = x.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight).astype(x.dtype)
