"""Attention in tiles: softmax in one pass over the keys, without storing a full row of scores.

Each query carries three results from tile to tile: the largest score so far, the sum of exponentials relative
to it, and the weighted values. Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018); Dao et al., "FlashAttention" (2022).
"""

import mlx.core as mx


def absorb(running: Running, scores: mx.array, values: mx.array) -> Running:
    largest = mx.maximum(running.largest, mx.max(scores, axis=-1, keepdims=True))
    base = mx.where(largest == -mx.inf, 0.0, largest)  # exp(-inf - 0) is 0; -inf - -inf would be NaN
    weights = mx.exp(scores - base)
    keep = mx.exp(running.largest - base)
    total = keep * running.total + mx.sum(weights, axis=-1, keepdims=True)
    weighted = keep * running.weighted + weights @ values
    return Running(largest, total, weighted)


def flash_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64
) -> mx.array:
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    queries = q.astype(mx.float32).reshape(batch, num_kv_heads, group, length, head_dim)
    query_positions = mx.arange(num_keys - length, num_keys)[:, None]
    running = Running(
        mx.full((batch, num_kv_heads, group, length, 1), -mx.inf),
        mx.zeros((batch, num_kv_heads, group, length, 1)),
        mx.zeros((batch, num_kv_heads, group, length, head_dim)),
    )
    for start in range(0, num_keys, tile):
        stop = min(start + tile, num_keys)
        keys = k[:, :, None, start:stop].astype(mx.float32)
        values = v[:, :, None, start:stop].astype(mx.float32)
        scores = queries @ keys.swapaxes(-1, -2) * scale
        if causal:
            visible = mx.arange(start, stop)[None, :] <= query_positions
            scores = mx.where(visible, scores, -mx.inf)
        running = absorb(running, scores, values)
    return (running.weighted / running.total).reshape(q.shape).astype(q.dtype)
