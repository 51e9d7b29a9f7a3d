"""The formulas of attention in NumPy and float64: slow and plain."""

import numpy as np


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    weights = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def numpy_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """Attention of q [..., L, D] over k and v [..., S, D], with a mask that is added to the scores.

    q may have more heads than k and v: q [B, H, L, D] over k and v [B, Hkv, S, D].
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    if q.shape[:-2] != k.shape[:-2]:
        k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    scores = np.einsum("...ld,...sd->...ls", q, k) * scale
    if mask is not None:
        scores = scores + mask
    return numpy_softmax(scores) @ v


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention of the last L of S tokens, one query at a time, without a mask.

    q [..., H, L, D] over k and v [..., Hkv, S, D] -> [..., H, L, D].
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group, before = q.shape[-3] // k.shape[-3], k.shape[-2] - q.shape[-2]
    out = np.zeros_like(q)
    for *batch, head, i in np.ndindex(q.shape[:-1]):
        key_head = (*batch, head // group)
        seen = before + i + 1
        weights = numpy_softmax(k[key_head][:seen] @ q[*batch, head, i] * scale)
        out[*batch, head, i] = weights @ v[key_head][:seen]
    return out


def numpy_rope(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Each pair (i, i + D/2) of x [B, N, L, D] rotated by position times frequency, pair by pair.

    The angles are float32, as in `rope`; everything else is float64.
    """
    x, out = x.astype(np.float64), np.empty(x.shape)
    half = x.shape[-1] // 2
    for token, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            angle = float(np.float32(position) * np.float32(frequency))
            a, b = x[:, :, token, i], x[:, :, token, i + half]
            out[:, :, token, i] = a * np.cos(angle) - b * np.sin(angle)
            out[:, :, token, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out
