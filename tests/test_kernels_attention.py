"""The attention kernels: over pages, with a sliding window, and over contiguous keys and values.

Oracle: float64. A token also has the same bits in any batch, chunk and block size. Every test runs for each
instruction set of this processor. "Same bits" means np.array_equal.
"""

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_llm_kernels as kernels
from kernel_inputs import THREADS, address_of, isa, normal, property_settings

__all__ = ["isa"]

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_unavailable() or "")

# ---- attention over pages ----


@dataclass
class Chunk:
    """Consecutive tokens of one sequence, by their positions."""

    sequence: int
    first: int
    count: int


class Pages:
    """A KV pool with a shuffled block table per sequence, and the q, k, v of all tokens."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: tuple[int, int] = (9, 3),
        size: int = 32,
        block_size: int = 16,
        dtype: mx.Dtype = mx.float32,
        seed: int = 0,
        window: int | None = None,
    ) -> None:
        self.block_size, self.size, self.scale, self.window = block_size, size, size**-0.5, window
        per_sequence = max(-(-length // block_size) for length in lengths)
        total = per_sequence * len(lengths) + 1
        order = np.random.default_rng(seed).permutation(total)[: total - 1]
        self.tables = order.reshape(len(lengths), per_sequence).astype(np.int32)
        nan = mx.full((total, heads[1], block_size, size), float("nan"), dtype=dtype)
        self.keys, self.values = nan, nan + 0  # unwritten memory must never be read
        mx.eval(self.keys, self.values)
        self.q = [normal(n, heads[0], size, seed=100 + i) for i, n in enumerate(lengths)]
        self.k = [normal(n, heads[1], size, seed=200 + i) for i, n in enumerate(lengths)]
        self.v = [normal(n, heads[1], size, seed=300 + i) for i, n in enumerate(lengths)]

    def step(self, *chunks: Chunk) -> list[np.ndarray]:
        """Run one packed step; return each chunk's output, [count, H, D]."""
        rows = np.concatenate([np.full(c.count, c.sequence) for c in chunks]).astype(np.int32)
        positions = np.concatenate([np.arange(c.first, c.first + c.count) for c in chunks]).astype(np.int32)
        blocks = self.tables[rows, positions // self.block_size]
        slots = (blocks * self.block_size + positions % self.block_size).astype(np.int32)
        q, k, v = (
            mx.array(np.concatenate([a[c.sequence][c.first : c.first + c.count] for c in chunks]))[
                None
            ].transpose(0, 2, 1, 3)
            for a in (self.q, self.k, self.v)
        )
        where = mx.array(self.tables), mx.array(rows), mx.array(positions), self.scale, self.window
        out, self.keys, self.values = kernels.write_and_attend(
            q, k, v, self.keys, self.values, mx.array(slots), *where
        )
        again = kernels.paged_attention(q, self.keys, self.values, *where)
        assert np.array_equal(np.array(again), np.array(out), equal_nan=True), (
            "paged_attention must give the bits of write_and_attend"
        )
        tokens = np.array(out)[0].transpose(1, 0, 2)
        return np.split(tokens, np.cumsum([c.count for c in chunks])[:-1])

    def read(self, sequence: int, first: int, count: int) -> np.ndarray:
        """Attention of some tokens over the current pool, without a write: [count, H, D]."""
        q = mx.array(self.q[sequence][None, first : first + count]).transpose(0, 2, 1, 3)
        rows = mx.full(count, sequence, dtype=mx.int32)
        positions = mx.arange(first, first + count, dtype=mx.int32)
        where = mx.array(self.tables), rows, positions, self.scale, self.window
        out = kernels.paged_attention(q, self.keys, self.values, *where)
        return np.array(out)[0].transpose(1, 0, 2)


def attention_oracle(pages: Pages, sequence: int, dtype: mx.Dtype) -> np.ndarray:
    """Causal attention of one whole sequence, within the window, in float64 over the stored K and V."""
    stored = [np.array(mx.array(a[sequence]).astype(dtype).astype(mx.float32)) for a in (pages.k, pages.v)]
    q = pages.q[sequence].astype(np.float64)
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1).astype(np.float64) for a in stored)
    scores = np.einsum("thd,shd->hts", q, k) * pages.scale
    seen = np.tri(len(q), dtype=bool)
    if pages.window is not None:
        seen &= ~np.tri(len(q), k=-pages.window, dtype=bool)  # positions up to position - window
    scores[:, ~seen] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_attention_agrees_with_float64_over_the_stored_values(block_size: int, dtype: mx.Dtype) -> None:
    pages = Pages([100, 33], block_size=block_size, dtype=dtype)
    pages.step(Chunk(0, 0, 40), Chunk(1, 0, 32))
    later = pages.step(Chunk(1, 32, 1), Chunk(0, 40, 60))
    np.testing.assert_allclose(later[0], attention_oracle(pages, 1, dtype)[32:], atol=2e-6)
    np.testing.assert_allclose(later[1], attention_oracle(pages, 0, dtype)[40:], atol=2e-6)


@pytest.mark.parametrize("size", [2, 6, 16, 20, 40, 64, 72, 80, 94, 128, 256, 320, 510, 512])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (15, 3), (70, 1)])
def test_attention_takes_any_head_size_and_grouping(heads: tuple[int, int], size: int) -> None:
    pages = Pages([37], heads=heads, size=size, block_size=5)
    (out,) = pages.step(Chunk(0, 0, 37))
    np.testing.assert_allclose(out, attention_oracle(pages, 0, mx.float32), atol=2e-6)


def one_token_at_a_time(dtype: mx.Dtype, heads: tuple[int, int], size: int, window: int | None) -> np.ndarray:
    kernels.set_num_threads(1)
    pages = Pages([70], heads=heads, size=size, dtype=dtype, window=window)
    return np.concatenate([pages.step(Chunk(0, t, 1))[0] for t in range(70)])


@property_settings(100)
@given(
    cuts=st.lists(st.integers(1, 69), max_size=4),
    neighbours=st.lists(st.integers(1, 40), max_size=3),
    block_size=st.sampled_from([1, 3, 16, 64]),
    threads=st.sampled_from(THREADS),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    heads=st.sampled_from([(9, 3), (4, 4), (8, 1)]),
    size=st.sampled_from([32, 32, 20]),
    window=st.one_of(st.none(), st.integers(1, 70)),
    seed=st.integers(0, 1000),
)
def test_attention_gives_a_token_the_same_bits_in_any_batch(
    cuts: list[int], neighbours: list[int], block_size: int, threads: int, dtype: mx.Dtype,
    heads: tuple[int, int], size: int, window: int | None, seed: int,
) -> None:  # fmt: skip
    """For any prefill chunks, other tokens in the step, block size, table order and number of threads."""
    want = one_token_at_a_time(dtype, heads, size, window)
    kernels.set_num_threads(threads)
    pages = Pages(
        [70, *neighbours],
        heads=heads, size=size, dtype=dtype, block_size=block_size, seed=seed, window=window,
    )  # fmt: skip
    others = [Chunk(i + 1, 0, n) for i, n in enumerate(neighbours)]
    edges = [0, *sorted(set(cuts)), 70]
    got = [pages.step(*others, Chunk(0, begin, end - begin))[-1] for begin, end in pairwise(edges)]
    assert np.array_equal(np.concatenate(got), want)


# Positions near the ends of partitions of 128 and of the sequence.
LATE = [0, 126, 127, 128, 129, 255, 256, 300, 511, 512, 599]


@pytest.mark.parametrize("window", [None, 1, 128, 129, 400])
@pytest.mark.parametrize(
    ("heads", "size", "dtype"),
    [((9, 3), 64, mx.float16), ((4, 4), 20, mx.float32), ((70, 1), 16, mx.bfloat16)],
)
def test_splitting_a_long_context_into_partitions_does_not_change_bits(
    heads: tuple[int, int], size: int, window: int | None, dtype: mx.Dtype
) -> None:
    """Oracles: the same tokens in one long chunk on one thread, which does all partitions; and float64."""
    pages = Pages([600, 40], heads=heads, size=size, dtype=dtype, window=window)
    kernels.set_num_threads(1)
    want, _ = pages.step(Chunk(0, 0, 600), Chunk(1, 0, 40))
    np.testing.assert_allclose(want, attention_oracle(pages, 0, dtype), atol=3e-6)
    for threads in THREADS:
        kernels.set_num_threads(threads)
        for position in LATE:
            assert np.array_equal(pages.read(0, position, 1)[0], want[position])
        beside, few = pages.step(Chunk(1, 39, 1), Chunk(0, 597, 3))
        assert np.array_equal(few, want[597:])
        np.testing.assert_allclose(beside, attention_oracle(pages, 1, dtype)[39:], atol=3e-6)


@pytest.mark.parametrize("block", [0, 8, 20, 37])
def test_a_missing_block_gives_nan_in_any_partition(block: int) -> None:
    pages = Pages([600])
    pages.step(Chunk(0, 0, 600))
    pages.tables[0, block] = -1
    sees = np.array([position // 16 >= block for position in LATE])
    finite = [np.isfinite(pages.read(0, position, 1)).all() for position in LATE]
    broken = [np.isnan(pages.read(0, position, 1)).all() for position in LATE]
    assert broken == sees.tolist()
    assert finite == (~sees).tolist()


@pytest.mark.parametrize("spoilt", ["slot", "row"])
def test_with_a_long_context_only_the_token_with_an_invalid_index_gets_nan(spoilt: str) -> None:
    pages = Pages([600, 600])
    pages.step(Chunk(0, 0, 600), Chunk(1, 0, 600))
    slots = pages.tables[:, 599 // 16] * 16 + 599 % 16
    where = {"slot": slots.astype(np.int32), "row": np.arange(2, dtype=np.int32)}
    where[spoilt][1] = -1
    q, k, v = (
        mx.array(np.stack([a[0][599], a[1][599]])[None]).transpose(0, 2, 1, 3)
        for a in (pages.q, pages.k, pages.v)
    )
    tables, positions = mx.array(pages.tables), mx.array([599, 599], mx.int32)
    out, _, _ = kernels.write_and_attend(
        q, k, v, pages.keys, pages.values,
        mx.array(where["slot"]), tables, mx.array(where["row"]), positions, pages.scale,
    )  # fmt: skip
    assert np.isfinite(np.array(out[:, :, 0])).all()
    assert np.isnan(np.array(out[:, :, 1])).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_stored_keys_are_rounded_to_nearest_even(dtype: mx.Dtype) -> None:
    pages = Pages([8], dtype=dtype, block_size=8)
    ties = [1 + odd * 2**-bits for bits in (11, 8) for odd in (1, 3)]  # float16's and bfloat16's
    special = np.array([0, -0.0, 1e-8, 6e-8, 65519, 65520, 3e38, np.inf, *ties], np.float32)
    pages.k[0][:, 0, : len(special)] = special
    pages.k[0][:, 1, : len(special)] = -special
    pages.step(Chunk(0, 0, 8))
    want = mx.array(pages.k[0]).astype(dtype).astype(mx.float32)
    stored = pages.keys[int(pages.tables[0, 0])].transpose(1, 0, 2).astype(mx.float32)
    assert np.array_equal(np.array(stored), np.array(want))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_writing_updates_the_pool_in_place(dtype: mx.Dtype) -> None:
    pages = Pages([4, 3000], dtype=dtype, size=64)
    before = address_of(pages.keys), address_of(pages.values)
    bytes_before = mx.get_active_memory()
    mx.reset_peak_memory()
    for t in range(4):
        pages.step(Chunk(0, t, 1))
        assert (address_of(pages.keys), address_of(pages.values)) == before
    assert mx.get_peak_memory() - bytes_before < pages.keys.nbytes // 4


def test_writing_changes_only_the_tokens_slots() -> None:
    pages = Pages([20, 20], block_size=4)
    pages.step(Chunk(0, 0, 7))
    used = [int(pages.tables[0, 0]), int(pages.tables[0, 1])]
    written = ~np.isnan(np.array(pages.keys)).any(axis=(1, 3))  # [num_blocks, block_size]
    assert written[used[0]].tolist() == [True] * 4
    assert written[used[1]].tolist() == [True] * 3 + [False]
    assert written.sum() == 7


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_paged_attention_neither_writes_nor_copies_the_pool(dtype: mx.Dtype) -> None:
    pages = Pages([40, 3000], dtype=dtype, size=64)
    pages.step(Chunk(0, 0, 40))
    before = np.array(pages.keys.astype(mx.float32))
    q, rows = mx.zeros((1, 9, 2, 64)), mx.zeros(2, mx.int32)
    bytes_before = mx.get_active_memory()
    mx.reset_peak_memory()
    where = mx.array(pages.tables), rows, mx.array([39, 3], mx.int32)
    out = kernels.paged_attention(q, pages.keys, pages.values, *where, 1.0)
    mx.eval(out)
    assert mx.get_peak_memory() - bytes_before < pages.keys.nbytes // 4
    assert np.isfinite(np.array(out)).all()
    assert np.array_equal(np.array(pages.keys.astype(mx.float32)), before, equal_nan=True)


def test_paged_attention_takes_views_of_a_pool() -> None:
    """A write rejects them, because it would change a copy. The view is of [block_size, blocks, Hkv, D]."""
    pool = mx.array(normal(16, 4, 2, 32)).transpose(1, 2, 0, 3)
    q = mx.array(normal(1, 4, 2, 32, seed=8))
    where = mx.array([[3, 1]], mx.int32), mx.zeros(2, mx.int32), mx.array([16, 30], mx.int32)
    from_view = kernels.paged_attention(q, pool, 2 * pool, *where, 1.0)
    dense = mx.contiguous(pool)
    from_dense = kernels.paged_attention(q, dense, 2 * dense, *where, 1.0)
    assert np.array_equal(np.array(from_view), np.array(from_dense))


@pytest.mark.parametrize("spoilt", ["slot", "row", "position", "table"])
@pytest.mark.parametrize("value", [-1, 2**20])
def test_only_the_token_with_an_index_out_of_range_gets_nan(spoilt: str, value: int) -> None:
    q = k = mx.array(normal(1, 2, 2, 32))
    pool = mx.zeros((4, 2, 16, 32))
    slots, rows, positions, tables = [0, 16], [0, 1], [0, 0], [[0], [1]]
    for name, indices in (("slot", slots), ("row", rows), ("position", positions)):
        if name == spoilt:
            indices[1] = value
    if spoilt == "table":
        tables[1][0] = value
    where = [mx.array(a, mx.int32) for a in (slots, tables, rows, positions)]
    if spoilt != "slot":
        read = kernels.paged_attention(q, pool, pool + 0, *where[1:], 1.0)
        assert np.isfinite(np.array(read[:, :, 0])).all()
        assert np.isnan(np.array(read[:, :, 1])).all()
    out, _, _ = kernels.write_and_attend(q, k, k, pool, pool + 0, *where, 1.0)
    assert np.isfinite(np.array(out[:, :, 0])).all()
    assert np.isnan(np.array(out[:, :, 1])).all()


# ---- attention over pages, with a sliding window ----

WINDOWS = [1, 2, 31, 32, 33, 64, 100]  # shorter than a tile of 32, longer, and longer than the sequence


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 256])
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (4, 1)])
def test_attention_in_a_window_agrees_with_float64(
    heads: tuple[int, int], size: int, dtype: mx.Dtype
) -> None:
    """Oracle: float64 over the stored values, for every position, window and block size."""
    in_blocks = [Pages([75], heads=heads, size=size, dtype=dtype, block_size=n) for n in (1, 4, 16, 32)]
    for window in WINDOWS:
        in_blocks[0].window = window
        want = attention_oracle(in_blocks[0], 0, dtype)
        for pages in in_blocks:
            pages.window = window
            np.testing.assert_allclose(pages.step(Chunk(0, 0, 75))[0], want, atol=3e-6)


@pytest.mark.parametrize("window", [1, 7, 32, 50])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_each_sequence_of_a_step_has_its_own_window(block_size: int, window: int) -> None:
    """Oracle: float64, for each sequence separately. The step mixes prefill chunks and decodes."""
    pages = Pages([150, 41, 97, 20], block_size=block_size, window=window)
    pages.step(Chunk(0, 0, 60), Chunk(1, 0, 40), Chunk(2, 0, 96))
    chunks = Chunk(1, 40, 1), Chunk(0, 60, 90), Chunk(2, 96, 1), Chunk(3, 0, 20)
    for chunk, out in zip(chunks, pages.step(*chunks), strict=True):
        want = attention_oracle(pages, chunk.sequence, mx.float32)
        np.testing.assert_allclose(out, want[chunk.first : chunk.first + chunk.count], atol=2e-6)


@pytest.mark.parametrize("window", [100, 2**31 - 1, 2**31, 2**62])
def test_a_window_as_long_as_the_sequence_does_not_change_bits(window: int) -> None:
    pages = Pages([100])
    (want,) = pages.step(Chunk(0, 0, 100))
    pages.window = window
    assert np.array_equal(pages.step(Chunk(0, 0, 100))[0], want)


@pytest.mark.parametrize("spoilt", [-1, -(2**31), 2**31 - 1, "not a number", "infinite"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_blocks_before_the_window_may_hold_anything(block_size: int, spoilt: int | str) -> None:
    """Oracle: the bits before the blocks were replaced, with invalid ids or with another sequence's NaNs."""
    for window in WINDOWS[:-1]:
        pages = Pages([120, 32], block_size=block_size, window=window)
        pages.step(Chunk(0, 0, 120), Chunk(1, 0, 32))
        for first, count in ((64, 1), (70, 1), (95, 25), (119, 1)):
            want = pages.read(0, first, count)
            out_of_reach = max(0, first - window + 1) // block_size
            whole = pages.tables.copy()
            if isinstance(spoilt, int):
                pages.tables[0, :out_of_reach] = spoilt
            else:
                broken = float("nan") if spoilt == "not a number" else float("inf")
                pages.keys[int(pages.tables[1, 0])] = pages.values[int(pages.tables[1, 0])] = broken
                pages.tables[0, :out_of_reach] = pages.tables[1, 0]
            assert np.array_equal(pages.read(0, first, count), want)
            pages.tables = whole


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_token_is_not_affected_by_positions_outside_its_window(dtype: mx.Dtype, broken: float) -> None:
    """With one broken token, rows that attend to it are broken, and all others keep their bits."""
    for window in (1, 5, 32, 33):
        sound = Pages([100], dtype=dtype, window=window)
        (want,) = sound.step(Chunk(0, 0, 100))
        for position in (0, 30, 31, 32, 66):
            pages = Pages([100], dtype=dtype, window=window)
            pages.k[0][position] = pages.v[0][position] = broken
            sees = np.zeros(100, dtype=bool)
            sees[position : position + window] = True
            (out,) = pages.step(Chunk(0, 0, 100))
            assert np.array_equal(out[~sees], want[~sees])
            assert not np.isfinite(out[sees]).any()


@pytest.mark.parametrize("window", WINDOWS)
def test_with_a_window_bits_do_not_depend_on_the_distance_from_the_start(window: int) -> None:
    """Oracle: the same tokens near the start, moved by a multiple of the tile size of 32."""
    near = Pages([160], block_size=16, window=window)
    near.step(Chunk(0, 0, 160))
    want = near.read(0, 128, 20)
    far = 32 * 100_000
    tables = np.full((1, far // 16 + 10), -1, np.int32)
    tables[:, -10:] = near.tables
    q = mx.array(near.q[0][None, 128:148]).transpose(0, 2, 1, 3)
    where = mx.array(tables), mx.zeros(20, mx.int32), mx.arange(far + 128, far + 148, dtype=mx.int32)
    out = kernels.paged_attention(q, near.keys, near.values, *where, near.scale, window)
    assert np.array_equal(np.array(out)[0].transpose(1, 0, 2), want)


def test_with_a_window_the_cost_does_not_grow_with_the_context() -> None:
    """Oracle: the same decode without a window, which visits 10,000 times as many tiles."""
    q, pool = mx.array(normal(1, 3, 1, 64)), mx.array(normal(1, 3, 32, 64))
    position = 32 * 10_000 - 1
    where = mx.zeros((1, 10_000), mx.int32), mx.zeros(1, mx.int32), mx.array([position], mx.int32), 0.125

    def seconds(window: int | None) -> float:
        start = perf_counter()
        mx.eval(kernels.paged_attention(q, pool, pool, *where, window))
        return perf_counter() - start

    assert min(seconds(32) for _ in range(5)) < min(seconds(None) for _ in range(5)) / 20


def test_with_a_window_only_the_token_with_an_invalid_position_gets_nan() -> None:
    pages = Pages([64], window=5)
    (want,) = pages.step(Chunk(0, 0, 64))
    pages.tables[0, :2] = -1
    q = mx.array(pages.q[0][None, 60:63]).transpose(0, 2, 1, 3)
    where = mx.array(pages.tables), mx.zeros(3, mx.int32), mx.array([60, -1, 62], mx.int32)
    out = kernels.paged_attention(q, pages.keys, pages.values, *where, pages.scale, 5)
    rows = np.array(out)[0].transpose(1, 0, 2)
    assert np.isnan(rows[1]).all()
    assert np.array_equal(rows[[0, 2]], want[[60, 62]])


# ---- attention over contiguous keys and values ----


def flash_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> np.ndarray:
    """Plain attention in float64."""
    group, L, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) * scale
    if causal:
        scores = np.where(np.arange(S) <= np.arange(S - L, S)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("size", [2, 8, 20, 64, 94, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 1)])
def test_flash_attention_agrees_with_float64(heads: tuple[int, int], causal: bool, size: int) -> None:
    for length, total in ((1, 1), (1, 70), (33, 33), (5, 64), (40, 97)):
        q = normal(2, heads[0], length, size)
        k, v = normal(2, heads[1], total, size, seed=8), normal(2, heads[1], total, size, seed=9)
        out = kernels.flash_attention(*map(mx.array, (q, k, v)), size**-0.5, causal)
        np.testing.assert_allclose(
            np.array(out), flash_oracle(q, k, v, size**-0.5, causal), rtol=2e-5, atol=2e-6
        )


def test_flash_attention_handles_large_scores() -> None:
    q, k = normal(1, 1, 3, 16), normal(1, 1, 50, 16, seed=8)
    k[0, 0, 40] = 1e4 * q[0, 0, 1]
    v = normal(1, 1, 50, 16, seed=9)
    out = np.array(kernels.flash_attention(*map(mx.array, (q, k, v)), 1.0, False))
    np.testing.assert_allclose(out, flash_oracle(q, k, v, 1.0, False), rtol=1e-3, atol=1e-5)


@property_settings(40)
@given(length=st.integers(1, 60), past=st.integers(0, 60), threads=st.sampled_from(THREADS))
def test_flash_attention_gives_a_row_the_same_bits_in_any_batch(length: int, past: int, threads: int) -> None:
    """A causal row attends to the same keys, whether or not later rows are computed with it."""
    total = past + length
    q, k, v = (mx.array(normal(1, heads, total, 24, seed=heads)) for heads in (6, 2, 3))
    v = v[:, :2]
    kernels.set_num_threads(1)
    whole = np.array(kernels.flash_attention(q, k, v, 0.2, True))
    kernels.set_num_threads(threads)
    rows = np.array(kernels.flash_attention(q[:, :, past:], k, v, 0.2, True))
    assert np.array_equal(rows, whole[:, :, past:])
    first = np.array(kernels.flash_attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], 0.2, True))
    assert np.array_equal(first, whole[:, :, :length])


def test_flash_attention_takes_transposed_views() -> None:
    q, k, v = (mx.array(normal(1, 30, heads, 16, seed=heads)) for heads in (6, 2, 3))
    views = [x.swapaxes(1, 2) for x in (q, k, v[:, :, :2])]
    copies = [mx.contiguous(view) for view in views]
    found, expected = (np.array(kernels.flash_attention(*x, 0.25, True)) for x in (views, copies))
    assert np.array_equal(found, expected)
