"""Day 2.2: one contiguous cache per sequence, as long as the longest sequence that it may hold.

When these tests pass, you have a cache that stores new tokens without moving old ones, a copy of it for a
second completion of the same prompt, and the numbers that decide how long it should be: internal
fragmentation against refused requests.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.naive_cache import KeysValues, NaiveKVCache, Reservation, reserve


def tokens(values: list[float]) -> mx.array:
    """Tokens of one head of size 2, [1, n, 2]: value i is stored as [i, i]."""
    return mx.array([[[value, value] for value in values]], mx.float32)


def small_cache(max_seq_len: int = 4) -> NaiveKVCache:
    """A cache for a few tokens of one head of size 2 in float32."""
    return NaiveKVCache(max_seq_len, num_heads=1, head_dim=2, dtype=mx.float32)


# Task 1: NaiveKVCache.update


def test_task_1_tokens_are_stored_one_after_the_other() -> None:
    """Oracle: by hand."""
    cache = small_cache()
    first = cache.update(mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0]]))
    assert first.keys.tolist() == [[[1, 2]]]
    assert first.values.tolist() == [[[3, 4]]]
    assert cache.current_len == 1
    second = cache.update(mx.array([[5.0, 6.0]]), mx.array([[7.0, 8.0]]))
    assert second.keys.tolist() == [[[1, 2], [5, 6]]]
    assert second.values.tolist() == [[[3, 4], [7, 8]]]
    assert cache.current_len == 2


def test_task_1_several_tokens_can_be_stored_at_once() -> None:
    """Oracle: by hand."""
    cache = small_cache()
    cache.update(tokens([1, 2]), tokens([10, 20]))
    stored = cache.update(tokens([3]), tokens([30]))
    assert stored.keys.tolist() == tokens([1, 2, 3]).tolist()
    assert stored.values.tolist() == tokens([10, 20, 30]).tolist()
    assert cache.current_len == 3


def test_task_1_a_token_keeps_its_heads() -> None:
    """Oracle: by hand, every number is different. Common mistake: heads and tokens swapped."""
    cache = NaiveKVCache(5, num_heads=3, head_dim=2, dtype=mx.float32)
    keys = mx.arange(12, dtype=mx.float32).reshape(3, 2, 2)  # 3 heads, 2 tokens
    stored = cache.update(keys, keys + 100)
    assert stored.keys.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    stored = cache.update(keys[:, 0] + 20, keys[:, 0] + 120)
    assert stored.keys[:, 2].tolist() == [[20, 21], [24, 25], [28, 29]]
    assert stored.values[:, 2].tolist() == [[120, 121], [124, 125], [128, 129]]
    assert stored.values[:, :2].tolist() == (keys + 100).tolist()


def test_task_1_a_cache_can_be_filled_to_its_last_position() -> None:
    """Oracle: by hand: all 3 positions can be used."""
    at_once, one_by_one = small_cache(3), small_cache(3)
    stored = at_once.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    assert stored.keys.tolist() == tokens([1, 2, 3]).tolist()
    for value in (1.0, 2.0, 3.0):
        stored = one_by_one.update(mx.full((1, 2), value), mx.full((1, 2), value + 3))
    assert stored.values.tolist() == tokens([4, 5, 6]).tolist()


@pytest.mark.parametrize("too_many", [2, 3])
def test_task_1_an_update_that_does_not_fit_is_rejected_and_stores_nothing(too_many: int) -> None:
    """Oracle: the docstring: 3 of 4 positions are used. Common mistake: storing the part that fits."""
    cache = small_cache(4)
    cache.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    with pytest.raises(ValueError):
        cache.update(tokens([9] * too_many), tokens([9] * too_many))
    assert cache.current_len == 3
    stored = cache.update(tokens([7]), tokens([8]))
    assert stored.keys.tolist() == tokens([1, 2, 3, 7]).tolist()
    assert stored.values.tolist() == tokens([4, 5, 6, 8]).tolist()


def test_task_1_one_token_too_many_is_rejected_by_a_full_and_by_an_empty_cache() -> None:
    """Oracle: the docstring. A single token [Hkv, D] counts as one, with any number of heads."""
    cache = NaiveKVCache(2, num_heads=4, head_dim=2, dtype=mx.float32)
    with pytest.raises(ValueError):
        cache.update(mx.ones((4, 3, 2)), mx.ones((4, 3, 2)))
    cache.update(mx.ones((4, 2)), mx.ones((4, 2)))
    cache.update(mx.ones((4, 2)), mx.ones((4, 2)))
    with pytest.raises(ValueError):
        cache.update(mx.ones((4, 2)), mx.ones((4, 2)))
    assert cache.current_len == 2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_task_1_stored_tokens_are_returned_in_the_dtype_of_the_cache(dtype: mx.Dtype) -> None:
    """Oracle: the same tokens rounded to the cache's dtype by MLX."""
    noise = mx.random.normal((2, 3, 2, 8), key=mx.random.key(5))
    keys, values = noise
    cache = NaiveKVCache(6, num_heads=3, head_dim=8, dtype=dtype)
    cache.update(keys, values)
    stored = cache.update(keys[:, 0], values[:, 0])
    for got, given in ((stored.keys, keys), (stored.values, values)):
        assert got.dtype == dtype
        assert mx.array_equal(got[:, :2], given.astype(dtype))
        assert mx.array_equal(got[:, 2], given[:, 0].astype(dtype))


def test_task_1_the_arrays_have_their_full_length_from_the_start() -> None:
    """Oracle: the class's docstring: the arrays are as long as the longest sequence, from the start."""
    cache = small_cache(6)
    for value in (1.0, 2.0):
        stored = cache.update(tokens([value]), tokens([value]))
        assert cache.k_cache.shape == cache.v_cache.shape == (1, 6, 2)
    assert stored.keys.shape == (1, 2, 2)


def test_task_1_updates_of_random_sizes_match_a_list() -> None:
    """Oracle: two Python lists that everything is appended to."""
    rng = np.random.default_rng(3)
    cache, keys, values = NaiveKVCache(40, num_heads=2, head_dim=4, dtype=mx.float32), [], []
    while len(keys) < 40:
        count = int(rng.integers(1, min(7, 41 - len(keys))))
        new = rng.normal(size=(2, 2, count, 4)).astype(np.float32)
        keys.extend(new[0].swapaxes(0, 1))
        values.extend(new[1].swapaxes(0, 1))
        stored = cache.update(*(mx.array(x[:, 0] if count == 1 else x) for x in new))
        assert cache.current_len == len(keys)
        assert np.array_equal(np.array(stored.keys), np.stack(keys, axis=1))
        assert np.array_equal(np.array(stored.values), np.stack(values, axis=1))


# Task 2: NaiveKVCache.copy_from


def stored(cache: NaiveKVCache) -> KeysValues:
    """The stored tokens of a cache."""
    return KeysValues(cache.k_cache[:, : cache.current_len], cache.v_cache[:, : cache.current_len])


def test_task_2_the_copy_has_the_tokens_of_the_source() -> None:
    """Oracle: by hand: keys, values and their number."""
    source, copy = small_cache(), small_cache()
    source.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    copy.copy_from(source)
    assert copy.current_len == 3
    assert stored(copy).keys.tolist() == tokens([1, 2, 3]).tolist()
    assert stored(copy).values.tolist() == tokens([4, 5, 6]).tolist()


def test_task_2_copying_replaces_the_old_tokens() -> None:
    """Oracle: by hand. Common mistake: appending the source's tokens to the old ones."""
    source, copy = small_cache(), small_cache()
    source.update(tokens([1]), tokens([2]))
    copy.update(tokens([7, 8, 9]), tokens([7, 8, 9]))
    copy.copy_from(source)
    assert copy.current_len == 1
    assert copy.update(tokens([3]), tokens([4])).keys.tolist() == tokens([1, 3]).tolist()


def test_task_2_source_and_copy_are_independent_afterwards() -> None:
    """Oracle: by hand. Common mistake: two caches that share an array or a length."""
    source, copy = small_cache(), small_cache()
    source.update(tokens([1, 2]), tokens([1, 2]))
    copy.copy_from(source)
    first = source.update(tokens([3]), tokens([3]))
    second = copy.update(tokens([8]), tokens([9]))
    assert first.keys.tolist() == tokens([1, 2, 3]).tolist()
    assert second.keys.tolist() == tokens([1, 2, 8]).tolist()
    assert second.values.tolist() == tokens([1, 2, 9]).tolist()
    source.reset()
    assert copy.current_len == 3


def test_task_2_copying_an_empty_source_empties_the_cache() -> None:
    """Oracle: by hand."""
    copy = small_cache()
    copy.update(tokens([7]), tokens([7]))
    copy.copy_from(small_cache())
    assert copy.current_len == 0


def test_task_2_copying_a_cache_from_itself_changes_nothing() -> None:
    """Oracle: by hand. Common mistake: reading the source's length after the reset."""
    cache = small_cache()
    cache.update(tokens([1, 2]), tokens([3, 4]))
    cache.copy_from(cache)
    assert stored(cache).keys.tolist() == tokens([1, 2]).tolist()
    assert stored(cache).values.tolist() == tokens([3, 4]).tolist()


def test_task_2_a_shorter_cache_can_take_as_many_tokens_as_it_has_positions() -> None:
    """Oracle: by hand: the array of the copy keeps its length, and it is full."""
    source, copy = small_cache(6), small_cache(2)
    source.update(tokens([1, 2]), tokens([3, 4]))
    copy.copy_from(source)
    assert copy.max_seq_len == 2
    assert copy.k_cache.shape == copy.v_cache.shape == (1, 2, 2)
    assert stored(copy).values.tolist() == tokens([3, 4]).tolist()
    with pytest.raises(ValueError):
        copy.update(tokens([5]), tokens([6]))


def test_task_2_a_source_that_does_not_fit_is_rejected_and_nothing_changes() -> None:
    """Oracle: the docstring. Common mistake: deleting the old tokens before the error is raised."""
    source, copy = small_cache(4), small_cache(2)
    source.update(tokens([1, 2, 3]), tokens([4, 5, 6]))
    copy.update(tokens([7]), tokens([8]))
    with pytest.raises(ValueError):
        copy.copy_from(source)
    assert copy.current_len == 1
    assert stored(copy).keys.tolist() == tokens([7]).tolist()
    assert stored(source).keys.tolist() == tokens([1, 2, 3]).tolist()


def test_task_2_a_copy_keeps_its_own_dtype() -> None:
    """Oracle: the tokens rounded to the copy's dtype by MLX."""
    noise = mx.random.normal((3, 4, 8), key=mx.random.key(6))
    source = NaiveKVCache(6, num_heads=3, head_dim=8, dtype=mx.float32)
    copy = NaiveKVCache(6, num_heads=3, head_dim=8, dtype=mx.float16)
    source.update(noise, 2 * noise)
    copy.copy_from(source)
    assert copy.k_cache.dtype == mx.float16
    assert mx.array_equal(stored(copy).keys, noise.astype(mx.float16))
    assert mx.array_equal(stored(copy).values, (2 * noise).astype(mx.float16))


# Task 3: reserve


def test_task_3_a_small_example_matches_values_worked_out_by_hand() -> None:
    """Oracle: by hand: the two that fit use 100 of 200 positions, and 4 caches of 100 fit into 410."""
    assert reserve([30, 70, 101], 100, 1, 410) == Reservation(4, 1, 0.5)


def test_task_3_only_whole_caches_count() -> None:
    """Oracle: by hand: a cache takes 10 * 8 = 80 bytes."""
    assert [reserve([], 10, 8, memory).num_caches for memory in (0, 79, 80, 159, 160)] == [0, 0, 1, 1, 2]


def test_task_3_a_sequence_that_fills_its_cache_fits() -> None:
    """Oracle: by hand: only longer ones are refused, and a full cache wastes nothing."""
    assert reserve([16], 16, 1, 16) == Reservation(1, 0, 0.0)
    assert reserve([16, 17, 40], 16, 1, 16) == Reservation(1, 2, 0.0)


def test_task_3_the_waste_is_zero_if_no_sequence_fits() -> None:
    """Oracle: the docstring: 0.0 without a division by zero."""
    assert reserve([], 8, 1, 64) == Reservation(8, 0, 0.0)
    assert reserve([9, 10], 8, 1, 64) == Reservation(8, 2, 0.0)


def test_task_3_the_waste_does_not_depend_on_the_memory() -> None:
    """Oracle: the docstring: all sequences that are not refused count, including those that must wait."""
    for memory in (0, 100, 10_000):
        assert reserve([10, 30, 50], 60, 1, memory).wasted == pytest.approx(0.5)


def test_task_3_forty_gib_hold_640_caches_of_4096_tokens() -> None:
    """Oracle: by hand: 32 heads of 128 in bfloat16 are 16 KiB a token and layer; 256 of 4,096 tokens used.

    640 caches of 64 MiB fit, and 94% of their bytes are unused.
    """
    token_bytes = 2 * 32 * 128 * 2
    found = reserve([256] * 640, 4096, token_bytes, 40 * 2**30)
    assert found.num_caches == 640
    assert found.wasted == pytest.approx(0.9375)


def test_task_3_longer_caches_refuse_fewer_requests_and_waste_more_memory() -> None:
    """Oracle: NumPy, over random lengths: a longer cache refuses no more, and fewer of them fit."""
    lengths = np.random.default_rng(7).integers(1, 500, size=200).tolist()
    before = None
    for max_seq_len in (50, 100, 200, 400, 500):
        found = reserve(lengths, max_seq_len, 4, 100_000)
        fitting = [length for length in lengths if length <= max_seq_len]
        assert found.num_caches == 100_000 // (4 * max_seq_len)
        assert found.num_refused == 200 - len(fitting)
        assert found.wasted == pytest.approx(1 - np.mean(fitting) / max_seq_len)
        assert before is None or (found.num_refused <= before.num_refused)
        before = found


def test_task_3_the_waste_matches_real_caches() -> None:
    """Oracle: `allocated_bytes` and `used_bytes` of real caches, 16 lengths from 100 to 490."""
    lengths, allocated, used = list(range(100, 500, 26)), 0, 0
    for length in lengths:
        cache = NaiveKVCache(2048, num_heads=1, head_dim=2)
        cache.update(mx.ones((1, length, 2)), mx.ones((1, length, 2)))
        allocated += cache.allocated_bytes()
        used += cache.used_bytes()
    found = reserve(lengths, 2048, token_bytes=2 * 1 * 2 * 2, memory=allocated)
    assert found.num_caches == len(lengths)
    assert found.wasted == pytest.approx(1 - used / allocated)
    assert found.wasted == pytest.approx(0.856, abs=0.001)
