"""One contiguous cache per sequence, with space for the longest possible text: simple, and mostly empty.

A token is written into memory that is already allocated, so nothing moves. But no other sequence can use the
memory that a sequence has not filled yet. This is internal fragmentation: the difference between
`allocated_bytes` and `used_bytes`.
"""

from collections.abc import Sequence

import mlx.core as mx


class NaiveKVCache:
    def update(self, new_k: mx.array, new_v: mx.array) -> KeysValues:
        if new_k.ndim == 2:
            new_k, new_v = new_k[:, None], new_v[:, None]
        start, stop = self.current_len, self.current_len + new_k.shape[1]
        if stop > self.max_seq_len:
            raise ValueError(f"{stop} tokens do not fit into a cache of {self.max_seq_len}")
        self.k_cache[:, start:stop] = new_k
        self.v_cache[:, start:stop] = new_v
        self.current_len = stop
        return KeysValues(self.k_cache[:, :stop], self.v_cache[:, :stop])

    def copy_from(self, source: "NaiveKVCache") -> None:
        length = source.current_len
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens do not fit into a cache of {self.max_seq_len}")
        self.reset()
        self.update(source.k_cache[:, :length], source.v_cache[:, :length])


def reserve(lengths: Sequence[int], max_seq_len: int, token_bytes: int, memory: int) -> Reservation:
    num_caches = memory // (max_seq_len * token_bytes)
    accepted = [length for length in lengths if length <= max_seq_len]
    reserved = len(accepted) * max_seq_len
    wasted = 1 - sum(accepted) / reserved if accepted else 0.0
    return Reservation(num_caches, len(lengths) - len(accepted), wasted)
