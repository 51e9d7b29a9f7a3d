"""The contiguous cache: tokens are written one by one."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class KeysValues(NamedTuple):
    """Of one layer, [Hkv, S, D] each."""

    keys: mx.array
    values: mx.array


class NaiveKVCache:
    """Two arrays as long as the longest text."""

    def __init__(
        self, max_seq_len: int, num_heads: int, head_dim: int, dtype: mx.Dtype = mx.bfloat16
    ) -> None:
        self.max_seq_len = max_seq_len
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.current_len = 0
        self.k_cache = mx.zeros((num_heads, max_seq_len, head_dim), dtype)
        self.v_cache = mx.zeros((num_heads, max_seq_len, head_dim), dtype)

    def update(self, new_k: mx.array, new_v: mx.array) -> KeysValues:
        """One token gets an axis; each is written by itself."""
        if new_k.ndim == 2:
            new_k, new_v = mx.expand_dims(new_k, 1), mx.expand_dims(new_v, 1)
        count = new_k.shape[1]
        if count > self.max_seq_len - self.current_len:
            raise ValueError(f"{count} tokens, {self.max_seq_len - self.current_len} places")
        for i in range(count):
            self.k_cache[:, self.current_len] = new_k[:, i]
            self.v_cache[:, self.current_len] = new_v[:, i]
            self.current_len += 1
        return KeysValues(self.k_cache[:, : self.current_len], self.v_cache[:, : self.current_len])

    def copy_from(self, source: "NaiveKVCache") -> None:
        """Straight from array to array."""
        count = source.current_len
        if count > self.max_seq_len:
            raise ValueError(f"{count} tokens, {self.max_seq_len} places")
        self.k_cache[:, :count] = source.k_cache[:, :count]
        self.v_cache[:, :count] = source.v_cache[:, :count]
        self.current_len = count

    def reset(self) -> None:
        """No tokens."""
        self.current_len = 0

    def allocated_bytes(self) -> int:
        """Of both arrays."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def used_bytes(self) -> int:
        """Of the stored tokens."""
        return 2 * self.current_len * self.num_heads * self.head_dim * self.k_cache.itemsize


class Reservation(NamedTuple):
    """What a cache size means."""

    num_caches: int
    num_refused: int
    wasted: float


def reserve(lengths: Sequence[int], max_seq_len: int, token_bytes: int, memory: int) -> Reservation:
    """Counts the empty places."""
    empty = [max_seq_len - length for length in lengths if length <= max_seq_len]
    caches = memory // max_seq_len // token_bytes
    if not empty:
        return Reservation(caches, len(lengths), 0.0)
    return Reservation(caches, len(lengths) - len(empty), sum(empty) / len(empty) / max_seq_len)
