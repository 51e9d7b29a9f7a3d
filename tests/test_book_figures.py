"""The book's interactive figures in Chromium: their models against the reference, and what readers can do."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_llm.dynamic_cache import GlobalAllocator
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.prefix_cache import PrefixCache, TokenBlocks
from tiny_llm.rope import inverse_frequencies, rope
from tiny_llm.sampler import draw, keep_min_p, keep_top_k, keep_top_p, sample_token, uniform
from tiny_llm.sampling_params import SamplingParams

from book_pages import FIGURES, MDBOOK, build_book, write_empty_page, write_page
from browser import chromium, sync_api, visiting
from figures import beam_frames, interactive, sampling_data, timeline_frames
from preprocessor.chapter import Chapters
from tiny_llm import errors
from tiny_model import examples

expect = sync_api.expect
NARROW = {"viewport": {"width": 360, "height": 800}}


@pytest.fixture(name="browser", scope="module")
def browser_fixture() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(name="modules", scope="module")
def modules_fixture(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A page that can import the modules."""
    with visiting(browser, write_empty_page(tmp_path_factory.mktemp("modules"))) as page:
        yield page


@pytest.fixture(name="open_figure")
def open_figure_fixture(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    """Open a page with one figure: `with open_figure("beams") as figure`."""

    @contextmanager
    def open_figure(name: str, **options: Any) -> Iterator[Any]:
        with visiting(browser, write_page(tmp_path, name, name), **options) as page:
            yield page.locator(f"{name}-figure")

    return open_figure


def press(figure: Any, name: str) -> None:
    figure.get_by_role("button", name=name, exact=True).press("Enter")


def says(figure: Any) -> str:
    text: str = figure.locator(".says").inner_text()
    return text


# ---- every figure ----


@pytest.mark.parametrize("name", FIGURES)
def test_without_javascript_a_drawing_is_shown(open_figure: Any, name: str) -> None:
    with open_figure(name, java_script_enabled=False) as figure:
        expect(figure.locator(".fallback svg.figure")).to_be_visible()
        expect(figure.get_by_role("button")).to_have_count(0)


@pytest.mark.parametrize("name", FIGURES)
def test_every_control_has_a_name_and_is_reached_by_tab(open_figure: Any, name: str) -> None:
    with open_figure(name) as figure:
        controls = "button, input, select, textarea, .picture"
        missing = f"e => [...e.querySelectorAll('{controls}')].filter(one => !('seen' in one.dataset)).length"
        for _ in range(figure.locator(controls).count() + 4):
            figure.page.keyboard.press("Tab")
            figure.page.evaluate("document.activeElement.dataset.seen = ''")
        assert figure.evaluate(missing) == 0
        for control in figure.locator(controls).all():
            expect(control).not_to_have_accessible_name("")


@pytest.mark.parametrize("name", FIGURES)
def test_the_arrow_keys_change_the_step(open_figure: Any, name: str) -> None:
    with open_figure(name) as figure:
        picture, slider = figure.locator(".picture"), figure.get_by_role("slider", name="Step")
        picture.focus()
        start = int(slider.input_value())
        sentence = says(figure)
        picture.press("ArrowRight")
        expect(slider).to_have_value(str(start + 1))
        assert says(figure) != sentence
        picture.press("ArrowLeft")
        expect(slider).to_have_value(str(start))
        assert says(figure) == sentence
        picture.press("End")
        expect(slider).to_have_value(slider.get_attribute("max"))
        picture.press("Home")
        expect(slider).to_have_value("0")


@pytest.mark.parametrize("name", FIGURES)
def test_back_next_play_and_reset(open_figure: Any, name: str) -> None:
    with open_figure(name) as figure:
        slider = figure.get_by_role("slider", name="Step")
        start = int(slider.input_value())
        press(figure, "Next")
        expect(slider).to_have_value(str(start + 1))
        press(figure, "Back")
        expect(slider).to_have_value(str(start))
        figure.page.clock.install()
        press(figure, "Play")
        figure.page.clock.run_for(3500)
        expect(slider).to_have_value(str(start + 2))
        press(figure, "Pause")
        figure.page.clock.run_for(3500)
        expect(slider).to_have_value(str(start + 2))
        slider.fill("0")
        press(figure, "Back")
        expect(slider).to_have_value("0")
        press(figure, "Reset")
        expect(slider).to_have_value(str(start))


@pytest.mark.parametrize("name", FIGURES)
def test_every_step_is_drawn_without_an_error(open_figure: Any, name: str) -> None:
    with open_figure(name) as figure:
        slider = figure.get_by_role("slider", name="Step")
        pictures, sentences = set(), []
        for step in range(int(slider.get_attribute("max")) + 1):
            slider.fill(str(step))
            pictures.add(figure.locator(".picture").inner_html())
            sentences.append(says(figure))
        assert len(pictures) > len(sentences) // 2
        assert all(len(one) > 12 and one[0].isupper() and one.endswith(".") for one in sentences), sentences


@pytest.mark.parametrize("name", FIGURES)
def test_a_narrow_page_does_not_scroll_sideways(open_figure: Any, name: str) -> None:
    for options in (NARROW, {**NARROW, "java_script_enabled": False}):
        with open_figure(name, **options) as figure:
            box = figure.locator(".picture, .fallback").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360


@pytest.fixture(name="book", scope="module")
def book_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MDBOOK is None:
        pytest.skip("mdBook is not installed")
    return build_book(tmp_path_factory.mktemp("book"), FIGURES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_figures_work_in_a_book_that_is_opened_from_disk(browser: Any, book: Path, scheme: str) -> None:
    with visiting(browser, f"{book.as_uri()}/", color_scheme=scheme, **NARROW) as page:
        for name in FIGURES:
            page.goto((book / f"{name}.html").as_uri())
            figure = page.locator(f"{name}-figure")
            press(figure, "Next")
            figure.locator(".picture").press("ArrowRight")  # which would turn to the next chapter
            figure.get_by_role("slider", name="Step").press("ArrowRight")
            assert page.url.endswith(f"{name}.html")
            assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
        page.goto((book / "print.html").as_uri())  # all chapters on one page
        expect(page.locator(".says")).to_have_count(len(FIGURES))


# ---- the models against the reference ----

POOL_ERRORS = (errors.OutOfBlocksError, errors.DoubleFreeError, errors.UnknownBlockError, ValueError)
SAME_ERROR = {"RangeError": "ValueError"}
RUN_POOL = """async ({ numBlocks, blockSize, operations }) => {
  const { BlockAllocator, BlockTable } = await import("pool");
  const allocator = new BlockAllocator(numBlocks);
  const tables = [new BlockTable(allocator, blockSize)];
  const kinds = {
    start: () => void tables.push(new BlockTable(allocator, blockSize)),
    append: (table, count) => table.append(count).map(({ src, dst, length }) => [src, dst, length]),
    needs: (table, count) => table.blocksToAppend(count),
    fork: (table) => void tables.push(table.fork()),
    release: (table) => table.release(),
    share: (table, length, block) => table.shareBlock(block, length),
    allocate: () => allocator.allocate(),
    addRef: (table, count, block) => allocator.addRef(block),
    free: (table, count, block) => allocator.release(block),
  };
  return operations.map(([kind, place, count, block]) => {
    let result;
    try { result = kinds[kind](tables[place % tables.length], count, block) ?? null; }
    catch (error) { result = error.constructor.name; }
    const counts = Array.from({ length: numBlocks }, (_, block) => allocator.refCount(block));
    return [result, allocator.free, counts, tables.map((table) => [[...table.blocks], table.numTokens])];
  });
}"""


def run_pool(num_blocks: int, block_size: int, operations: list[Any]) -> list[Any]:
    """What the reference does: for each operation its result or its error, and the state after it."""
    allocator, trace = BlockAllocator(num_blocks), []
    tables = [BlockTable(allocator, block_size)]
    kinds: dict[str, Callable[..., Any]] = {
        "start": lambda table, count, block: tables.append(BlockTable(allocator, block_size)),
        "append": lambda table, count, block: [list(copy) for copy in table.append_tokens(count)],
        "needs": lambda table, count, block: table.blocks_to_append(count),
        "fork": lambda table, count, block: tables.append(table.fork()),
        "release": lambda table, count, block: table.release(),
        "share": lambda table, count, block: table.share_block(block, count),
        "allocate": lambda table, count, block: allocator.allocate(),
        "addRef": lambda table, count, block: allocator.add_ref(block),
        "free": lambda table, count, block: allocator.free(block),
    }
    for kind, place, count, block in operations:
        try:
            result = kinds[kind](tables[place % len(tables)], count, block)
        except POOL_ERRORS as error:
            result = type(error).__name__
        counts = [allocator.ref_count(block) for block in range(num_blocks)]
        state = [[list(table.blocks), table.num_tokens] for table in tables]
        trace.append([result, list(allocator._free), counts, state])
    return trace


def pool_operations(*kinds: str) -> st.SearchStrategy[list[Any]]:
    """Operations: a kind, the place of a table among those that exist, a number of tokens, and a block."""
    drawn = (st.sampled_from(kinds), st.integers(0, 3), st.integers(0, 9), st.integers(-1, 9))
    return st.lists(st.tuples(*drawn), max_size=24)


of_tables = pool_operations("append", "append", "append", "needs", "fork", "release", "start", "share")
of_blocks = pool_operations("allocate", "addRef", "free")  # which the tables know nothing of


@settings(max_examples=examples(200))
@given(operations=of_tables, last=of_blocks, num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
def test_the_pool_does_what_the_reference_does(
    modules: Any, operations: list[Any], last: list[Any], num_blocks: int, block_size: int
) -> None:
    operations = [*operations, *last]
    drawn = {"numBlocks": num_blocks, "blockSize": block_size, "operations": operations}
    trace = modules.evaluate(RUN_POOL, drawn)
    for step in trace:
        step[0] = SAME_ERROR.get(step[0], step[0]) if isinstance(step[0], str) else step[0]
    assert trace == run_pool(num_blocks, block_size, operations)


# ---- block tables ----


def test_block_table_shows_a_copy_on_write(open_figure: Any) -> None:
    with open_figure("block-table") as figure:
        assert says(figure).startswith("B is a fork of A")
        press(figure, "Next")
        assert "2 tokens are copied to block 2 first: copy on write" in says(figure)
        expect(figure.locator(".picture")).to_contain_text("copy of 1")


def test_block_table_follows_the_reader(open_figure: Any) -> None:
    with open_figure("block-table") as figure:
        figure.get_by_label("Sequence").select_option("A")
        press(figure, "Append 4")  # in place of the story's next step
        assert says(figure).startswith("A appends 4 tokens. Block 1 is shared")
        press(figure, "Release")
        assert "Blocks 2 and 3 have none left" in says(figure)
        figure.get_by_role("slider", name="Step").fill("0")
        press(figure, "Append 1")
        assert says(figure).startswith("All blocks are free")  # no sequence, so the button is disabled
        press(figure, "Start another")
        for _ in range(8):
            press(figure, "Append 4")
        assert "Block 7 comes from the front" in says(figure)
        press(figure, "Append 1")
        assert says(figure).endswith("1 free block needed, 0 left. Nothing has changed.")


# ---- the prefix cache ----

WORDS = ["a", "b", "c"]
RUN_PREFIX = """async ({ numBlocks, blockSize, operations }) => {
  const { PrefixPool } = await import("prefix");
  const pool = new PrefixPool(numBlocks, blockSize);
  return operations.map(([kind, name, tokens], place) => {
    let result = null;
    if (kind === "submit") {
      const { hits, evicted, started } = pool.submit(`${place}`, tokens);
      result = started ? [hits, evicted] : null;
    }
    if (kind === "finish") {
      const running = [...pool.tables.keys()];
      if (running.length) result = pool.finish(running[name % running.length]);
    }
    if (kind === "evict") result = pool.cache.evict(name);
    const { allocator, cache } = pool;
    const counts = Array.from({ length: numBlocks }, (_, block) => allocator.refCount(block));
    const kept = counts.map((_, block) => cache.keptAs(block)?.tokens ?? null);
    const tables = [...pool.tables.values()].map((table) => [...table.blocks]);
    return [result, allocator.free, counts, cache.idle, kept, tables];
  });
}"""


class ReferencePool:
    """Requests over the reference's prefix cache, as `PrefixPool` has them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self.cache = PrefixCache(self.allocator, block_size)
        self.tables: list[BlockTable] = []

    def submit(self, tokens: list[int]) -> Any:
        table, stream = BlockTable(self.allocator, self.size), TokenBlocks(self.size)
        stream.extend(tokens)
        hits = self.cache.match(stream, 0, (len(tokens) - 1) // self.size)
        for block in hits:
            self.cache.share(table, block, self.size)
        needed = -(-len(tokens) // self.size) - len(hits)
        if needed > self.allocator.num_free + self.cache.num_idle:
            self._release(table)
            return None
        evicted = self.evict(needed - self.allocator.num_free)
        table.append_tokens(len(tokens) - table.num_tokens)
        self.cache.keep(table, stream, len(hits), len(stream))
        self.tables.append(table)
        return [hits, evicted]

    def evict(self, count: int) -> list[int]:
        idle = self.cache.idle
        return idle[: self.cache.evict(count)]

    def finish(self, place: int) -> Any:
        return self._release(self.tables.pop(place % len(self.tables))) if self.tables else None

    @property
    def state(self) -> list[Any]:
        blocks = range(self.allocator.num_blocks)
        kept = {one.block: [WORDS[token] for token in one.tokens] for one in self.cache._kept.values()}
        counts = [self.allocator.ref_count(block) for block in blocks]
        tables = [table.blocks for table in self.tables]
        return [
            list(self.allocator._free),
            counts,
            self.cache.idle,
            [kept.get(one) for one in blocks],
            tables,
        ]

    def _release(self, table: BlockTable) -> list[int]:
        held = list(table.blocks)
        table.release()
        self.cache.released(held)
        return held


prefix_operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.just(0), st.lists(st.sampled_from(WORDS), min_size=1, max_size=13)),
        st.tuples(st.just("finish"), st.integers(0, 3), st.just([])),
        st.tuples(st.just("evict"), st.integers(0, 3), st.just([])),
    ),
    max_size=14,
)


@settings(max_examples=examples(200))
@given(operations=prefix_operations, num_blocks=st.integers(1, 9), block_size=st.integers(1, 4))
def test_the_prefix_cache_does_what_the_reference_does(
    modules: Any, operations: list[Any], num_blocks: int, block_size: int
) -> None:
    drawn = {"numBlocks": num_blocks, "blockSize": block_size, "operations": operations}
    reference, trace = ReferencePool(num_blocks, block_size), []
    for kind, number, tokens in operations:
        given_ = [WORDS.index(token) for token in tokens] if kind == "submit" else number
        result = getattr(reference, kind)(given_)
        trace.append(json.loads(json.dumps([result, *reference.state])))
    assert modules.evaluate(RUN_PREFIX, drawn) == trace


def test_prefix_cache_shows_the_hits_of_a_typed_prompt(open_figure: Any) -> None:
    with open_figure("prefix-cache") as figure:
        picture, prompt = figure.locator(".picture"), figure.get_by_role("textbox", name="Prompt")
        expect(picture).to_contain_text("hit: block 1")  # of the next prompt of the story
        prompt.fill("You are a helpful assistant")
        expect(picture).to_contain_text("5 tokens, 4 cached")
        prompt.fill("are a helpful assistant")  # the same words at other places
        expect(picture).to_contain_text("4 tokens, 0 cached")
        prompt.fill("You are a helpful")  # the last token is computed, and with it its block
        expect(picture).to_contain_text("last: computed")
        prompt.press("Enter")
        assert says(figure).endswith("then the table takes the cached block.")


def test_prefix_cache_evicts_leaves_first(open_figure: Any) -> None:
    with open_figure("prefix-cache") as figure:
        press(figure, "Finish")
        assert says(figure).startswith("A ends. Blocks 2, 1 and 0 are idle now, to be evicted in this order.")
        press(figure, "Evict one")
        assert says(figure).startswith("Block 2 is evicted")
        figure.get_by_label("Block size").select_option("2")
        expect(figure.locator(".picture")).to_contain_text("the pool: 16 blocks")
        figure.get_by_role("textbox", name="Prompt").fill("a b c d e f g h " * 5)
        press(figure, "Submit")
        assert says(figure).endswith("It waits until another request ends.")
        figure.get_by_role("textbox", name="Prompt").fill("  ")
        press(figure, "Submit")
        assert says(figure) == "Type a prompt first."


# ---- sampling ----

RUN_SAMPLING = """async ({ logits, counts, params, u }) => {
  const { draw, softmax, stages } = await import("sampling");
  const after = stages(logits, counts, params);
  const kept = after.map((row) => row.map((logit) => logit > -Infinity));
  return [kept, softmax(after.at(-1), counts), draw(after.at(-1), counts, u)];
}"""
groups = st.lists(st.tuples(st.integers(-40, 40), st.integers(1, 3)), min_size=1, max_size=12)


def reference_stages(logits: mx.array, params: SamplingParams) -> list[mx.array]:
    """The logits before the first step and after each, by the reference's filters in its order."""
    if params.greedy:
        chosen = mx.arange(logits.size) == mx.argmax(logits)
        return [logits, *[mx.where(chosen, logits, -mx.inf)] * 4]
    after = [logits, logits / params.temperature]
    after.append(keep_min_p(after[-1], params.min_p) if params.min_p > 0 else after[-1])
    after.append(keep_top_k(after[-1], params.top_k) if params.top_k > 0 else after[-1])
    after.append(keep_top_p(after[-1], params.top_p) if params.top_p < 1 else after[-1])
    return after


def distance(values: Any, limit: float) -> float:
    """The distance of the nearest value from a limit at which rounding would decide."""
    return float(np.abs(np.array(values, np.float64) - limit).min())


@settings(max_examples=examples(300))
@given(
    groups=groups,
    temperature=st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.3, 2.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.9, 1.0]),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([0.01, 0.3, 0.61, 0.8, 0.93, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 99),
)
def test_sampling_keeps_and_draws_what_the_reference_does(
    modules: Any, groups: list[Any], seed: int, index: int, **options: Any
) -> None:
    params = SamplingParams(**options)
    numbers, counts = [number / 8 for number, _ in groups], [count for _, count in groups]
    group_of = [group for group, count in enumerate(counts) for _ in range(count)]
    after = reference_stages(mx.array([numbers[group] for group in group_of]), params)
    kept = [[bool(row[group_of.index(group)] > -mx.inf) for group in range(len(counts))] for row in after]
    descending = np.sort(np.array(mx.softmax(after[3])))[::-1]
    sums = np.cumsum(np.array(mx.softmax(after[4])))
    assume(distance(np.cumsum(descending), params.top_p) > 1e-5)
    assume(distance(sums, (1 - uniform(seed, index)) * sums[-1]) > 1e-5)
    chosen = {
        "temperature": params.temperature,
        "minP": params.min_p,
        "topK": params.top_k,
        "topP": params.top_p,
    }
    drawn = {"logits": numbers, "counts": counts, "params": chosen, "u": uniform(seed, index)}
    found, shares, group = modules.evaluate(RUN_SAMPLING, drawn)
    assert found == kept
    together = np.bincount(group_of, np.diff(sums, prepend=0), len(counts))
    np.testing.assert_allclose(shares, together, atol=1e-5)
    assert group == group_of[int(draw(after[4], seed, index))]
    for sampler in (sample_token, sample_token.__wrapped__):
        assert group == group_of[int(sampler(after[0], params, seed, index))]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"topK": 2}, "1110"),  # ties with the second stay
        ({"topP": 0.5}, "1000"),  # a sum of exactly p is enough
        ({"topP": 0.501}, "1110"),
        ({"minP": 0.25}, "1110"),  # exactly at the limit
        ({"minP": 0.26}, "1000"),
        ({"topK": 1, "topP": 0.01}, "1000"),
        ({"temperature": 0}, "1000"),
        ({"temperature": 0.000001}, "1000"),
        ({}, "1111"),
    ],
)
def test_sampling_cuts_exactly_at_the_limits(modules: Any, params: dict[str, float], kept: str) -> None:
    """By hand: probabilities of 4/8, 1/8 and 1/8, and four tokens of 1/16 each."""
    weights, counts = [4.0, 1.0, 1.0, 0.5], [1, 1, 1, 4]
    chosen = {"temperature": 1, "minP": 0, "topK": 0, "topP": 1, **params}
    drawn = {"logits": np.log(weights).tolist(), "counts": counts, "params": chosen, "u": 0.0}
    found, _, group = modules.evaluate(RUN_SAMPLING, drawn)
    assert "".join("01"[one] for one in found[-1]) == kept
    assert group == kept.rindex("1")  # u = 0 leads to the end of the line


def test_the_sampling_figure_has_the_labs_logits_and_the_references_numbers() -> None:
    data = sampling_data.data()
    assert [len(one["likeliest"]) for one in data["prompts"]] == [40] * 3
    assert data["uniform"][3][7] == uniform(3, 7)


def test_sampling_says_what_each_step_does(open_figure: Any) -> None:
    with open_figure("sampling") as figure:
        picture, step = figure.locator(".picture"), figure.get_by_role("slider", name="Step")
        assert says(figure).startswith("Min-p 0.05: ")
        expect(picture).not_to_contain_text("top-k")  # the next step
        press(figure, "Next")
        assert says(figure).startswith("Top-k 12: ")
        expect(picture).to_contain_text("top-k")
        step.fill("0")
        assert says(figure).startswith("The model's own distribution: of 49,152 tokens, ")
        step.fill("1")
        assert says(figure) == "Temperature 1 divides all logits by 1: nothing changes."
        step.fill("5")
        assert says(figure).startswith("Seed 1 and output index 0 give u = 0.337, so")
        expect(picture).to_contain_text("1 - u = 0.663")


def test_sampling_follows_its_sliders(open_figure: Any) -> None:
    with open_figure("sampling") as figure:
        step = figure.get_by_role("slider", name="Step")
        step.fill("0")
        figure.get_by_role("slider", name="Min-p").fill("0.3")  # shows its own step
        expect(step).to_have_value("2")
        assert says(figure).startswith("Min-p 0.30: a token needs 0.30 times ")
        figure.get_by_role("slider", name="Top-p").fill("1")
        assert says(figure).startswith("Top-p is off: all ")
        figure.get_by_role("slider", name="u", exact=True).fill("0.25")
        assert says(figure).startswith("You chose u = 0.250, so the draw looks for 1 - u = 0.750.")
        figure.get_by_role("slider", name="Output index").press("ArrowRight")
        assert says(figure).startswith("Seed 1 and output index 1 give u = 0.855")
        temperature = figure.get_by_role("slider", name="Temperature")
        temperature.fill("0")
        assert says(figure).startswith("A temperature of 0 takes the largest logit")
        expect(figure.locator(".picture")).to_contain_text("greedy")
        temperature.fill("2")
        figure.get_by_role("slider", name="Top-k").fill("0")
        expect(figure.get_by_role("slider", name="Top-k")).to_have_attribute("aria-valuetext", "off")
        press(figure, "Reset")
        expect(step).to_have_value("2")
        assert says(figure).startswith("Min-p 0.05: ")


def test_sampling_shows_a_part_of_the_tail(open_figure: Any) -> None:
    with open_figure("sampling") as figure:
        for name, value in (("Min-p", "0"), ("Top-k", "0"), ("Top-p", "0.99"), ("Temperature", "1.5")):
            figure.get_by_role("slider", name=name).fill(value)
        expect(figure.locator(".picture")).to_contain_text(" of 49,112")
        figure.get_by_label("Prompt").select_option("0")
        figure.get_by_role("slider", name="u", exact=True).fill("0")  # the end of the line
        assert says(figure).endswith("is one of the tokens without a row.")


# ---- three ways to allocate ----

FIRST_RUN = """async (free) => {
  const { firstRun, longestRun } = await import("allocation");
  const runs = Array.from({ length: free.length + 1 }, (_, place) => firstRun(free, place + 1));
  return [longestRun(free), runs];
}"""


@settings(max_examples=examples(100))
@given(free=st.lists(st.booleans(), min_size=1, max_size=16))
def test_adjacent_blocks_are_found_as_in_the_reference(modules: Any, free: list[bool]) -> None:
    runs: list[int | None] = []
    for length in range(1, len(free) + 2):
        pool = GlobalAllocator(len(free), block_size=1, num_heads=1, head_dim=1)
        pool.free_blocks = {block for block, is_free in enumerate(free) if is_free}
        try:
            runs.append(pool.alloc_contiguous(length)[0])
        except errors.OutOfBlocksError:
            runs.append(None)
    longest = sum(run is not None for run in runs)
    assert modules.evaluate(FIRST_RUN, free) == [longest, runs]


SERVE = """async ({ kind, numBlocks, blockSize, longest, lengths }) => {
  const { Adjacent, Paged, Reserved, Server } = await import("allocation");
  const kinds = { Adjacent, Paged, Reserved };
  const server = new Server(new kinds[kind](numBlocks, blockSize, longest));
  const requests = lengths.map(([prompt, more], place) => (
    { name: `r${place}`, arrival: place, prompt, total: prompt + more }
  ));
  const holdings = [];
  for (let step = 0; step < 400 && (step <= requests.length || !server.isIdle); step += 1) {
    server.step(requests.filter(({ arrival }) => arrival === step));
    holdings.push([...server.running].map(([name, tokens]) => [tokens, [...server.memory.blocksOf(name)]]));
  }
  return { holdings, finished: server.finished, refused: server.refused };
}"""


@pytest.mark.parametrize("kind", ["Reserved", "Adjacent", "Paged"])
@settings(max_examples=examples(60))
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=8),
    block_size=st.integers(1, 5),
)
def test_every_request_is_served_and_no_block_is_held_twice(
    modules: Any, kind: str, lengths: list[Any], block_size: int
) -> None:
    longest, num_blocks = 16, -(-24 // block_size)
    drawn = {"kind": kind, "numBlocks": num_blocks, "blockSize": block_size, "longest": longest}
    served = modules.evaluate(SERVE, {**drawn, "lengths": lengths})
    refused = sum(prompt + more > longest for prompt, more in lengths) if kind == "Reserved" else 0
    assert (served["finished"], served["refused"]) == (len(lengths) - refused, refused)
    for holding in served["holdings"]:
        held = [block for _, blocks in holding for block in blocks]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        for tokens, blocks in holding:
            wanted = longest if kind == "Reserved" else tokens
            assert len(blocks) == -(-wanted // block_size)
            assert kind == "Paged" or blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_allocation_shows_free_blocks_that_are_not_adjacent(open_figure: Any) -> None:
    with open_figure("allocation") as figure:
        assert "F waits: 5 blocks are free, but not 3 side by side. Paged: F starts." in says(figure)
        figure.get_by_role("slider", name="Step").fill("99")
        expect(figure.locator(".picture")).to_contain_text("10 finished")


def test_allocation_follows_its_settings(open_figure: Any) -> None:
    with open_figure("allocation") as figure:
        figure.get_by_label("Longest length").select_option("16")
        assert "F is refused, because it is longer than allowed" in says(figure)
        figure.get_by_label("Block size").select_option("8")
        expect(figure.locator(".picture")).to_contain_text("of 12 blocks held")
        figure.get_by_label("Requests").select_option("short")
        expect(figure.locator(".picture")).not_to_contain_text("refused")
        press(figure, "Reset")
        expect(figure.get_by_label("Longest length")).to_have_value("32")
        assert "5 blocks are free, but not 3 side by side" in says(figure)


# ---- rotary positions ----

ROTATE = """async ({ heads, positions, base }) => {
  const { inverseFrequencies, parts, rotate } = await import("rotary");
  const frequencies = inverseFrequencies(heads[0].length, base);
  const [key, query] = heads.map((head, place) => rotate(head, positions[place], frequencies));
  return { frequencies, key, query, score: parts(query, key).reduce((sum, part) => sum + part, 0) };
}"""
numbers = st.floats(-4, 4, width=32)


@settings(max_examples=examples(60))
@given(
    heads=st.integers(1, 6).flatmap(
        lambda half: st.tuples(*[st.lists(numbers, min_size=2 * half, max_size=2 * half)] * 2)
    ),
    positions=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    base=st.sampled_from([10, 100, 10_000]),
)
def test_heads_are_rotated_as_in_the_reference(
    modules: Any, heads: Any, positions: tuple[int, int], base: int
) -> None:
    found = modules.evaluate(ROTATE, {"heads": heads, "positions": positions, "base": base})
    frequencies = inverse_frequencies(len(heads[0]), float(base))
    assert found["frequencies"] == pytest.approx(frequencies.tolist(), rel=1e-4)
    key, query = rope(mx.array(heads).reshape(1, 1, 2, -1), mx.array(positions, mx.int32), frequencies)[0, 0]
    assert found["key"] == pytest.approx(key.tolist(), abs=2e-3)
    assert found["query"] == pytest.approx(query.tolist(), abs=2e-3)
    assert found["score"] == pytest.approx(mx.sum(key * query).item(), abs=0.05)


def test_rotary_keeps_the_score_at_every_position(open_figure: Any) -> None:
    with open_figure("rotary") as figure:
        assert says(figure).startswith("The key is at position 3, the query at 5.")
        assert "The score is 2.37" in says(figure)
        figure.get_by_role("slider", name="Step").fill("20")
        assert says(figure).startswith("The key is at position 20, the query at 22.")
        assert "The score is 2.37" in says(figure)
        figure.get_by_label("Distance").select_option("0")
        assert "The score is 4.00" in says(figure)
        figure.get_by_label("Base").select_option("10000")
        expect(figure.locator(".picture")).to_contain_text("0.1\N{DEGREE SIGN} per position")
        press(figure, "Reset")
        assert "The score is 2.37" in says(figure)


# ---- recorded figures ----


@pytest.mark.parametrize("name", interactive.DATA)
def test_recorded_steps_are_small(name: str) -> None:
    assert len(json.dumps(interactive.DATA[name](), separators=(",", ":"))) < 60_000


def test_recorded_beams_hold_their_words_in_their_blocks() -> None:
    for width, frames in beam_frames.frames().items():
        assert max(len(frame["beams"]) for frame in frames) == int(width)
        for frame in frames:
            tables = [blocks for _, _, _, blocks in frame["beams"]]
            texts = [" ".join(frame["contents"][block] for block in blocks) for blocks in tables]
            assert all(text.startswith(" ".join(beam_frames.PROMPT)) for text in texts)
            assert frame["logical"] == sum(map(len, tables))
            assert frame["physical"] == len(frame["contents"]) == len({b for table in tables for b in table})
        assert frames[-1]["beams"] == []
    best = {width: frames[-1]["ended"][0][0] for width, frames in beam_frames.frames().items()}
    assert best["2"] != best["3"]  # a wider search finds a better text


def test_beams_show_the_recorded_search(open_figure: Any) -> None:
    with open_figure("beams") as figure:
        picture, slider = figure.locator(".picture"), figure.get_by_role("slider", name="Step")
        assert says(figure).endswith("Beam 3 is a fork of beam 0.")
        expect(picture).to_contain_text("→ beam 3")
        press(figure, "Next")
        assert says(figure).endswith("beam 0 copies 3 tokens of block 2 to block 4.")
        figure.get_by_label("Beam width").select_option("4")
        slider.fill("99")
        expect(picture).to_contain_text("no beam is left")
        press(figure, "Reset")
        expect(figure.get_by_label("Beam width")).to_have_value("3")


def test_recorded_timelines_keep_their_budget_and_compute_every_token() -> None:
    needed = sum(prompt + output - 1 for _, prompt, output in timeline_frames.REQUESTS.values())
    kinds = set()
    for key, run in timeline_frames.frames()["runs"].items():
        mode, budget, pool = key.split("/")
        rows = [row.split() for row in run["rows"].values()]
        assert {len(row) for row in rows} == {len(run["used"])}
        assert max(run["used"]) <= int(pool)
        for cells in zip(*rows, strict=True):
            assert sum(map(num_tokens, cells)) <= int(budget)
        again = sum(num_tokens(cell) for row in rows for cell in row if cell[0] == "r")
        first = sum(num_tokens(cell) for row in rows for cell in row if cell[0] != "r")
        assert first <= needed <= first + again
        assert all(cells[-1].endswith("!") for cells in ([c for c in row if c != "-"] for row in rows))
        kinds.update((mode, cell[0]) for row in rows for cell in row)
    assert {kind for mode, kind in kinds if mode == "recompute"} >= set("wpdrxqi")
    assert {kind for mode, kind in kinds if mode == "swap"} >= set("wpdohs")
    assert {kind for mode, kind in kinds if mode == "none"} <= set("wpdi-")


def num_tokens(cell: str) -> int:
    """The tokens that a recorded cell computes."""
    numbers = [int(number) for number in cell[1:].strip("!").split(",") if number]
    return numbers[-1] - numbers[-2] if cell[0] in "pdrs" else 0


def test_timeline_says_what_each_request_does(open_figure: Any) -> None:
    with open_figure("timeline") as figure:
        assert "C is preempted: its blocks are released, and 14 tokens must be computed again" in says(figure)
        picture = figure.locator(".picture")
        for row in ("A decodes 1 token", "B decodes 1 token", "C is preempted"):
            picture.press("ArrowDown")
            assert row in says(figure)
        figure.get_by_text("\u00d7", exact=True).click()
        assert says(figure).startswith("Step 11: C is preempted")
        for _ in range(3):
            picture.press("ArrowUp")
        assert "D and E wait" in says(figure)


def test_timeline_plays_other_settings(open_figure: Any) -> None:
    with open_figure("timeline") as figure:
        figure.get_by_label("Preemption").select_option("swap")
        press(figure, "Reset")
        assert "must be computed again" in says(figure)  # recompute again
        figure.get_by_label("Preemption").select_option("swap")
        figure.get_by_text("↓", exact=True).first.click()
        assert "blocks are copied to the host" in says(figure)
        figure.get_by_text("↑", exact=True).first.click()
        assert "blocks are copied from the host" in says(figure)
        figure.get_by_label("Preemption").select_option("none")
        figure.get_by_label("Pool").select_option("12")
        figure.get_by_role("slider", name="Step").fill("0")
        assert "0 preemptions, 0 tokens computed again and 0 blocks swapped out" in says(figure)


def test_a_chapter_has_one_import_map_however_many_figures_it_has() -> None:
    chapters = Chapters.of_the_project()
    for count in (0, 1, 3):
        text = "Before.\n\n" + "{{interactive beams Beams.}}\n\nBetween.\n\n" * count
        chapter = chapters.expanded(text, "scratch.md")
        assert chapter.count('<script type="importmap">') == min(1, count)
        assert chapter.count('<script type="module">import "beams_figure";</script>') == count
        assert chapter.count("Between.") == count
