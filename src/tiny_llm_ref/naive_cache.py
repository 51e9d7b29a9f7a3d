"""One contiguous cache a sequence, as long as the longest that it may become: simple, and mostly empty.

Writing a token costs that token's bytes, because the place is there already; but what is not written yet
is nobody else's either. Measured here as `allocated_bytes` against `used_bytes`: internal fragmentation.
"""

from typing import NamedTuple

import mlx.core as mx


class KeysValues(NamedTuple):
    """Keys and values of one layer, each [S, Hkv, D]: token, head, value."""

    keys: mx.array
    values: mx.array


class NaiveKVCache:
    """Room for `max_seq_len` tokens of one layer, taken at once: two arrays [max_seq_len, Hkv, D].

    num_heads: heads of keys and values (Hkv).
    """

    def __init__(
        self, max_seq_len: int, num_heads: int, head_dim: int, dtype: mx.Dtype = mx.bfloat16
    ) -> None:
        self.max_seq_len = max_seq_len
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.current_len = 0
        self.k_cache = mx.zeros((max_seq_len, num_heads, head_dim), dtype)
        self.v_cache = mx.zeros((max_seq_len, num_heads, head_dim), dtype)

    def update(self, new_k: mx.array, new_v: mx.array) -> KeysValues:
        """Store the next tokens and return all that are stored, as they are stored.

        new_k, new_v: [Hkv, D] for one token, or [n, Hkv, D] for n. The result has [current_len, Hkv, D] each,
        in the cache's type. Raises ValueError, and stores nothing, where they do not fit into `max_seq_len`.
        """
        new_k, new_v = (x.reshape(-1, self.num_heads, self.head_dim) for x in (new_k, new_v))
        stop = self.current_len + len(new_k)
        if stop > self.max_seq_len:
            raise ValueError(
                f"{len(new_k)} more tokens do not fit: {self.current_len} of {self.max_seq_len} are taken"
            )
        self.k_cache[self.current_len : stop] = new_k
        self.v_cache[self.current_len : stop] = new_v
        self.current_len = stop
        return KeysValues(self.k_cache[:stop], self.v_cache[:stop])

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.current_len = 0

    def allocated_bytes(self) -> int:
        """Bytes taken, whatever is stored."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def used_bytes(self) -> int:
        """Bytes of the tokens that are stored, keys and values."""
        return 2 * self.current_len * self.num_heads * self.head_dim * self.k_cache.itemsize
