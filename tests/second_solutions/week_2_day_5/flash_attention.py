"""Attention in tiles: softmax in one pass over the keys, without ever holding a row of scores.

For each query three results are carried from tile to tile: the largest score so far, the sum of exponentials
relative to it, and the weighted values. Source: Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018); Dao et al., "FlashAttention" (2022).
"""

from typing import NamedTuple

import mlx.core as mx


class Running(NamedTuple):
    """The softmax of the keys so far, not yet divided: weighted / total is the attention over them.

    largest [..., L, 1]: the largest score; -inf before a query has seen a key. total [..., L, 1]: the sum of
    exp(score - largest). weighted [..., L, D]: the sum of exp(score - largest) * value. Both are 0 before.
    """

    largest: mx.array
    total: mx.array
    weighted: mx.array


def absorb(running: Running, scores: mx.array, values: mx.array) -> Running:
    """Add the next tile of T keys: scores [..., L, T], values [..., T, D]; return a new `Running`.

    A score of -inf is a key that the query may not see; it weighs exactly 0. The new `largest` is that of all
    keys so far. What was summed before is relative to the old one: multiply it by exp(old - new). So no
    exponent is above 0, and scores of thousands do not overflow. A query for which all keys so far are
    hidden keeps largest = -inf, total = 0 and weighted = 0, without NaN: -inf - -inf is NaN, so subtract
    another number there.

    >>> empty = Running(mx.array([[-mx.inf]]), mx.zeros((1, 1)), mx.zeros((1, 1)))
    >>> first = absorb(empty, mx.array([[1000.0, -mx.inf]]), mx.array([[2.0], [9.0]]))
    >>> [part.item() for part in first]
    [1000.0, 1.0, 2.0]
    >>> [part.item() for part in absorb(first, mx.array([[1000.0]]), mx.array([[4.0]]))]
    [1000.0, 2.0, 6.0]
    """
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
    """Attend in tiles of `tile` keys: q [B, H, L, D], k and v [B, Hkv, S, D] -> [B, H, L, D].

    Query head h reads head h // (H / Hkv) of k and v, and scores are multiplied by `scale`. causal: the
    queries are the last L of the S positions, and each sees the positions up to its own; otherwise each sees
    all. The result has q's type and equals `grouped_query_attention` (with `causal_mask`) up to rounding, for
    every tile size from 1 up. At most [.., L, tile] scores exist at a time; the last tile may be shorter, and
    a tile may be hidden from some queries or from all.

    >>> q, values = mx.ones((1, 1, 2, 1)), mx.array([[[[2.0], [4.0], [9.0]]]])
    >>> flash_attention(q, mx.zeros((1, 1, 3, 1)), values, scale=1.0, causal=True, tile=2).tolist()
    [[[[3.0], [5.0]]]]
    """
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
