"""Day 2.2: one contiguous cache a sequence, as long as the longest that it may become.

When it passes, you have a cache whose writes cost one token's bytes, and two numbers, bytes taken and bytes
used, that show how much of such a cache nobody ever uses: internal fragmentation.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.naive_cache import NaiveKVCache


def tokens(values: list[float]) -> mx.array:
    """Tokens of one head of size 2, [n, 1, 2]: value i is stored as [i, i]."""
    return mx.array([[[value, value]] for value in values], mx.float32)


def small_cache(max_seq_len: int = 4) -> NaiveKVCache:
    """Room for a few tokens of one head of size 2 in float32."""
    return NaiveKVCache(max_seq_len, num_heads=1, head_dim=2, dtype=mx.float32)


# Task 1: NaiveKVCache.update


def test_task_1_tokens_are_stored_one_behind_the_other() -> None:
    """Oracle: by hand."""
    cache = small_cache()
    first = cache.update(mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0]]))
    assert first.keys.tolist() == [[[1, 2]]]
    assert first.values.tolist() == [[[3, 4]]]
    assert cache.current_len == 1
    second = cache.update(mx.array([[5.0, 6.0]]), mx.array([[7.0, 8.0]]))
    assert second.keys.tolist() == [[[1, 2]], [[5, 6]]]
    assert second.values.tolist() == [[[3, 4]], [[7, 8]]]
    assert cache.current_len == 2


def test_task_1_several_tokens_at_once() -> None:
    """Oracle: by hand."""
    cache = small_cache()
    cache.update(tokens([1, 2]), tokens([10, 20]))
    stored = cache.update(tokens([3]), tokens([30]))
    assert stored.keys.tolist() == tokens([1, 2, 3]).tolist()
    assert stored.values.tolist() == tokens([10, 20, 30]).tolist()
    assert cache.current_len == 3


def test_task_1_a_token_keeps_its_heads() -> None:
    """Oracle: by hand, every number different. Heads and tokens that change places are what this finds."""
    cache = NaiveKVCache(5, num_heads=3, head_dim=2, dtype=mx.float32)
    keys = mx.arange(12, dtype=mx.float32).reshape(2, 3, 2)
    stored = cache.update(keys, keys + 100)
    assert stored.keys.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    stored = cache.update(keys[0] + 20, keys[0] + 120)
    assert stored.keys.tolist()[2] == [[20, 21], [22, 23], [24, 25]]
    assert stored.values.tolist()[2] == [[120, 121], [122, 123], [124, 125]]
    assert stored.values.tolist()[:2] == (keys + 100).tolist()


def test_task_1_as_many_tokens_as_there_is_room_for() -> None:
    """Oracle: by hand: the last place is a place too."""
    at_once, one_by_one = small_cache(3), small_cache(3)
    stored = at_once.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    assert stored.keys.tolist() == tokens([1, 2, 3]).tolist()
    for value in (1.0, 2.0, 3.0):
        stored = one_by_one.update(mx.full((1, 2), value), mx.full((1, 2), value + 3))
    assert stored.values.tolist() == tokens([4, 5, 6]).tolist()


@pytest.mark.parametrize("too_many", [2, 3])
def test_task_1_what_does_not_fit_is_refused_and_nothing_of_it_is_stored(too_many: int) -> None:
    """Oracle: the docstring: 3 of 4 places are taken. Storing the part that fits is the mistake."""
    cache = small_cache(4)
    cache.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    with pytest.raises(ValueError):
        cache.update(tokens([9] * too_many), tokens([9] * too_many))
    assert cache.current_len == 3
    stored = cache.update(tokens([7]), tokens([8]))
    assert stored.keys.tolist() == tokens([1, 2, 3, 7]).tolist()
    assert stored.values.tolist() == tokens([4, 5, 6, 8]).tolist()


def test_task_1_one_token_more_than_fits_is_refused_in_a_full_and_in_an_empty_cache() -> None:
    """Oracle: the docstring. A single token [Hkv, D] counts as one, however many heads it has."""
    cache = NaiveKVCache(2, num_heads=4, head_dim=2, dtype=mx.float32)
    with pytest.raises(ValueError):
        cache.update(mx.ones((3, 4, 2)), mx.ones((3, 4, 2)))
    cache.update(mx.ones((4, 2)), mx.ones((4, 2)))
    cache.update(mx.ones((4, 2)), mx.ones((4, 2)))
    with pytest.raises(ValueError):
        cache.update(mx.ones((4, 2)), mx.ones((4, 2)))
    assert cache.current_len == 2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_task_1_tokens_come_back_as_they_are_stored(dtype: mx.Dtype) -> None:
    """Oracle: the same tokens rounded to the cache's type by MLX; its own type is what the cache returns."""
    noise = mx.random.normal((4, 3, 8), key=mx.random.key(5))
    keys, values = noise[:2], noise[2:]
    cache = NaiveKVCache(6, num_heads=3, head_dim=8, dtype=dtype)
    cache.update(keys, values)
    stored = cache.update(keys[0], values[0])
    for got, given in ((stored.keys, keys), (stored.values, values)):
        assert got.dtype == dtype
        assert mx.array_equal(got[:2], given.astype(dtype))
        assert mx.array_equal(got[2], given[0].astype(dtype))


def test_task_1_the_place_was_there_before() -> None:
    """Oracle: the class's docstring: the arrays are as long as the longest sequence, from the start."""
    cache = small_cache(6)
    for value in (1.0, 2.0):
        stored = cache.update(tokens([value]), tokens([value]))
        assert cache.k_cache.shape == cache.v_cache.shape == (6, 1, 2)
    assert stored.keys.shape == (2, 1, 2)


def test_task_1_many_updates_of_many_sizes() -> None:
    """Oracle: two Python lists that everything is appended to."""
    rng = np.random.default_rng(3)
    cache, keys, values = NaiveKVCache(40, num_heads=2, head_dim=4, dtype=mx.float32), [], []
    while len(keys) < 40:
        count = int(rng.integers(1, min(7, 41 - len(keys))))
        new = rng.normal(size=(2, count, 2, 4)).astype(np.float32)
        keys.extend(new[0])
        values.extend(new[1])
        stored = cache.update(*(mx.array(x[0] if count == 1 else x) for x in new))
        assert cache.current_len == len(keys)
        assert np.array_equal(np.array(stored.keys), np.stack(keys))
        assert np.array_equal(np.array(stored.values), np.stack(values))


# Task 2: NaiveKVCache.reset


def test_task_2_after_a_reset_the_cache_is_empty() -> None:
    """Oracle: by hand."""
    cache = small_cache()
    cache.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    cache.reset()
    assert cache.current_len == 0


def test_task_2_a_new_sequence_shows_nothing_of_the_old_one() -> None:
    """Oracle: by hand: one token is stored, so one comes back."""
    cache = small_cache()
    cache.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    cache.reset()
    stored = cache.update(tokens([7]), tokens([8]))
    assert stored.keys.tolist() == tokens([7]).tolist()
    assert stored.values.tolist() == tokens([8]).tolist()


def test_task_2_after_a_reset_there_is_room_for_everything_again() -> None:
    """Oracle: by hand: a full cache takes as many tokens as before, and not one more."""
    cache = small_cache(2)
    for _ in range(3):
        stored = cache.update(tokens([1, 2]), tokens([3, 4]))
        assert stored.keys.tolist() == tokens([1, 2]).tolist()
        with pytest.raises(ValueError):
            cache.update(tokens([5]), tokens([6]))
        cache.reset()


def test_task_2_the_memory_stays() -> None:
    """Oracle: the docstring: the arrays are as long as before."""
    cache = small_cache(5)
    cache.update(tokens([1]), tokens([2]))
    cache.reset()
    assert cache.k_cache.shape == cache.v_cache.shape == (5, 1, 2)


def test_task_2_an_empty_cache_may_be_reset() -> None:
    """Oracle: by hand: nothing changes."""
    cache = small_cache()
    cache.reset()
    assert cache.update(tokens([1]), tokens([2])).values.tolist() == tokens([2]).tolist()


# Task 3: NaiveKVCache.allocated_bytes


def test_task_3_keys_and_values_of_all_places() -> None:
    """Oracle: by hand: 4 places of 1 head of 2 numbers of 4 bytes, for keys and for values."""
    assert small_cache(4).allocated_bytes() == 2 * 4 * 1 * 2 * 4 == 64


@pytest.mark.parametrize(("dtype", "size"), [(mx.bfloat16, 2), (mx.float16, 2), (mx.float32, 4)])
def test_task_3_every_dimension_and_the_type_count(dtype: mx.Dtype, size: int) -> None:
    """Oracle: by hand: 7 places of 3 heads of 5 numbers."""
    assert NaiveKVCache(7, num_heads=3, head_dim=5, dtype=dtype).allocated_bytes() == 2 * 7 * 3 * 5 * size


def test_task_3_what_is_stored_changes_nothing() -> None:
    """Oracle: by hand. Counting the tokens that are stored is the next task."""
    cache = small_cache(4)
    for value in (1.0, 2.0, 3.0, 4.0):
        cache.update(tokens([value]), tokens([value]))
        assert cache.allocated_bytes() == 64


def test_task_3_sixteen_sequences_of_2048_tokens_take_half_a_gibibyte() -> None:
    """Oracle: by hand: a token of 32 heads of 128 in bfloat16 takes 2 * 32 * 128 * 2 = 16,384 bytes.

    Measured on caches of one token and of one head, so that nobody needs the half gibibyte.
    """
    assert NaiveKVCache(1, num_heads=32, head_dim=128).allocated_bytes() == 16_384
    one_head = NaiveKVCache(2048, num_heads=1, head_dim=128).allocated_bytes()
    assert 16 * 32 * one_head == 16 * 2048 * 16_384 == 0.5 * 1024**3


# Task 4: NaiveKVCache.used_bytes


def test_task_4_keys_and_values_of_the_tokens_that_are_stored() -> None:
    """Oracle: by hand: 2 numbers of 4 bytes for a token's key, and as many for its value."""
    cache = small_cache(4)
    assert cache.used_bytes() == 0
    cache.update(tokens([1]), tokens([1]))
    assert cache.used_bytes() == 16
    cache.update(tokens([2, 3]), tokens([2, 3]))
    assert cache.used_bytes() == 48


@pytest.mark.parametrize(("dtype", "size"), [(mx.bfloat16, 2), (mx.float16, 2), (mx.float32, 4)])
def test_task_4_bytes_are_counted_in_the_type_of_the_cache(dtype: mx.Dtype, size: int) -> None:
    """Oracle: by hand: 4 tokens of 3 heads of 5 numbers, given in float32 whatever the cache stores."""
    cache = NaiveKVCache(7, num_heads=3, head_dim=5, dtype=dtype)
    cache.update(mx.ones((4, 3, 5)), mx.ones((4, 3, 5)))
    assert cache.used_bytes() == 2 * 4 * 3 * 5 * size


def test_task_4_a_full_cache_uses_all_that_it_takes() -> None:
    """Oracle: by hand: 64 bytes, as many as 4 places have."""
    cache = small_cache(4)
    cache.update(tokens([1, 2, 3, 4]), tokens([1, 2, 3, 4]))
    assert cache.used_bytes() == 64


def test_task_4_an_ended_sequence_uses_nothing() -> None:
    """Oracle: by hand."""
    cache = small_cache(4)
    cache.update(tokens([1, 2]), tokens([1, 2]))
    cache.reset()
    assert cache.used_bytes() == 0


def test_task_4_of_2048_places_most_are_wasted_on_100_to_500_tokens() -> None:
    """Oracle: by hand: 16 lengths from 100 to 490, 295 on average: 1 - 295 / 2048 is 85.6%."""
    allocated = used = 0
    for length in range(100, 500, 26):
        cache = NaiveKVCache(2048, num_heads=1, head_dim=2)
        cache.update(mx.ones((length, 1, 2)), mx.ones((length, 1, 2)))
        allocated += cache.allocated_bytes()
        used += cache.used_bytes()
    assert 1 - used / allocated == pytest.approx(1 - 295 / 2048)
    assert 1 - used / allocated == pytest.approx(0.85, abs=0.01)
