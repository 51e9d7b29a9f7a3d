"""One contiguous cache per sequence, with space for the longest possible text: simple, and mostly empty.

A token is written into memory that is already allocated, so nothing moves. But no other sequence can use the
memory that a sequence has not filled yet. This is internal fragmentation: the difference between
`allocated_bytes` and `used_bytes`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class KeysValues(NamedTuple):
    """Keys and values of one layer, each [Hkv, S, D]."""

    keys: mx.array
    values: mx.array


class NaiveKVCache:
    """Memory for `max_seq_len` tokens of one layer, allocated at once: two arrays [Hkv, max_seq_len, D].

    Heads come first, then tokens, as in q, k and v. Attention reads all tokens of one head, then those of the
    next, so every cache of this course has this order, and nothing is transposed. (Many other engines put
    tokens first.)

    num_heads: heads of keys and values (Hkv). k_cache: the keys, [Hkv, max_seq_len, D]. v_cache: the values,
    [Hkv, max_seq_len, D]. current_len: the number of stored tokens; they come first in both arrays, and the
    numbers after them have no meaning.
    """

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
        """Store the next tokens after those stored so far; return the keys and values of all stored tokens.

        new_k, new_v: [Hkv, D] for one token, or [Hkv, n, D] for n tokens. Writes into `k_cache` and
        `v_cache`, which keep their shape and type (MLX converts values that are assigned to a slice), and
        adds n to `current_len`. The returned keys and values are [Hkv, current_len, D] in the cache's type.

        Raises ValueError, and changes nothing, if the tokens do not fit into `max_seq_len`. Check this first:
        MLX cuts off a slice that goes past the end, so a single token written there is lost without an error.

        >>> cache = NaiveKVCache(max_seq_len=4, num_heads=1, head_dim=2)
        >>> stored = cache.update(mx.ones((1, 3, 2)), mx.zeros((1, 3, 2)))
        >>> cache.update(mx.array([[5.0, 6.0]]), mx.zeros((1, 2))).keys.tolist()
        [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [5.0, 6.0]]]
        >>> cache.current_len, cache.k_cache.shape
        (4, (1, 4, 2))
        """
        new_k, new_v = (x.reshape(self.num_heads, -1, self.head_dim) for x in (new_k, new_v))
        stop = self.current_len + new_k.shape[1]
        if stop > self.max_seq_len:
            raise ValueError(
                f"{new_k.shape[1]} more tokens do not fit: {self.current_len} of {self.max_seq_len} are taken"
            )
        self.k_cache[:, self.current_len : stop] = new_k
        self.v_cache[:, self.current_len : stop] = new_v
        self.current_len = stop
        return KeysValues(self.k_cache[:, :stop], self.v_cache[:, :stop])

    def copy_from(self, source: "NaiveKVCache") -> None:
        """Replace the stored tokens by a copy of those of `source`.

        Used for two completions of one prompt: the first computes the prompt, and the second copies its
        cache. Afterwards the caches are independent: later updates of one do not show in the other. The
        prompt's keys and values are in memory twice, which sharing pages (week 3) avoids.

        Both caches have the same heads and head size; `max_seq_len` and type may differ. Copying a cache from
        itself changes nothing. Raises ValueError, and changes nothing, if the source's tokens do not fit.

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

    def reset(self) -> None:
        """Forget every token; the memory stays allocated."""
        self.current_len = 0

    def allocated_bytes(self) -> int:
        """Bytes of both arrays, however many tokens are stored."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def used_bytes(self) -> int:
        """Bytes of the stored tokens, keys and values."""
        return 2 * self.current_len * self.num_heads * self.head_dim * self.k_cache.itemsize


class Reservation(NamedTuple):
    """The result of giving every sequence a cache of the same size.

    num_caches: caches that fit into the memory. num_refused: sequences that are too long for a cache.
    wasted: the share, from 0 to 1, of the other sequences' cache memory that holds no token.
    """

    num_caches: int
    num_refused: int
    wasted: float


def reserve(lengths: Sequence[int], max_seq_len: int, token_bytes: int, memory: int) -> Reservation:
    """Compute how caches of `max_seq_len` tokens serve sequences of these lengths: a `Reservation`.

    lengths: tokens of each sequence. token_bytes: bytes of a token's keys and values in all layers. memory:
    bytes for all caches; only whole caches count. `max_seq_len` and `token_bytes` are at least 1; do not
    check this.

    A sequence is refused if it is longer than `max_seq_len`; one of exactly that length fits. `wasted` counts
    one cache for each sequence that is not refused, whether or not all of these caches fit into the memory at
    once. It is 0.0 if every sequence is refused, or if there are none.

    In the example the caches of 500 tokens hold 100 and 300: 600 of 1,000 places are wasted.

    >>> reserve([100, 300, 900], max_seq_len=500, token_bytes=1000, memory=1_600_000)
    Reservation(num_caches=3, num_refused=1, wasted=0.6)
    """
    served = [length for length in lengths if length <= max_seq_len]
    reserved = len(served) * max_seq_len
    wasted = 1 - sum(served) / reserved if reserved else 0.0
    return Reservation(memory // (max_seq_len * token_bytes), len(lengths) - len(served), wasted)
