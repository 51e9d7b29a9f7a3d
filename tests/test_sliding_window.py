"""Sliding windows on pages: tables that release blocks, attention over the rest, groups in one pool, models,
pools.

Oracles: lists and dicts of tokens, dense attention in NumPy float64, and the model over whole sequences
without a cache (windowed_context.py). Slots that no table holds are NaN wherever attention runs.
"""

import json
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from tiny_llm.engine_config import EngineConfig
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import OutOfBlocksError, RequestTooLargeError
from tiny_llm.evaluation import text_logits
from tiny_llm.kernels import twins, use_compiled
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import LayerGroup, group_layers, layers_per_block
from tiny_llm.loader import build
from tiny_llm.managers import make_manager
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import Span, pack_batch
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sliding_window import (
    NO_BLOCK,
    WindowedTable,
    first_block,
    first_visible,
    windowed_attention,
    write_and_attend_window,
)

from promises import check_all_returned, check_pages
from tiny_checkpoints import WINDOWED_CONFIGS, random_weights, write_folder
from tiny_llm_checkpoints.errors import ConfigError
from tiny_llm_checkpoints.model_config import FULL, SLIDING, ModelConfig
from tiny_llm_checkpoints.readers import read_checkpoint
from tiny_model import EOS, examples, gemma_model, logits_through_pages, random_prompt, tiny_config
from windowed_context import WindowedNoCacheContext

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
needs_kernels = pytest.mark.skipif(not use_compiled(), reason="no compiled kernels")


# ---- tables ----


class Text:
    """A table, and its expected contents: the values of the positions `start` .. `stop` - 1."""

    def __init__(self, table: WindowedTable) -> None:
        self.table = table
        self.values: dict[int, int] = {}
        self.stop = 0


class TableMachine(RuleBasedStateMachine):
    """Texts grow, release blocks, skip, fork and end in one pool; each reads its own values."""

    texts = Bundle("texts")

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Text] = []
        self.written = 0

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([4, 1, 3, 5]))
    def pool(self, num_blocks: int, block_size: int) -> None:
        self.allocator, self.block_size = BlockAllocator(num_blocks), block_size
        self.memory: dict[int, int] = {}

    @rule(target=texts)
    def create(self) -> Text:
        text = Text(WindowedTable(self.allocator, self.block_size))
        self.alive.append(text)
        return text

    @rule(text=texts, count=st.integers(0, 14))
    def append(self, text: Text, count: int) -> None:
        before, needed = self.state(text), text.table.blocks_to_append(count)
        free = self.allocator.num_free
        if needed > free:
            with pytest.raises(OutOfBlocksError):
                text.table.append_tokens(count)
            assert self.state(text) == before
            return
        for copy in text.table.append_tokens(count):
            for i in range(copy.length):
                self.memory[copy.dst * self.block_size + i] = self.memory[copy.src * self.block_size + i]
        assert self.allocator.num_free == free - needed
        for position in range(text.stop, text.stop + count):
            [slot] = text.table.slots(position, position + 1)
            self.written += 1
            self.memory[slot] = text.values[position] = self.written
        text.stop += count

    @rule(text=texts, position=st.integers(0, 40))
    def release_passed(self, text: Text, position: int) -> None:
        blocks = list(text.table.blocks)
        passed = text.table.release_before(position)
        assert passed == blocks[: len(passed)]
        size = self.block_size
        whole = {p for p in text.values if p // size * size + size <= min(position, text.stop)}
        text.values = {p: value for p, value in text.values.items() if p not in whole}

    @rule(text=texts, further=st.integers(-9, 9))
    def skip(self, text: Text, further: int) -> None:
        position = text.stop + further
        if position % self.block_size or further < 0:
            before = self.state(text)
            with pytest.raises(ValueError, match=str(position)):
                text.table.skip_to(position)
            assert self.state(text) == before
            return
        blocks = list(text.table.blocks)
        assert text.table.skip_to(position) == blocks
        text.values, text.stop = {}, position

    @rule(target=texts, text=texts)
    def fork(self, text: Text) -> Text:
        child = Text(text.table.fork())
        child.values, child.stop = dict(text.values), text.stop
        self.alive.append(child)
        return child

    @rule(target=texts, text=consumes(texts))
    def release(self, text: Text) -> Text:
        """A released table is empty, and can be used again."""
        text.table.release()
        text.values, text.stop = {}, 0
        return text

    def state(self, text: Text) -> tuple[object, ...]:
        table = text.table
        counts = [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]
        return table.start, table.num_tokens, list(table.blocks), counts

    @invariant()
    def every_reference_belongs_to_a_table(self) -> None:
        held = Counter(block for text in self.alive for block in text.table.blocks)
        counts = [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)]
        assert counts == [held[block] for block in range(len(counts))]
        assert self.allocator.num_free == counts.count(0)

    @invariant()
    def every_text_reads_its_own_values(self) -> None:
        for text in self.alive:
            table, start = text.table, min(text.values, default=text.stop)
            assert (table.start, table.num_tokens) == (start, text.stop - start)
            found = [self.memory[slot] for slot in table.slots(start, text.stop)]
            assert found == [text.values[position] for position in range(start, text.stop)]

    @invariant()
    def kernel_tables_have_blocks_for_held_positions_only(self) -> None:
        size = self.block_size
        for text in self.alive:
            physical = text.table.physical_indices()
            assert len(physical) == -(-text.stop // size)
            assert physical[: first_block(text.table)] == [NO_BLOCK] * (text.table.start // size)
            for position in text.values:
                [slot] = text.table.slots(position, position + 1)
                assert physical[position // size] == slot // size

    @invariant()
    def released_and_future_positions_have_no_slot(self) -> None:
        for text in self.alive:
            start, stop = text.table.start, text.stop
            for wrong in [(start - 1, stop), (start, stop + 1), (0, start) if start else (stop, stop - 1)]:
                with pytest.raises(ValueError, match="not within"):
                    text.table.slots(*wrong)


def test_tables_read_their_own_values_and_leak_no_block_after_any_events() -> None:
    """Oracle: dicts from positions to values, and a count of every holder."""
    case = TableMachine.TestCase
    case.settings = settings(max_examples=examples(60), stateful_step_count=30, report_multiple_bugs=False)
    case("runTest").runTest()


def test_a_table_never_skips_to_positions_that_it_holds_or_has_passed() -> None:
    """Oracle: by hand: positions 8 .. 13 in blocks of 4; the next block boundary after them is 16."""
    table = WindowedTable(BlockAllocator(4), 4)
    table.append_tokens(14)
    table.release_before(9)
    for position in range(16):
        with pytest.raises(
            ValueError, match=f"position must be a multiple of 4 and at least 14, not {position}"
        ):
            table.skip_to(position)
    assert (table.start, table.num_tokens, len(table.blocks)) == (8, 6, 2)
    assert len(table.skip_to(16)) == 2


def test_a_table_without_a_window_starts_at_the_first_block() -> None:
    """Oracle: by hand."""
    table = BlockTable(BlockAllocator(4), 4)
    table.append_tokens(9)
    assert first_block(table) == 0


# ---- attention ----

H, HKV, D = 4, 2, 32
SCALE = D**-0.5


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """The last L of S tokens, each within its window: q [H, L, D], k, v [Hkv, S, D] -> [H, L, D], float64."""
    L, S, group = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    out = np.empty(q.shape)
    for head in range(q.shape[0]):
        keys, values = k[head // group].astype(np.float64), v[head // group].astype(np.float64)
        for row in range(L):
            position = S - L + row
            seen = range(position + 1)[-(window or S) :]
            scores = keys[seen] @ q[head, row].astype(np.float64) * q.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max())
            out[head, row] = weights / weights.sum() @ values[seen]
    return out


class Texts:
    """Texts of random queries, keys and values [heads, tokens, D] that grow over pages of one layer.

    Blocks that a window has passed are released, and before each step every slot that no table holds becomes
    NaN.
    """

    def __init__(
        self,
        lengths: list[int],
        window: int,
        block_size: int,
        dtype: mx.Dtype,
        *,
        size: int = D,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.window, self.size = window, size
        self.layout = PageLayout((LayerGroup((0,), window),), block_size, max(lengths))
        self.allocator = BlockAllocator(sum(map(self.layout.max_blocks, lengths)) + 2)
        shape = (self.allocator.num_blocks, HKV, block_size, size)
        self.keys, self.values = (mx.full(shape, mx.nan, dtype) for _ in range(2))
        self.tables = [self.layout.tables(self.allocator)[0] for _ in lengths]
        self.done = [0] * len(lengths)
        self.q = [rng.normal(size=(H, length, size)).astype(np.float32) for length in lengths]
        self.k, self.v = (
            [rng.normal(size=(HKV, length, size)).astype(np.float32) for length in lengths] for _ in range(2)
        )

    def step(self, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Append this many tokens to each text in one packed step: its output [H, T, D], and the expected."""
        rows = [row for row, count in enumerate(counts) if count]
        spans = []
        for row in rows:
            self.tables[row].append_tokens(counts[row])
            spans.append(Span(self.tables[row], self.done[row], self.done[row] + counts[row]))
            self.done[row] += counts[row]
        self.fill_free_slots_with_nan()
        q, k, v = (
            mx.array(
                np.concatenate([x[row][:, s.start : s.stop] for row, s in zip(rows, spans, strict=True)], 1)
            )
            for x in (self.q, self.k, self.v)
        )
        batch, scale = pack_batch(spans), self.size**-0.5
        where = (batch, scale, self.window)
        out, self.keys, self.values = write_and_attend_window(
            q[None], k[None], v[None], self.keys, self.values, *where
        )
        mx.eval(out, self.keys, self.values)
        again = windowed_attention(q[None], self.keys, self.values, *where)
        assert mx.array_equal(again, out).item(), "a second read gives the same bits as the step"
        for row in rows:
            self.layout.release_passed([self.tables[row]], self.done[row])
        expected = [
            dense_attention(self.q[row][:, s.start : s.stop], *self.stored(row, s.stop), self.window)
            for row, s in zip(rows, spans, strict=True)
        ]
        return np.array(out[0]), np.concatenate(expected, axis=1)

    def fill_free_slots_with_nan(self) -> None:
        free = [b for b in range(self.allocator.num_blocks) if self.allocator.ref_count(b) == 0]
        for array in (self.keys, self.values):
            array[mx.array(free)] = mx.nan
        mx.eval(self.keys, self.values)

    def stored(self, row: int, stop: int) -> list[np.ndarray]:
        """Keys and values up to a position, rounded as the pool stores them."""
        streams = (mx.array(x[row][:, :stop]).astype(self.keys.dtype) for x in (self.k, self.v))
        return [np.array(stream.astype(mx.float32)) for stream in streams]


steps = st.lists(st.lists(st.integers(0, 23), min_size=3, max_size=3).filter(any), min_size=1, max_size=6)
any_texts = given(
    steps=steps,
    window=st.integers(1, 5) | st.integers(1, 70),
    block_size=st.integers(1, 17),
    dtype=st.sampled_from(sorted(DTYPES)),
)


def check_attention(steps: list[list[int]], window: int, block_size: int, dtype: str) -> None:
    texts = Texts(
        [max(1, sum(counts)) for counts in zip(*steps, strict=True)], window, block_size, DTYPES[dtype]
    )
    for counts in steps:
        out, expected = texts.step(counts)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


@settings(max_examples=examples(40))
@any_texts
def test_readable_attention_sees_the_window_and_reads_no_released_page(
    steps: list[list[int]], window: int, block_size: int, dtype: str
) -> None:
    """Oracle: dense attention in float64 over the stored values; a released page is NaN."""
    with twins():
        check_attention(steps, window, block_size, dtype)


@needs_kernels
@settings(max_examples=examples(60))
@any_texts
def test_compiled_attention_sees_the_window_and_reads_no_released_page(
    steps: list[list[int]], window: int, block_size: int, dtype: str
) -> None:
    """Oracle: dense attention in float64 over the stored values; a released page is NaN."""
    check_attention(steps, window, block_size, dtype)


@needs_kernels
@pytest.mark.parametrize("size", [32, 80, 256])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_readable_and_compiled_attention_agree(size: int, dtype: str) -> None:
    """Oracle: each for the other: prompts, chunks and decodes in one step, and the pool's bits as well."""
    found = []
    for context in (twins(), mx.stream(mx.cpu)):
        texts = Texts([60, 41, 23], 18, 7, DTYPES[dtype], size=size, seed=3)
        with context:
            outs = [texts.step(counts)[0] for counts in ([30, 9, 0], [17, 1, 23], [1, 30, 0], [12, 1, 0])]
        held = mx.array([block for table in texts.tables for block in table.blocks])
        pools = [np.array(pool[held].astype(mx.float32)) for pool in (texts.keys, texts.values)]
        found.append((np.concatenate(outs, axis=1), pools))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(one, two)


# ---- groups in one pool ----

GROUPED = {
    "one of each": (None, 3),
    "only windows": (4, 4),
    "three groups": (None, 5, 5),
    "a place left empty": (None, None, 5, 5, 5),
    "two windows": (7, None, 2, 7, None, 2),
}


class Layers:
    """Random queries, keys and values for each layer and text, in one pool that the groups share."""

    def __init__(
        self, windows: tuple[int | None, ...], lengths: list[int], block_size: int, dtype: mx.Dtype
    ) -> None:
        rng = np.random.default_rng(5)
        self.windows, self.lengths, self.block_size = windows, lengths, block_size
        groups = group_layers(windows)
        self.layout = PageLayout(groups, block_size, 16)
        num_blocks = sum(map(self.layout.max_blocks, lengths))
        self.allocator = BlockAllocator(num_blocks)
        self.pool = KVPool(num_blocks, block_size, HKV, D, layers_per_block(groups), dtype)
        self.tables = [self.layout.tables(self.allocator) for _ in lengths]
        self.q, self.k, self.v = (
            [[rng.normal(size=(heads, n, D)).astype(np.float32) for n in lengths] for _ in windows]
            for heads in (H, HKV, HKV)
        )

    def step(self, spans: list[tuple[int, int, int]]) -> None:
        """Run texts (index, start, stop) together, all layers in the graph before anything is computed."""
        for text, start, stop in spans:
            for table in self.tables[text]:
                table.append_tokens(stop - start)
        context = self.layout.context(
            self.pool, [(self.tables[text], start, stop) for text, start, stop in spans], SCALE, None
        )
        assert context.positions.tolist() == [p for _, start, stop in spans for p in range(start, stop)]
        outs = []
        for layer in range(len(self.windows)):
            q, k, v = (
                mx.array(np.concatenate([x[layer][text][:, start:stop] for text, start, stop in spans], 1))
                for x in (self.q, self.k, self.v)
            )
            outs.append(context.attend(layer, q[None], k[None], v[None])[0])
        self.pool.evaluate(*outs)
        for layer, (out, window) in enumerate(zip(outs, self.windows, strict=True)):
            expected = [
                dense_attention(self.q[layer][text][:, start:stop], *self.stored(layer, text, stop), window)
                for text, start, stop in spans
            ]
            np.testing.assert_allclose(np.array(out), np.concatenate(expected, 1), rtol=0, atol=2e-5)
        for text, _, stop in spans:
            self.layout.release_passed(self.tables[text], stop)

    def stored(self, layer: int, text: int, stop: int) -> list[np.ndarray]:
        streams = (mx.array(x[layer][text][:, :stop]).astype(self.pool.dtype) for x in (self.k, self.v))
        return [np.array(stream.astype(mx.float32)) for stream in streams]

    def check_pool(self, done: list[int]) -> None:
        """Check in the pool that each layer's held tokens are in its group's blocks, at the layer's place."""
        for group_index, group in enumerate(self.layout.groups):
            for place, layer in enumerate(group.layers):
                for text, stop in enumerate(done):
                    table = self.tables[text][group_index]
                    start = first_block(table) * self.block_size
                    slots = mx.array(table.slots(start, stop), mx.int32)
                    for array, stream in zip(
                        self.pool.read(place, slots), self.stored(layer, text, stop), strict=True
                    ):
                        kept = np.array(array.astype(mx.float32)).swapaxes(0, 1)
                        np.testing.assert_array_equal(kept, stream[:, start:stop])


@pytest.mark.parametrize("readable", [True, False], ids=["twins", "kernels"])
@pytest.mark.parametrize("windows", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize(("block_size", "dtype"), [(1, "float32"), (4, "float16"), (16, "bfloat16")])
def test_groups_that_share_a_pool_do_not_affect_each_other(
    windows: tuple[int | None, ...], block_size: int, dtype: str, readable: bool
) -> None:
    """Oracle: dense attention in float64, layer by layer, and the tokens in the pool after each step."""
    layers = Layers(windows, [40, 23], block_size, DTYPES[dtype])
    done = [0, 0]
    with twins() if readable else mx.stream(mx.cpu):
        for counts in ([16, 0], [5, 11], [1, 1], [16, 11], [1, 0], [1, 0]):
            spans = [(i, done[i], done[i] + count) for i, count in enumerate(counts) if count]
            done = [at + count for at, count in zip(done, counts, strict=True)]
            layers.step(spans)
            layers.check_pool(done)
    for tables in layers.tables:
        for table in tables:
            table.release()
    assert layers.allocator.num_free == layers.allocator.num_blocks


def test_only_requested_rows_get_logits() -> None:
    """Oracle: the contract of `KVContext`."""
    layout = PageLayout((LayerGroup((0,), 3),), 4, 8)
    [table] = layout.tables(BlockAllocator(4))
    table.append_tokens(5)
    rows = mx.array([4])
    context = layout.context(KVPool(4, 4, HKV, D), [([table], 0, 5)], SCALE, rows)
    assert context.logit_rows is rows


# ---- models ----

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "gemma.json").read_text(encoding="utf-8"))
PROMPT = [int(token) for token in GOLDENS["tiny_prompt"].split()]
CLOSE = 1e-3  # of logits up to 8: activations are rounded to 16 bits, where the last bit may differ
WAYS = {"whole": [64], "one by one": [1] * 64, "uneven": [7, 9, 1, 1, 30, 16], "at edges": [16] * 4}


@pytest.fixture(scope="module")
def oracle() -> tuple[list[int], np.ndarray]:
    """90 tokens and the tiny Gemma's logits after each, over the whole text without a cache."""
    model, tokens = gemma_model(), random_prompt(90, 4)
    context = WindowedNoCacheContext(len(tokens), model.config.attention_scale, model.config.windows)
    return tokens, np.array(model(mx.array([tokens], mx.int32), context)[0])


@settings(max_examples=examples(25))
@given(data=st.data(), block_size=st.integers(1, 17), readable=st.booleans())
def test_a_model_on_pages_gives_the_logits_of_the_whole_text(
    oracle: tuple[list[int], np.ndarray], data: st.DataObject, block_size: int, readable: bool
) -> None:
    """Oracle: one pass over the whole text with a mask for each layer; 90 tokens, windows of 6."""
    tokens, expected = oracle
    chunks, left = list[int](), len(tokens)
    while left:
        chunks.append(data.draw(st.integers(1, min(left, 40))))
        left -= chunks[-1]
    with twins() if readable else mx.stream(mx.cpu):
        found = logits_through_pages(
            gemma_model(), tokens, chunks, block_size=block_size, kv_dtype=mx.float32
        )
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_keys_and_values_in_16_bits_change_logits_little(
    oracle: tuple[list[int], np.ndarray], dtype: str
) -> None:
    """Oracle: one pass over the whole text, keys and values in float32."""
    tokens, expected = oracle
    found = np.array(logits_through_pages(gemma_model(), tokens, [90], kv_dtype=DTYPES[dtype]))
    assert np.abs(found - expected).max() < (0.02 if dtype == "float16" else 0.15)
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("chunks", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", WINDOWED_CONFIGS)
def test_logits_from_pages_match_transformers(name: str, chunks: list[int], tmp_path: Path) -> None:
    """Oracle: the goldens of tiny checkpoints whose layers see 8 tokens."""
    config = WINDOWED_CONFIGS[name]
    model = build(read_checkpoint(write_folder(tmp_path, config, random_weights(config))))
    [golden] = [record["logits"] for record in GOLDENS["logits"] if record["checkpoint"] == name]
    for block_size in (3, 16):
        found = logits_through_pages(model, PROMPT, chunks, block_size=block_size, kv_dtype=mx.float32)
        np.testing.assert_allclose(np.array(found)[GOLDENS["positions"]], golden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", [4, 64, 200])
def test_logits_do_not_depend_on_the_token_budget_of_a_step(
    oracle: tuple[list[int], np.ndarray], budget: int
) -> None:
    """Oracle: one pass over the whole text."""
    tokens, expected = oracle
    config = EngineConfig(
        block_size=4, max_num_batched_tokens=budget, max_num_seqs=1, kv_cache_dtype="float32"
    )
    found = np.array(text_logits(gemma_model(), tokens, config))
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


# ---- pools ----

PATTERNS = {
    "Gemma 3 270M": (((512,) * 5 + (None,)) * 3, 3),
    "Gemma 3 1B": ((((512,) * 5 + (None,)) * 5)[:26], 4),
    "Gemma 2": ((512, None) * 13, 13),
    "Mistral": ((512,) * 32, 32),
    "no windows": ((None,) * 18, 18),
}


def config_of(windows: tuple[int | None, ...], context: int = 8192) -> ModelConfig:
    """A tiny model's configuration with these windows."""
    return tiny_config(
        num_hidden_layers=len(windows),
        sliding_window=max((window for window in windows if window), default=None),
        layer_types=tuple(FULL if window is None else SLIDING for window in windows),
        max_position_embeddings=context,
    )


@pytest.mark.parametrize(("windows", "layers"), PATTERNS.values(), ids=PATTERNS)
def test_a_block_holds_the_layers_of_one_group(windows: tuple[int | None, ...], layers: int) -> None:
    """Oracle: layers by hand; 2 heads of 32 numbers in float16, keys and values, 16 tokens."""
    config, layer_bytes = config_of(windows), 2 * 16 * 2 * 32 * 2
    assert KVPool.for_model(config, 5, 16, mx.float16).nbytes == 5 * layers * layer_bytes
    for memory in (layers * layer_bytes, 10 * layers * layer_bytes + 1, 11 * layers * layer_bytes - 1):
        assert EngineConfig(kv_cache_memory=memory).pool_blocks(config, 2) == memory // (layers * layer_bytes)
    with pytest.raises(ConfigError, match=f"takes {layers * layer_bytes:,} bytes"):
        EngineConfig(kv_cache_memory=layers * layer_bytes - 1).pool_blocks(config, 2)
    assert EngineConfig(num_blocks=77).pool_blocks(config, 2) == 77


@pytest.mark.parametrize(("windows", "layers"), PATTERNS.values(), ids=PATTERNS)
def test_a_pool_is_no_larger_than_the_longest_sequences_need(
    windows: tuple[int | None, ...], layers: int
) -> None:
    """Oracle: by hand: three sequences of 4,096 tokens, 256 blocks; at most 65 of a windowed group."""
    groups = group_layers(windows)
    worst = sum(256 if group.window is None else 65 for group in groups)
    engine = EngineConfig(max_num_seqs=3, max_model_len=4096, max_num_batched_tokens=512)
    assert engine.pool_blocks(config_of(windows), 2) == 3 * worst
    assert layers_per_block(groups) == layers


def test_swap_space_is_counted_in_the_same_blocks() -> None:
    """Oracle: by hand: a block of three layers is 3 * 16 tokens * 2 heads * 32 * 2 * 2 bytes."""
    config = config_of(PATTERNS["Gemma 3 270M"][0])
    engine = EngineConfig(preemption_mode="swap", swap_space=10 * 12_288)
    assert engine.swap_blocks(config, 2) == 10


# ---- what a sequence holds ----

WINDOWS = (None, 12, 12)
SIZE, CHUNK = 4, 8
IN_REACH = 6  # at most, for the 19 tokens of a step of 8 and the 11 before it, in blocks of 4


def manager_of(
    windows: tuple[int | None, ...], blocks: int, max_seqs: int = 1, longest: int = 1000
) -> PagedBatchManager:
    """Without a model: chunks of 8 tokens in blocks of 4."""
    groups = group_layers(windows)
    return PagedBatchManager(
        blocks, SIZE, max_seqs, max_batched_tokens=CHUNK, max_model_len=longest, groups=groups
    )


def step(manager: PagedBatchManager) -> None:
    """Run one step; every sequence that is ready gets a token, and finishes with its last."""
    ready = list(manager.process_batch())
    manager.commit(dict.fromkeys(ready, 1))
    for seq_id in ready:
        if manager.sequence(seq_id).num_tokens >= manager.sequence(seq_id).max_len:
            manager.finish(seq_id)
    check_pages(manager)


@pytest.mark.parametrize("block_size", [1, 4, 5, 16])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 12, 16, 40])
def test_a_sequence_far_beyond_its_window_holds_only_what_the_window_needs(
    window: int, block_size: int
) -> None:
    """Oracle: the blocks that the next query sees or writes to, counted one by one after each step."""
    manager = PagedBatchManager(
        400,
        block_size,
        1,
        max_batched_tokens=CHUNK,
        max_model_len=300,
        groups=group_layers((None, window)),
    )
    manager.add_request([1] * 150, "a", SamplingParams(max_tokens=150))
    while manager.has_work:
        step(manager)
        for sequence in manager.running:
            full, windowed = (table.blocks for table in sequence.tables)
            computed = sequence.num_computed
            needed = {p // block_size for p in range(first_visible(computed, window), computed + 1)}
            begun = {p // block_size for p in range(computed)}
            assert len(full) == len(begun)
            assert len(windowed) == len(needed & begun)
    check_all_returned(manager)


def test_blocks_that_windows_have_passed_are_free_while_the_sequence_goes_on() -> None:
    """Oracle: a pool of exactly what the longest text needs: 250 blocks, and 6 for each windowed group."""
    needed = 250 + 2 * IN_REACH
    manager = manager_of(WINDOWS, needed)
    manager.add_request([1] * 600, "a", SamplingParams(max_tokens=400))
    used, fewest = set[int](), needed
    while manager.has_work:
        step(manager)
        used.update(
            block for sequence in manager.running for table in sequence.tables[1:] for block in table.blocks
        )
        fewest = min(fewest, manager.allocator.num_free)
    assert len(used) > 10 * IN_REACH, "released blocks are used again"
    assert fewest < IN_REACH
    check_all_returned(manager)
    with pytest.raises(RequestTooLargeError, match=f"need {needed} blocks of 4; the pool has {needed - 1}"):
        manager_of(WINDOWS, needed - 1).add_request([1] * 600, "a", SamplingParams(max_tokens=400))


def test_models_with_only_windows_serve_any_length_from_a_few_blocks() -> None:
    """Oracle: by hand: 10,000 tokens from 6 blocks of 4."""
    manager = manager_of((12, 12), IN_REACH, longest=10_000)
    manager.add_request([1] * 9_000, "a", SamplingParams(max_tokens=1_000))
    steps = 0
    while manager.has_work:
        ready = list(manager.process_batch())
        manager.commit(dict.fromkeys(ready, 1))
        for seq_id in ready:
            if manager.sequence(seq_id).num_tokens == 10_000:
                manager.finish(seq_id)
        steps += 1
    assert steps == 9_000 // CHUNK + 999
    check_all_returned(manager)


@pytest.mark.parametrize(("windows", "together"), [(WINDOWS, 2), ((None, None, None), 1)])
def test_blocks_that_the_windows_of_one_sequence_have_passed_can_serve_another(
    windows: tuple[int | None, ...], together: int
) -> None:
    """Oracle: by hand: 30 blocks a layer, or 6 with a window: 42 for each sequence, or 90. There are 100."""
    manager = manager_of(windows, 100 // layers_per_block(group_layers(windows)), max_seqs=2)
    for name in "ab":
        manager.add_request([1] * 100, name, SamplingParams(max_tokens=20))
    most = 0
    while manager.has_work:
        step(manager)
        most = max(most, len(manager.running))
    assert most == together
    check_all_returned(manager)


def test_an_engine_of_a_windowed_model_answers_far_beyond_its_windows() -> None:
    """Oracle: the likeliest tokens over the whole text without a cache; the pool has no spare block."""
    model, prompt = gemma_model(), random_prompt(50, 8)
    config = EngineConfig(
        block_size=4,
        num_blocks=27 + 2 * 4,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        kv_cache_dtype="float32",
    )
    manager = make_manager(config, model)
    engine = EngineCore(manager, (EOS,))
    engine.add_request("a", prompt, SamplingParams(temperature=0.0, max_tokens=58, ignore_eos=True))
    got = list[int]()
    while engine.has_work:
        got += [output.token for output in engine.step()]
    text = prompt + got
    context = WindowedNoCacheContext(len(text), model.config.attention_scale, model.config.windows)
    logits = np.array(model(mx.array([text], mx.int32), context)[0])[len(prompt) - 1 : -1]
    chosen = logits[range(58), got]
    assert np.all(logits.max(axis=-1) - chosen < 1e-3), "the likeliest token, or one as likely"
