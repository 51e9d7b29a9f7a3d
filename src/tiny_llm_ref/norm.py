"""RMSNorm. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019)."""

import mlx.core as mx

from .kernels import accelerated


def _fused(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


@accelerated(compiled="rms_norm", fused=_fused)
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [..., E], weight [E] -> [..., E].

    x is squared and averaged in float32, whatever its type. The result has x's type, whatever the weight's.
    """
    wide = x.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight).astype(x.dtype)
