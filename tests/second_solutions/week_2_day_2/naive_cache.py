"""One contiguous cache per sequence, as long as its longest possible text: simple, and mostly empty.

A token is written into memory that is there already, so nothing moves. But memory that a sequence has not
filled yet is of no use to any other sequence: internal fragmentation, the difference between
`allocated_bytes` and `used_bytes`.
"""

from collections.abc import Sequence

import mlx.core as mx


class NaiveKVCache:
    def update(self, new_k: mx.array, new_v: mx.array) -> KeysValues:
        """Store the next tokens behind those stored so far; return all stored tokens.

        new_k, new_v: [Hkv, D] for one token, or [Hkv, n, D] for n. Writes into `k_cache` and `v_cache`, which
        keep their shape and type (MLX casts what is assigned to a slice), and raises `current_len` by n. The
        result has [Hkv, current_len, D] each, in the cache's type.

        Raises ValueError and changes nothing if they do not fit into `max_seq_len`. Check it first: MLX cuts
        a slice that goes past the end and raises nothing.

        >>> cache = NaiveKVCache(max_seq_len=4, num_heads=1, head_dim=2)
        >>> stored = cache.update(mx.ones((1, 3, 2)), mx.zeros((1, 3, 2)))
        >>> cache.update(mx.array([[5.0, 6.0]]), mx.zeros((1, 2))).keys.tolist()
        [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [5.0, 6.0]]]
        >>> cache.current_len, cache.k_cache.shape
        (4, (1, 4, 2))
        """
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
        """Forget the stored tokens and store those of `source`: two texts that begin alike.

        Two completions of one prompt compute the prompt once, in the first one's cache; the second copies it
        and then goes its own way: later updates of one cache do not show in the other. The prompt's keys and
        values are then in memory twice, which sharing pages (week 3) avoids.

        Both caches have the same heads; they may differ in `max_seq_len` and type. Raises ValueError and
        changes nothing if the source's tokens do not fit.

        >>> first, second = NaiveKVCache(8, 1, 2), NaiveKVCache(4, 1, 2)
        >>> stored = first.update(mx.ones((1, 3, 2)), mx.ones((1, 3, 2)))
        >>> second.copy_from(first)
        >>> second.current_len, second.k_cache.shape
        (3, (1, 4, 2))
        """
        length = source.current_len
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens do not fit into a cache of {self.max_seq_len}")
        self.reset()
        self.update(source.k_cache[:, :length], source.v_cache[:, :length])


def reserve(lengths: Sequence[int], max_seq_len: int, token_bytes: int, memory: int) -> Reservation:
    """Weigh a cache size: what caches of `max_seq_len` tokens mean for sequences of these lengths, in tokens.

    token_bytes: a token's keys and values in all layers. memory: bytes for all caches; only whole caches
    count. A sequence is refused if it is longer than `max_seq_len`; one of just that length fits. `wasted`
    counts each sequence that is not refused with one cache, whether or not all of them fit into the memory
    at once; it is 0.0 if there is no such sequence.

    >>> reserve([100, 300, 900], max_seq_len=500, token_bytes=1000, memory=1_600_000)
    Reservation(num_caches=3, num_refused=1, wasted=0.6)
    """
    num_caches = memory // (max_seq_len * token_bytes)
    accepted = [length for length in lengths if length <= max_seq_len]
    reserved = len(accepted) * max_seq_len
    wasted = 1 - sum(accepted) / reserved if accepted else 0.0
    return Reservation(num_caches, len(lengths) - len(accepted), wasted)
