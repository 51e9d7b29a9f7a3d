"""A forward pass over whole sequences in which some layers have sliding windows: the oracle for windows.

A context without a cache and with a mask for each layer, nothing else: for tests of models, and of contexts
that store keys and values.
"""

from collections.abc import Sequence

import mlx.core as mx
from tiny_llm.attention import causal_mask
from tiny_llm.grouped_attention import grouped_query_attention


def window_mask(length: int, window: int | None) -> mx.array:
    """Additive mask [length, length]: the query at p sees max(0, p - window + 1) to p; with None, 0 to p.

    Raises ValueError for a window below 1.
    """
    if window is None:
        return causal_mask(length, length)
    if window < 1:
        raise ValueError(f"a window must hold at least 1 token, not {window}")
    positions = mx.arange(length)
    too_old = positions[None, :] <= positions[:, None] - window
    return mx.where(too_old, -mx.inf, causal_mask(length, length))


class WindowedNoCacheContext:
    """A `KVContext` like NoCacheContext; `windows` has the window of each layer, None for full attention."""

    def __init__(self, length: int, scale: float, windows: Sequence[int | None]) -> None:
        self.positions = mx.arange(length, dtype=mx.int32)
        self.logit_rows: mx.array | None = None
        self._scale = scale
        masks = {window: window_mask(length, window) for window in set(windows)}
        self._masks = [masks[window] for window in windows]

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [B, H, L, D], k and v [B, Hkv, L, D] -> [B, H, L, D], causal, within the layer's window."""
        return grouped_query_attention(q, k, v, self._scale, self._masks[layer])
