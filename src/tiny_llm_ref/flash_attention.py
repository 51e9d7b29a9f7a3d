"""Attention in tiles: softmax in one pass over the keys, without storing a full row of scores.

Each query carries three results from tile to tile: the largest score so far, the sum of exponentials relative
to it, and the weighted values. Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018); Dao et al., "FlashAttention" (2022).
"""

from typing import NamedTuple

import mlx.core as mx

from .kernels import accelerated, compiled_kernel


class Running(NamedTuple):
    """The attention over the keys so far, not yet divided: the output for these keys is weighted / total.

    largest: [..., L, 1], the largest score. total: [..., L, 1], the sum of exp(score - largest). weighted:
    [..., L, D], the sum of exp(score - largest) * value. Before a query has seen a key they are -inf, 0 and
    0.
    """

    largest: mx.array
    total: mx.array
    weighted: mx.array


def absorb(running: Running, scores: mx.array, values: mx.array) -> Running:
    """Add the next tile of T keys: scores [..., L, T], values [..., T, D]; return a new `Running`.

    A score of -inf marks a key that the query may not see; its weight is exactly 0. The new `largest` is the
    largest score of all keys so far. The old `total` and `weighted` are relative to the old `largest`:
    multiply them by exp(old - new) before you add the new terms, which are relative to the new one. So no
    exponent is above 0, and scores of thousands do not overflow. If all keys so far are hidden from a query,
    its largest stays -inf, its total and weighted stay 0, and nothing becomes NaN. To avoid -inf - -inf,
    which is NaN, subtract another number in that case. `running` is float32, and so is the result, also if
    the scores and values are float16: two values of 40,000 in one tile have a sum that float16 cannot hold.

    >>> empty = Running(mx.array([[-mx.inf]]), mx.zeros((1, 1)), mx.zeros((1, 1)))
    >>> first = absorb(empty, mx.array([[1000.0, -mx.inf]]), mx.array([[2.0], [9.0]]))
    >>> [part.item() for part in first]
    [1000.0, 1.0, 2.0]
    >>> [part.item() for part in absorb(first, mx.array([[1000.0]]), mx.array([[4.0]]))]
    [1000.0, 2.0, 6.0]
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
    out: mx.array = compiled_kernel("flash_attention")(q, k.astype(q.dtype), v.astype(q.dtype), scale, causal)
    return out


def _fused(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64) -> mx.array:
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if causal else None)
    return out.astype(q.dtype)


@accelerated(compiled=_compiled, fused=_fused)
def flash_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64
) -> mx.array:
    """Attend in tiles of `tile` keys: q [B, H, L, D], k and v [B, Hkv, S, D] -> [B, H, L, D].

    Query head h reads head h // (H / Hkv) of k and v, and scores are multiplied by `scale`. causal: True if
    the queries are the last L of the S positions and each sees the positions up to its own; False if each
    sees all. The last tile may be shorter than `tile`, and a tile may be hidden from some queries. No array
    of scores is larger than [..., L, tile].

    The result has q's type and equals `grouped_query_attention` (with `causal_mask`) up to rounding, for
    every tile size from 1 up. For 16-bit inputs, all sums of weights and of weighted values are float32,
    within a tile and in `Running`, because they may be larger than the largest float16, 65,504. The scores
    may be in q's type or in float32; if they are float16, q @ k must not be larger than that either.

    >>> q, values = mx.ones((1, 1, 2, 1)), mx.array([[[[2.0], [4.0], [9.0]]]])
    >>> keys = mx.zeros((1, 1, 3, 1))  # all scores are 0, so the results are means: of 2, 4, and of 2, 4, 9
    >>> flash_attention(q, keys, values, scale=1.0, causal=True, tile=2).tolist()
    [[[[3.0], [5.0]]]]
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
