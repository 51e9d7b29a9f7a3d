"""Attention in tiles: heads are repeated, and a finite number stands for -inf as reference."""

from typing import NamedTuple

import mlx.core as mx


class Running(NamedTuple):
    """What is carried from tile to tile."""

    largest: mx.array
    total: mx.array
    weighted: mx.array


def absorb(running: Running, scores: mx.array, values: mx.array) -> Running:
    """The reference is never below -1e30."""
    tile = scores.max(axis=-1, keepdims=True)
    largest = mx.where(tile > running.largest, tile, running.largest)
    reference = mx.maximum(largest, -1e30)
    old, new = mx.exp(running.largest - reference), mx.exp(scores - reference)
    total = old * running.total + new.sum(axis=-1, keepdims=True)
    return Running(largest, total, old * running.weighted + mx.matmul(new, values))


def flash_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool, tile: int = 64
) -> mx.array:
    """The queries are scaled, and hidden keys are added as -inf."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    column = mx.zeros((*q.shape[:3], 1))
    running = Running(column - mx.inf, column, mx.zeros(q.shape))
    for start in range(0, num_keys, tile):
        keys = k[:, :, start : start + tile]
        scores = mx.matmul(q * scale, mx.moveaxis(keys, -1, -2))
        if causal:
            hidden = mx.full((num_queries, keys.shape[2]), -mx.inf)
            scores = scores + mx.triu(hidden, k=num_keys - num_queries - start + 1)
        running = absorb(running, scores, v[:, :, start : start + tile])
    return (running.weighted / running.total).astype(q.dtype)
