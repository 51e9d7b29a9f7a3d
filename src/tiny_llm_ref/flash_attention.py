"""Attention in tiles: softmax in one pass over the keys, without ever holding a row of scores.

For each query three things are carried from tile to tile: the largest score so far, the sum of exponentials
relative to it, and the weighted values. Source: Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018); Dao et al., "FlashAttention" (2022).
"""

from typing import NamedTuple

import mlx.core as mx

from .kernels import accelerated, compiled_kernel


class Running(NamedTuple):
    """The softmax of the keys seen so far, not yet divided.

    largest [..., L, 1]: the largest score. total [..., L, 1]: the sum of exp(score - largest).
    weighted [..., L, D]: the sum of exp(score - largest) * value.
    """

    largest: mx.array
    total: mx.array
    weighted: mx.array


def absorb(running: Running, scores: mx.array, values: mx.array) -> Running:
    """Take in the next tile: scores [..., L, T] against T more keys, values [..., T, D].

    A score of -inf is a key that the query may not see. Where the largest score grows, what was summed before
    is scaled down to it. A query that has not seen any key yet has largest = -inf and total = 0, and stays so
    until it does: never NaN.
    """
    largest = mx.maximum(running.largest, mx.max(scores, axis=-1, keepdims=True))
    reference = mx.where(mx.isinf(largest), 0.0, largest)  # -inf - -inf would be NaN
    kept = mx.exp(running.largest - reference)
    weights = mx.exp(scores - reference)
    return Running(
        largest,
        running.total * kept + mx.sum(weights, axis=-1, keepdims=True),
        running.weighted * kept + weights @ values,
    )


def _compiled(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64) -> mx.array:
    out: mx.array = compiled_kernel("flash_attention")(q, k, v, scale, causal)
    return out


def _fused(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if causal else None)


@accelerated(compiled=_compiled, fused=_fused)
def flash_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64
) -> mx.array:
    """Attention in tiles of `tile` keys: q [B, H, L, D], k and v [B, Hkv, S, D] -> [B, H, L, D].

    Query head h reads head h // (H / Hkv) of k and v. causal: the queries are the last L of the S positions,
    and each sees positions up to its own. The result has q's type, and equals `grouped_query_attention` with
    `causal_mask` up to rounding, for every tile size from 1 up.
    """
    B, H, L, D = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    grouped = q.reshape(B, kv_heads, H // kv_heads, L, D)
    positions = mx.arange(S - L, S)[:, None]
    running = Running(
        mx.full((*grouped.shape[:-1], 1), -mx.inf),
        mx.zeros((*grouped.shape[:-1], 1)),
        mx.zeros(grouped.shape),
    )
    for start in range(0, S, tile):
        stop = min(start + tile, S)
        scores = (grouped @ k[:, :, None, start:stop].swapaxes(-1, -2)) * scale
        if causal:
            scores = mx.where(mx.arange(start, stop) <= positions, scores, -mx.inf)
        running = absorb(running, scores, v[:, :, None, start:stop])
    return (running.weighted / running.total).reshape(B, H, L, D).astype(q.dtype)
