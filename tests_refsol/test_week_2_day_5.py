"""Day 2.5: FlashAttention: attention in tiles, with softmax in one pass over the keys.

When these tests pass, you have attention that never stores a row of scores: for each query it carries a
maximum, a sum and the weighted values from tile to tile, and its result equals plain attention up to
rounding.
"""

from collections.abc import Callable
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.flash_attention import Running, absorb, flash_attention
from tiny_llm.kernels import compiled_kernel, twins


def nothing_seen(*shape: int) -> Running:
    """The running state before the first key, for queries of this shape, [..., L, D]."""
    column = (*shape[:-1], 1)
    return Running(mx.full(column, -mx.inf), mx.zeros(column), mx.zeros(shape))


def running_sums(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition of `Running` for all keys at once, in float64; every query sees at least one key."""
    scores, values = scores.astype(np.float64), values.astype(np.float64)
    largest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - largest)
    return largest, weights.sum(axis=-1, keepdims=True), weights @ values


def check(running: Running, want: tuple[np.ndarray, np.ndarray, np.ndarray], rtol: float = 1e-5) -> None:
    """Assert that all three fields have these shapes and values."""
    for name, got, expected in zip(Running._fields, running, want, strict=True):
        assert got.shape == expected.shape, name
        np.testing.assert_allclose(np.array(got), expected, rtol=rtol, atol=1e-5, err_msg=name)


def one(number: float) -> mx.array:
    """A score or a value of one query, one key and one value: [1, 1]."""
    return mx.array([[number]], mx.float32)


# Task 1: absorb


def test_task_1_the_first_key_gets_weight_one() -> None:
    """Oracle: by hand: the only score so far is the largest, so its weight is exp(0) = 1."""
    running = absorb(nothing_seen(1, 1), one(5), one(2))
    check(running, (np.array([[5.0]]), np.array([[1.0]]), np.array([[2.0]])))


def test_task_1_a_larger_score_scales_down_the_earlier_sums() -> None:
    """Oracle: by hand: relative to ln 3, a score of 0 has weight 1/3: the sum is 1/3 + 1, the values 2/3 + 8.

    Common mistake: rescaling only the sum or only the values.
    """
    running = absorb(nothing_seen(1, 1), one(0), one(2))
    running = absorb(running, one(np.log(3)), one(8))
    check(running, (np.array([[np.log(3)]]), np.array([[4 / 3]]), np.array([[26 / 3]])))


def test_task_1_a_smaller_score_does_not_rescale_earlier_sums() -> None:
    """Oracle: by hand: relative to ln 3, a score of 0 has weight 1/3, in any order."""
    running = absorb(nothing_seen(1, 1), one(np.log(3)), one(8))
    running = absorb(running, one(0), one(2))
    check(running, (np.array([[np.log(3)]]), np.array([[4 / 3]]), np.array([[26 / 3]])))


def test_task_1_a_tile_may_hold_several_keys() -> None:
    """Oracle: by hand: two queries, two keys: weights 1 and 1, and 1/2 and 1."""
    scores = mx.array([[1.0, 1.0], [0.0, np.log(2)]])
    values = mx.array([[10.0, 0.0, 1.0], [20.0, 4.0, 1.0]])
    running = absorb(nothing_seen(2, 3), scores, values)
    want = np.array([[1.0], [np.log(2)]]), np.array([[2.0], [1.5]]), np.array([[30, 4, 2], [25, 4, 1.5]])
    check(running, want)


@pytest.mark.parametrize("tiles", [(12,), (1, 11), (11, 1), (5, 4, 3), (1,) * 12])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_task_1_after_every_tile_the_sums_cover_all_keys_so_far(
    leading: tuple[int, ...], tiles: tuple[int, ...]
) -> None:
    """Oracle: the definition of `Running` in NumPy, float64, over all keys so far at once."""
    rng = np.random.default_rng(1)
    scores = (3 * rng.normal(size=(*leading, 4, 12))).astype(np.float32)
    values = rng.normal(size=(*leading, 12, 5)).astype(np.float32)
    running, start = nothing_seen(*leading, 4, 5), 0
    for count in tiles:
        stop = start + count
        running = absorb(running, mx.array(scores[..., start:stop]), mx.array(values[..., start:stop, :]))
        check(running, running_sums(scores[..., :stop], values[..., :stop, :]))
        start = stop


def test_task_1_a_hidden_key_has_no_weight() -> None:
    """Oracle: the definition, over the visible keys."""
    rng = np.random.default_rng(2)
    scores, values = rng.normal(size=(1, 6)).astype(np.float32), rng.normal(size=(6, 3)).astype(np.float32)
    hidden = scores.copy()
    hidden[:, [1, 4]] = -np.inf
    running = absorb(nothing_seen(1, 3), mx.array(hidden[:, :3]), mx.array(values[:3]))
    running = absorb(running, mx.array(hidden[:, 3:]), mx.array(values[3:]))
    seen = [0, 2, 3, 5]
    check(running, running_sums(scores[:, seen], values[seen]))


def test_task_1_a_completely_hidden_tile_changes_nothing_and_gives_no_nan() -> None:
    """Oracle: the docstring: largest = -inf and total = 0 stay. Common mistake: -inf - -inf, which is NaN."""
    running, hidden = nothing_seen(2, 3), mx.full((2, 4), -mx.inf)
    for _ in range(2):
        running = absorb(running, hidden, mx.ones((4, 3)))
        assert np.array(running.largest).tolist() == [[-np.inf], [-np.inf]]
        assert running.total.tolist() == [[0], [0]]
        assert running.weighted.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_task_1_a_visible_tile_after_hidden_tiles_is_exact() -> None:
    """Oracle: the definition, over the visible tile only."""
    rng = np.random.default_rng(3)
    scores, values = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    running = absorb(nothing_seen(2, 3), mx.full((2, 5), -mx.inf), mx.full((5, 3), 7.0))
    running = absorb(running, mx.array(scores), mx.array(values))
    check(running, running_sums(scores, values))


def test_task_1_a_hidden_tile_after_a_visible_one_changes_nothing() -> None:
    """Oracle: the definition, over the visible tile only."""
    rng = np.random.default_rng(4)
    scores, values = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    running = absorb(nothing_seen(2, 3), mx.array(scores), mx.array(values))
    running = absorb(running, mx.full((2, 5), -mx.inf), mx.full((5, 3), 7.0))
    check(running, running_sums(scores, values))


def test_task_1_queries_are_independent() -> None:
    """Oracle: by hand: the first query sees only the second tile, the other one only the first tile."""
    running = absorb(nothing_seen(2, 1), mx.array([[-np.inf, -np.inf], [1.0, 1.0]]), mx.array([[2.0], [4.0]]))
    running = absorb(running, mx.array([[3.0], [-np.inf]]), mx.array([[9.0]]))
    check(running, (np.array([[3.0], [1.0]]), np.array([[1.0], [2.0]]), np.array([[9.0], [6.0]])))


@pytest.mark.parametrize(
    "scores", [[1e4, 9999, 1e4 + 1], [-1e4, 1e4, 0], [1e4, -1e4, 9998], [-1e4, -9999, -1e4]]
)
def test_task_1_scores_of_ten_thousand_do_not_overflow(scores: list[float]) -> None:
    """Oracle: the definition in float64. exp(10,000) is inf, and inf / inf is NaN."""
    values = np.array([[1.0], [2.0], [4.0]], np.float32)
    running = nothing_seen(1, 1)
    for score, value in zip(scores, values, strict=True):
        running = absorb(running, one(score), mx.array(value[None]))
    check(running, running_sums(np.array([scores], np.float32), values))


def test_task_1_the_sums_of_float16_values_are_float32_within_a_tile() -> None:
    """Oracle: by hand: two keys of weight 1, so 40,000 + 40,000; the largest float16 is 65,504.

    Common mistake: casting the weights to the type of the values.
    """
    running = absorb(nothing_seen(1, 1), mx.zeros((1, 2)), mx.full((2, 1), 40_000, mx.float16))
    assert running.weighted.dtype == mx.float32
    check(running, (np.array([[0.0]]), np.array([[2.0]]), np.array([[80_000.0]])))


@pytest.mark.parametrize("tile", [70_000, 7_000])
def test_task_1_the_sum_of_many_weights_is_float32_for_float16_scores(tile: int) -> None:
    """Oracle: by hand: 70,000 keys of weight 1 and value 1/2; the largest float16 is 65,504.

    Common mistake: computing the weights or their sum in the type of the scores or of the values.
    """
    running = nothing_seen(1, 1)
    for _ in range(70_000 // tile):
        running = absorb(running, mx.zeros((1, tile), mx.float16), mx.full((tile, 1), 0.5, mx.float16))
        for name, part in zip(Running._fields, running, strict=True):
            assert part.dtype == mx.float32, name
    check(running, (np.array([[0.0]]), np.array([[70_000.0]]), np.array([[35_000.0]])))


# Task 2: flash_attention


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool, group: int = 1
) -> np.ndarray:
    """Plain softmax attention in float64, one query at a time; `group` query heads share keys and values."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    offset, out = k.shape[2] - q.shape[2], np.zeros_like(q)
    for b, h, i in np.ndindex(q.shape[:3]):
        stop = offset + i + 1 if causal else k.shape[2]
        scores = k[b, h // group, :stop] @ q[b, h, i] * scale
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights / weights.sum() @ v[b, h // group, :stop]
    return out


def random_qkv(
    seed: int, batch: int, heads: int, kv_heads: int, queries: int, keys: int, size: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [B, H, L, D], keys and values [B, Hkv, S, D], float32."""
    rng = np.random.default_rng(seed)
    shapes = (batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, size)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


def run(
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray], scale: float, causal: bool, tile: int | None = None
) -> np.ndarray:
    """`flash_attention` on NumPy arrays; if `tile` is None, with the default tile size."""
    q, k, v = (mx.array(x) for x in qkv)
    out = (
        flash_attention(q, k, v, scale, causal)
        if tile is None
        else flash_attention(q, k, v, scale, causal, tile)
    )
    return np.array(out)


def heads_of_size_2(*numbers: float) -> np.ndarray:
    """[1, 1, len(numbers), 2]: a number and a zero for each position."""
    return np.array([[[[number, 0] for number in numbers]]], np.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", [1, 3, 16, 149])
def test_task_2_absorb_gets_the_keys_in_tiles(
    tile: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the docstring: no array of scores is larger than [..., L, tile], and S keys are S / tile tiles.

    Common mistakes: a mask of `tile` columns for a shorter last tile; a loop that ignores `tile`.
    """
    shapes = []

    def recorded(running: Running, scores: mx.array, values: mx.array) -> Running:
        shapes.append(scores.shape)
        keys, own = scores.shape[-1], values.shape[-2]
        assert keys == own, f"with tile={tile}, absorb got the scores of {keys} keys and {own} values"
        return absorb(running, scores, values)

    monkeypatch.setattr("tiny_llm.flash_attention.absorb", recorded)
    qkv = random_qkv(seed=12, batch=1, heads=2, kv_heads=1, queries=150, keys=150)
    with twins():  # of the reference the readable function, which calls `absorb`, too
        run(qkv, 0.35, causal, tile)
    too_large = [shape for shape in shapes if shape[-1] > tile]
    assert not too_large, f"with tile={tile}, absorb got scores of the shape {too_large[0]}"
    rows = sum(prod(shape[:-1]) for shape in shapes)  # of scores: one for each query, head and tile
    tiles, most = rows / (2 * 150), -(-150 // tile)
    assert tiles <= most, f"with tile={tile}, absorb got {tiles:g} tiles for each query; 150 keys are {most}"


@pytest.mark.parametrize("tile", [1, 2, 3, 64])
def test_task_2_equal_keys_give_the_mean_of_the_values(tile: int) -> None:
    """Oracle: by hand: the mean of 2, 4 and 9 is 5; with a causal mask the running means are 2, 3 and 5."""
    qkv = heads_of_size_2(1, 1, 1), heads_of_size_2(0, 0, 0), heads_of_size_2(2, 4, 9)
    np.testing.assert_allclose(run(qkv, 1.0, False, tile)[0, 0, :, 0], [5, 5, 5], rtol=1e-6)
    np.testing.assert_allclose(run(qkv, 1.0, True, tile)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


@pytest.mark.parametrize("tile", [1, 2, 64])
def test_task_2_scores_are_multiplied_by_the_scale(tile: int) -> None:
    """Oracle: by hand: the scores 0 and 2 ln 3 * 0.5 have weights 1/4 and 3/4; values 0 and 8 give 6."""
    qkv = heads_of_size_2(2), heads_of_size_2(0, np.log(3)), heads_of_size_2(0, 8)
    np.testing.assert_allclose(run(qkv, 0.5, False, tile)[0, 0, :, 0], [6], rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_task_2_the_scores_of_all_keys_never_exist_together(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the docstring; 128 tiles, so the peak is far below the size of all scores.

    Common mistake: computing all scores before the loop.
    """
    heads, queries, keys, tile = 4, 64, 4096, 32
    all_scores = 4 * heads * queries * keys
    q, k, v = (mx.array(x) for x in random_qkv(13, 1, heads, 1, queries, keys, size=4))
    mx.eval(q, k, v)
    mx.clear_cache()
    before, peaks = mx.get_active_memory(), [0]

    def measured(running: Running, scores: mx.array, values: mx.array) -> Running:
        running = absorb(running, scores, values)
        mx.eval(running)  # or MLX computes the scores of many tiles before it uses them
        peaks.append(mx.get_peak_memory() - before)
        return running

    monkeypatch.setattr("tiny_llm.flash_attention.absorb", measured)
    mx.reset_peak_memory()
    with twins():
        mx.eval(flash_attention(q, k, v, 0.5, causal, tile))
    assert max(peaks) < all_scores, f"the peak is {max(peaks):,} bytes; all scores have {all_scores:,} bytes"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", range(1, 15))
def test_task_2_every_tile_size_gives_the_same_result(tile: int, causal: bool) -> None:
    """Oracle: NumPy in float64, for 11 keys: tiles that divide them, that do not, and that are longer."""
    qkv = random_qkv(seed=5, batch=2, heads=2, kv_heads=2, queries=11, keys=11)
    out = run(qkv, 0.35, causal, tile)
    assert out.shape == (2, 2, 11, 8)
    np.testing.assert_allclose(out, attention(*qkv, 0.35, causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_task_2_the_default_tile_size_matches_numpy(length: int) -> None:
    """Oracle: NumPy in float64, for lengths around those of one tile and of two."""
    qkv = random_qkv(seed=6, batch=1, heads=2, kv_heads=1, queries=length, keys=length)
    out = run(qkv, 0.35, causal=True)
    np.testing.assert_allclose(out, attention(*qkv, 0.35, True, group=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 3, 4, 64])
@pytest.mark.parametrize("queries", [1, 2, 5, 9])
def test_task_2_the_queries_are_the_last_of_the_positions(queries: int, tile: int) -> None:
    """Oracle: NumPy in float64. A mask that counts queries from position 0 hides earlier keys."""
    qkv = random_qkv(seed=7, batch=1, heads=2, kv_heads=2, queries=queries, keys=9)
    out = run(qkv, 0.4, True, tile)
    np.testing.assert_allclose(out, attention(*qkv, 0.4, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 10), (10, 3)])
def test_task_2_without_a_mask_every_query_sees_every_key(queries: int, keys: int) -> None:
    """Oracle: NumPy in float64; there may be more queries than keys."""
    qkv = random_qkv(seed=8, batch=2, heads=2, kv_heads=2, queries=queries, keys=keys)
    out = run(qkv, 0.3, False, 4)
    np.testing.assert_allclose(out, attention(*qkv, 0.3, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (6, 3), (5, 1)])
def test_task_2_each_query_head_reads_the_key_and_value_head_of_its_group(heads: int, kv_heads: int) -> None:
    """Oracle: NumPy in float64. Query head h reads head h // (H / Hkv). Common mistake: h % Hkv."""
    qkv = random_qkv(seed=9, batch=2, heads=heads, kv_heads=kv_heads, queries=4, keys=7)
    out = run(qkv, 0.35, True, 3)
    np.testing.assert_allclose(out, attention(*qkv, 0.35, True, heads // kv_heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_task_2_the_result_matches_the_fused_mlx_operator(causal: bool) -> None:
    """Oracle: `mx.fast.scaled_dot_product_attention`."""
    qkv = random_qkv(seed=10, batch=2, heads=8, kv_heads=2, queries=20, keys=50, size=32)
    q, k, v = (mx.array(x) for x in qkv)
    mask = "causal" if causal else None
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=32**-0.5, mask=mask)
    np.testing.assert_allclose(run(qkv, 32**-0.5, causal, 16), np.array(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [2, 64])
@pytest.mark.parametrize(("dtype", "rtol"), [(mx.float32, 1e-4), (mx.float16, 5e-3), (mx.bfloat16, 4e-2)])
def test_task_2_the_output_has_the_dtype_of_the_queries(dtype: mx.Dtype, rtol: float, tile: int) -> None:
    """Oracle: NumPy in float64, on queries, keys and values rounded to that dtype."""
    q, k, v = (mx.array(x).astype(dtype) for x in random_qkv(11, 1, 4, 2, queries=5, keys=7))
    out = flash_attention(q, k, v, 0.35, True, tile)
    assert out.dtype == dtype
    want = attention(*(np.array(x.astype(mx.float32)) for x in (q, k, v)), 0.35, True, group=2)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("tile", [1, 2, 64])
def test_task_2_sums_of_float16_values_are_float32_within_and_between_tiles(tile: int) -> None:
    """Oracle: by hand: the mean of three values of 40,000 is 40,000; their sum is inf in float16."""
    q, k = mx.zeros((1, 1, 1, 2), mx.float16), mx.zeros((1, 1, 3, 2), mx.float16)
    out = flash_attention(q, k, mx.full((1, 1, 3, 2), 40_000, mx.float16), 1.0, False, tile)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), np.full((1, 1, 1, 2), 40_000), rtol=5e-3)


@pytest.mark.parametrize(
    ("of_q", "of_k", "of_v"),
    [
        (mx.float16, mx.float32, mx.float32),
        (mx.float32, mx.float16, mx.float16),
        (mx.bfloat16, mx.bfloat16, mx.float32),
        (mx.bfloat16, mx.float32, mx.bfloat16),
    ],
    ids=str,
)
def test_task_2_the_output_has_the_dtype_of_q_if_k_or_v_have_another(
    of_q: mx.Dtype, of_k: mx.Dtype, of_v: mx.Dtype
) -> None:
    """Oracle: the docstring, and NumPy in float64."""
    qkv = random_qkv(14, 1, 4, 2, queries=5, keys=7)
    q, k, v = (mx.array(x).astype(dtype) for x, dtype in zip(qkv, (of_q, of_k, of_v), strict=True))
    out = flash_attention(q, k, v, 0.35, True, 2)
    assert out.dtype == of_q
    want = attention(*(np.array(x.astype(mx.float32)) for x in (q, k, v)), 0.35, True, group=2)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), want, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("tile", [70_000, 7_000])
def test_task_2_the_sum_of_many_float16_weights_is_float32(tile: int) -> None:
    """Oracle: by hand: 70,000 equal keys, all values 1/2; the largest float16 is 65,504."""
    q, k = mx.zeros((1, 1, 1, 2), mx.float16), mx.zeros((1, 1, 70_000, 2), mx.float16)
    out = flash_attention(q, k, mx.full(k.shape, 0.5, mx.float16), 1.0, False, tile)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), np.full((1, 1, 1, 2), 0.5), rtol=5e-3)


@pytest.mark.parametrize("tile", [1, 2, 64])
@pytest.mark.parametrize("base", [1e4, -1e4])
def test_task_2_large_scores_do_not_overflow(base: float, tile: int) -> None:
    """Oracle: by hand: a score that is larger by 1 has e times the weight, for all scores."""
    q = np.array([[[[1, 0], [1, 1]]]], np.float32)
    k = np.array([[[[base, 0], [base, 1], [base, 0]]]], np.float32)
    weights = np.exp(np.float64([0, 1, 0]))
    out = run((q, k, heads_of_size_2(3, 6, 9)), 1.0, False, tile)
    np.testing.assert_allclose(out[0, 0, :, 0], [6, weights @ [3, 6, 9] / weights.sum()], rtol=1e-4)


@pytest.mark.parametrize("tile", [1, 2, 64])
@pytest.mark.parametrize("number", [150.0, 1e15])
def test_task_2_a_hidden_key_has_no_weight_next_to_very_small_scores(number: float, tile: int) -> None:
    """Oracle: by hand: all scores are -22,500, or all are -1e30; the running means are 1, 1.5 and 4.

    Common mistake: a finite number instead of -inf, for hidden keys or for the largest score at the start.
    """
    qkv = heads_of_size_2(*[-number] * 3), heads_of_size_2(*[number] * 3), heads_of_size_2(1, 2, 9)
    np.testing.assert_allclose(run(qkv, 1.0, True, tile)[0, 0, :, 0], [1, 1.5, 4], rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 2, 3, 64])
def test_task_2_the_largest_score_takes_all_the_weight_in_every_tile(tile: int) -> None:
    """Oracle: by hand: the largest score takes all the weight, in every tile."""
    for winner in range(5):
        keys = [-1e4, 5e3, -3e3, 2e3, 0.0]
        keys[winner] = 1e4
        qkv = heads_of_size_2(1), heads_of_size_2(*keys), heads_of_size_2(1, 2, 3, 4, 5)
        np.testing.assert_allclose(run(qkv, 1.0, False, tile)[0, 0, :, 0], [winner + 1], rtol=1e-5)


# Task 3, optional: flash_attention.cpp. Without the learner's file, the reference's kernel is tested.


def by_kernel(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> np.ndarray:
    """Attention by the compiled kernel."""
    return np.array(compiled_kernel("flash_attention")(q, k, v, scale, causal))


def heads(count: int, length: int, size: int, seed: int) -> mx.array:
    """Random queries, keys or values of two sequences, [2, count, length, size]."""
    noise = np.random.default_rng(seed).normal(size=(2, count, length, size))
    return mx.array(noise.astype(np.float32))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [8, 20, 64])
@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 70), (32, 32), (5, 64), (33, 97)])
def test_task_3_the_kernel_matches_plain_attention(length: int, total: int, size: int, causal: bool) -> None:
    """Oracle: `mx.fast.scaled_dot_product_attention`.

    Six query heads share two; 20 is not a multiple of 8.
    """
    q = heads(6, length, size, 1)
    k, v = heads(2, total, size, 2), heads(2, total, size, 3)
    mask = "causal" if causal else None
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=mask)
    got = by_kernel(q, k, v, size**-0.5, causal)
    np.testing.assert_allclose(got, np.array(want), rtol=1e-4, atol=1e-5)


def tokens_first(x: mx.array) -> mx.array:
    """The same numbers, as a projection writes them: in memory they are [B, L, H, D]."""
    return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)


def part_of_a_cache(x: mx.array) -> mx.array:
    """The same numbers, as a view of a longer array with more heads and more numbers per head."""
    return mx.pad(x, [(0, 0), (1, 2), (3, 4), (0, 5)], constant_values=100.0)[:, 1:-2, 3:-4, :-5]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("view", [tokens_first, part_of_a_cache])
@pytest.mark.parametrize("changed", ["q", "k", "v", "qkv"])
def test_task_3_the_kernel_uses_the_strides_of_q_k_and_v(
    changed: str, view: Callable[[mx.array], mx.array], causal: bool
) -> None:
    """Oracle: `mx.fast.scaled_dot_product_attention`. `changed` names the arrays that are views.

    Common mistake: `k + i * D` instead of `k + i * k_token`. Each array has strides of its own.
    """
    arrays = {"q": heads(6, 40, 16, 1), "k": heads(2, 70, 16, 2), "v": heads(2, 70, 16, 3)}
    mask = "causal" if causal else None
    want = mx.fast.scaled_dot_product_attention(*arrays.values(), scale=0.25, mask=mask)
    got = by_kernel(*(view(x) if name in changed else x for name, x in arrays.items()), 0.25, causal)
    np.testing.assert_allclose(got, np.array(want), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_task_3_a_row_is_bit_identical_in_a_shorter_call() -> None:
    """Oracle: the whole sequence at once.

    Tiles aligned to the first query would change the summation order.
    """
    q, k, v = heads(4, 90, 16, 4), heads(2, 90, 16, 5), heads(2, 90, 16, 6)
    whole = by_kernel(q, k, v, 0.25, True)
    for start in (1, 31, 45, 89):
        assert np.array_equal(by_kernel(q[:, :, start:], k, v, 0.25, True), whole[:, :, start:])


@pytest.mark.usefixtures("compiled")
def test_task_3_a_row_is_bit_identical_without_the_tokens_after_it() -> None:
    """Oracle: the whole sequence at once.

    Common mistake: tiles that end at the last key. Then the number of keys changes the summation order.
    """
    q, k, v = heads(4, 90, 16, 4), heads(2, 90, 16, 5), heads(2, 90, 16, 6)
    whole = by_kernel(q, k, v, 0.25, True)
    for stop in (1, 31, 33, 45, 89):
        first = (x[:, :, :stop] for x in (q, k, v))
        assert np.array_equal(by_kernel(*first, 0.25, True), whole[:, :, :stop])


@pytest.mark.usefixtures("compiled")
def test_task_3_large_scores_do_not_overflow() -> None:
    """Oracle: by hand: a score of 10,000 in the second tile gets all the weight."""
    q, k, v = mx.ones((1, 1, 1, 8)), mx.zeros((1, 1, 40, 8)), heads(1, 40, 8, 7)[:1]
    k[0, 0, 35] = 1250.0
    np.testing.assert_allclose(by_kernel(q, k, v, 1.0, False)[0, 0, 0], np.array(v[0, 0, 35]), rtol=1e-6)
