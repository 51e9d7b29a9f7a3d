"""3.5: What sliding windows save in a real model with growing contexts: bytes read, memory, time.

Decodes one sequence twice with the same weights: once with the model's windows, once with full attention in
every layer. The prompt's blocks are allocated, but their keys and values are not computed, because the cost
does not depend on them. Bytes read are those of the blocks in a step's block tables. Times are those of whole
steps and, in separate steps that wait for each layer, of only the attention. If the model's package is not
installed, SmolLM2 gets windows: its text is then nonsense, but its costs are real. At the end, counts the
pairs of blocks in a small example.

\b
pdm run lab window
pdm run lab window --longest 32768 --plot window.svg
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Annotated, NamedTuple

import mlx.core as mx
import typer
from tiny_llm.kv_context import KVContext
from tiny_llm.layer_groups import group_layers, layers_per_block
from tiny_llm.loader import load_model
from tiny_llm.model import Model
from tiny_llm.page_layout import PageLayout
from tiny_llm.sliding_window import WindowedTable, first_visible

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, as_bytes, percent
from tiny_llm import BlockAllocator, EngineConfig, KVPool, ModelFileError

SHORTEST = 512  # tokens of the first context, which is doubled repeatedly
BLOCK_SIZE, CHUNK = 16, 512  # tokens in a block and in a prefill chunk
DTYPE = mx.float16
GIVEN_WINDOW, GIVEN_PERIOD = 512, 6  # a model without windows gets one in all layers except every sixth
FEW_BLOCKS, FEW_WINDOW = 8, 3  # blocks of the sequence whose block pairs are counted, and of its window

Windows = Sequence[int | None]


def measure(
    progress: Progress,
    model: Annotated[
        str, typer.Option(help="Model to use; if it is not installed, SmolLM2 with added windows.")
    ] = "gemma3-270m",
    longest: Annotated[
        int,
        typer.Option(min=SHORTEST, help=f"Longest context: {SHORTEST} tokens, 1024, ... up to this."),
    ] = 8192,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Timed steps of each kind.")] = 7,
) -> Result:
    """Decode at every context in both ways, and count bytes, blocks and pairs of blocks."""
    progress("window: reading the model", 0, 1)
    subject = Subject.named(model)
    EngineConfig(max_model_len=longest).wanted_len(subject.model.config)
    contexts = [SHORTEST << doublings for doublings in range((longest // SHORTEST).bit_length())]
    found = []
    for done, context in enumerate(contexts):
        progress("window: contexts decoded at:", done, len(contexts))
        found.append(subject.compare(context, repetitions))
    progress("window", len(contexts), len(contexts))
    return Result(
        title="Sliding windows",
        question="If most layers attend only to recent tokens, what does a token cost after a long text?",
        tables=[_table_of_steps(subject, found), _table_of_memory(subject, found), _table_of_pairs()],
        conclusion=_conclusion(subject, found),
        picture=_picture(subject, found),
    )


class Decoded(NamedTuple):
    """The decode step of a context's last token in one of the ways.

    nbytes: of the blocks in its tables. blocks: held after the step; peak_blocks: the most held until then.
    step, attention: seconds of the fastest step, and of the fastest attention of all layers.
    """

    nbytes: int
    blocks: int
    peak_blocks: int
    step: float
    attention: float


class Compared(NamedTuple):
    """The same token with full attention in every layer, and with the windows."""

    context: int
    full: Decoded
    window: Decoded


class Subject(NamedTuple):
    """A model and the windows of its layers."""

    name: str
    model: Model
    windows: Windows

    @classmethod
    def named(cls, name: str) -> "Subject":
        """Load a model, or SmolLM2 if it is not installed; a model without windows gets some."""
        try:
            loaded = load_model(name)
        except ModelFileError as error:
            if "not installed" not in str(error):
                raise
            loaded = load_model("smollm2")
        windows = loaded.model.config.windows
        if any(windows):
            return cls(loaded.name, loaded.model, windows)
        given = (
            None if layer % GIVEN_PERIOD == GIVEN_PERIOD - 1 else GIVEN_WINDOW
            for layer, _ in enumerate(windows)
        )
        return cls(f"{loaded.name} with added windows", loaded.model, tuple(given))

    @property
    def ways(self) -> tuple[Windows, Windows]:
        """Full attention in every layer, and the windows."""
        return (None,) * len(self.windows), self.windows

    @property
    def layer_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        all_layers: int = self.model.config.kv_bytes_per_token(DTYPE.size)
        return all_layers // len(self.windows)

    @property
    def described(self) -> str:
        """The model's name and its layers' windows, in words."""
        sizes = {window for window in self.windows if window is not None}
        windowed = len(self.windows) - list(self.windows).count(None)
        reach = " and ".join(map(str, sorted(sizes)))
        full = len(self.windows) - windowed
        return f"{self.name}: {windowed} layers with windows of {reach} tokens, {full} with full attention"

    def tokens_read(self, windows: Windows, context: int) -> int:
        """By definition: the tokens that a context's last token sees, summed over all layers."""
        return sum(context if window is None else min(window, context) for window in windows)

    def compare(self, context: int, repetitions: int) -> Compared:
        """Decode up to a context in both ways, alternately."""
        decoders = [Decoder(self.model, windows, context) for windows in self.ways]
        for decoder in decoders:
            decoder.grow(context - 1 - 2 * repetitions)
            decoder.step()  # warms up

        def alternate(time: Callable[[Decoder], float]) -> list[float]:
            rounds = [[time(decoder) for decoder in decoders] for _ in range(repetitions)]
            return [min(times) for times in zip(*rounds, strict=True)]

        times = zip(alternate(Decoder.attention), alternate(Decoder.step), strict=True)
        full, window = (
            Decoded(decoder.tokens_read * self.layer_bytes, decoder.held, decoder.peak_held, step, attention)
            for decoder, (attention, step) in zip(decoders, times, strict=True)
        )
        return Compared(context, full, window)


class Decoder:
    """One sequence that grows to a context, with its own pool.

    tokens_read: tokens of the blocks in the last step's tables, summed over layers. held: blocks in use.
    peak_held: the most blocks in use so far.
    """

    def __init__(self, model: Model, windows: Windows, context: int) -> None:
        self.tokens_read = self.peak_held = self._length = 0
        self._model, config = model, model.config
        self._layout = PageLayout(group_layers(windows), BLOCK_SIZE, CHUNK)
        self._num_blocks: int = self._layout.max_blocks(context)
        heads, layers = config.num_key_value_heads, layers_per_block(self._layout.groups)
        self._pool = KVPool(self._num_blocks, BLOCK_SIZE, heads, config.head_dim, layers, DTYPE)
        self._allocator = BlockAllocator(self._num_blocks)
        self._tables = self._layout.tables(self._allocator)

    @property
    def held(self) -> int:
        """Blocks in use."""
        free: int = self._allocator.num_free
        return self._num_blocks - free

    def grow(self, length: int) -> None:
        """Allocate and release blocks like a prompt of `length` tokens, without computing anything."""
        while self._length < length:
            self._append(min(CHUNK, length - self._length))
            self._release_passed()

    def step(self) -> float:
        """Run a decode step and return its seconds."""
        start = perf_counter()
        self._decode(self._next_context())
        return perf_counter() - start

    def attention(self) -> float:
        """Run a decode step that waits for each layer, and return the seconds of its attention."""
        stopwatch = Stopwatch(self._next_context())
        self._decode(stopwatch)
        return stopwatch.seconds

    def _next_context(self) -> KVContext:
        self._append(1)
        pairs = zip(self._layout.groups, self._tables, strict=True)
        self.tokens_read = sum(len(table.blocks) * BLOCK_SIZE * len(group.layers) for group, table in pairs)
        spans = [(self._tables, self._length - 1, self._length)]
        scale = self._model.config.attention_scale
        return self._layout.context(self._pool, spans, scale, mx.array([0]))

    def _decode(self, context: KVContext) -> None:
        self._pool.evaluate(self._model(mx.array([[1]], mx.int32), context))
        self._release_passed()

    def _append(self, num_tokens: int) -> None:
        for table in self._tables:
            table.append_tokens(num_tokens)
        self._length += num_tokens
        self.peak_held = max(self.peak_held, self.held)

    def _release_passed(self) -> None:
        self._layout.release_passed(self._tables, self._length)


class Stopwatch:
    """A KV context that evaluates each layer's attention at once and adds up the seconds."""

    def __init__(self, context: KVContext) -> None:
        self.positions, self.logit_rows = context.positions, context.logit_rows
        self.seconds = 0.0
        self._context = context

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Call the wrapped context's `attend`, timed."""
        mx.eval(q, k, v)
        start = perf_counter()
        out: mx.array = self._context.attend(layer, q, k, v)
        mx.eval(out)
        self.seconds += perf_counter() - start
        return out


# ---- Tables, conclusion and picture ----


def _table_of_steps(subject: Subject, found: Sequence[Compared]) -> Table:
    """Times with windows are predicted from those without: attention time is proportional to bytes read."""
    rows, (full, windows), ms = [], subject.ways, "{:,.2f}".format
    for row in found:
        read, seen = (subject.tokens_read(way, row.context) * subject.layer_bytes for way in (full, windows))
        attention = row.full.attention * seen / read
        step = row.full.step - row.full.attention + attention
        rows.append(
            (
                row.context,
                row.full.nbytes,
                Pair(seen, row.window.nbytes),
                1e3 * row.full.attention,
                Pair(1e3 * attention, 1e3 * row.window.attention),
                1e3 * row.full.step,
                Pair(1e3 * step, 1e3 * row.window.step),
            )
        )
    return Table(
        f"Decoding a token at the end of a context. {subject.described}. Bytes read are measured in whole "
        f"blocks of {BLOCK_SIZE} tokens; {subject.layer_bytes:,} bytes per token and layer",
        [
            Column("context", "tokens"),
            Column("all_bytes", "read,\nfull", as_bytes),
            Column("window_bytes", "read,\nwindows", as_bytes),
            Column("all_attention_ms", "attention,\nfull\n(ms)", ms),
            Column("window_attention_ms", "attention,\nwindows\n(ms)", ms),
            Column("all_ms", "step,\nfull\n(ms)", ms),
            Column("window_ms", "step,\nwindows\n(ms)", ms),
        ],
        rows,
    )


def _table_of_memory(subject: Subject, found: Sequence[Compared]) -> Table:
    """Blocks held after the context's last token, and at the peak; predicted from the visible positions."""
    full, windows = (PageLayout(group_layers(way), BLOCK_SIZE, CHUNK) for way in subject.ways)
    block_bytes = [
        layers_per_block(layout.groups) * BLOCK_SIZE * subject.layer_bytes for layout in (full, windows)
    ]
    rows = []
    for row in found:
        held = [way.blocks * each for way, each in zip(row[1:], block_bytes, strict=True)]
        rows.append(
            (
                row.context,
                row.full.blocks,
                held[0],
                Pair(_blocks_held(windows, row.context), row.window.blocks),
                held[1],
                Pair(windows.max_blocks(row.context), row.window.peak_blocks),
                1 - held[1] / held[0],
            )
        )
    return Table(
        f"Blocks that the sequence holds. A block stores {layers_per_block(full.groups)} layers with full "
        f"attention everywhere, and {layers_per_block(windows.groups)} layers with windows. Peak: during "
        f"prefill in chunks of {CHUNK} tokens",
        [
            Column("context", "tokens"),
            Column("all_blocks", "blocks,\nfull"),
            Column("all_held", "memory,\nfull", as_bytes),
            Column("window_blocks", "blocks,\nwindows"),
            Column("window_held", "memory,\nwindows", as_bytes),
            Column("peak_blocks", "peak blocks,\nwindows"),
            Column("saved", "memory\nsaved", percent),
        ],
        rows,
    )


def _blocks_held(layout: PageLayout, context: int) -> int:
    """By definition: the blocks of the positions that the next query sees, including a partly filled one."""
    blocks = -(-context // BLOCK_SIZE)
    firsts = (0 if group.window is None else first_visible(context, group.window) for group in layout.groups)
    return sum(blocks - first // BLOCK_SIZE for first in firsts)


def _conclusion(subject: Subject, found: Sequence[Compared]) -> str:
    last = found[-1]
    full_bytes = list(subject.windows).count(None) * last.context * subject.layer_bytes
    return (
        f"With windows, a token after {last.context:,} tokens reads {as_bytes(last.window.nbytes)} of keys "
        f"and values, {as_bytes(full_bytes)} of these in layers with full attention, instead of "
        f"{as_bytes(last.full.nbytes)}. Its attention takes {1e3 * last.window.attention:.1f} ms instead of "
        f"{1e3 * last.full.attention:.1f} ms, the whole step {1e3 * last.window.step:.1f} ms instead of "
        f"{1e3 * last.full.step:.1f} ms."
    )


def _picture(subject: Subject, found: Sequence[Compared]) -> Picture:
    full, windows = subject.ways
    predicted = [
        Point(
            row.context,
            1e3
            * row.full.attention
            * subject.tokens_read(windows, row.context)
            / subject.tokens_read(full, row.context),
        )
        for row in found
    ]
    return Picture(
        title=f"Attention of one token in {subject.name}",
        x="tokens",
        y="time (ms)",
        lines=[
            Line("full attention", [Point(row.context, 1e3 * row.full.attention) for row in found]),
            Line("windows", predicted, is_predicted=True),
            Line("windows", [Point(row.context, 1e3 * row.window.attention) for row in found]),
        ],
        x_base=2,
    )


# ---- Pairs of blocks ----


def _table_of_pairs() -> Table:
    """With blocks of one token, the pairs are the entries of the block tables in all steps."""
    blocks, window = FEW_BLOCKS, FEW_WINDOW
    full = Pair(sum(place + 1 for place in range(blocks)), _num_pairs(blocks, blocks))
    near = Pair(sum(min(place + 1, window) for place in range(blocks)), _num_pairs(blocks, window))
    saved = Pair(*(1 - some / every for some, every in zip(near, full, strict=True)))
    return Table(
        f"Pairs of a query's block and a block that it reads, in a sequence of {blocks} blocks. A rectangle "
        f"of {blocks} x {blocks} = {blocks**2} includes later blocks, which no query may read; one of "
        f"{blocks} x {window} = {blocks * window} includes blocks before the first",
        [
            Column("reads", "each block reads"),
            Column("pairs", "pairs"),
            Column("saved", "saved", percent),
            Column("rectangle", "as a\nrectangle"),
            Column("rectangle_saved", "saved, as a\nrectangle", percent),
        ],
        [
            ("itself and all earlier blocks", full, Pair(0, 0), blocks**2, 0),
            (f"itself and the {window - 1} before it", near, saved, blocks * window, 1 - window / blocks),
        ],
    )


def _num_pairs(blocks: int, window: int) -> int:
    """Entries of a windowed table of one-token blocks, summed over the steps of all tokens."""
    table, named = WindowedTable(BlockAllocator(blocks), 1), 0
    for position in range(blocks):
        table.release_before(first_visible(position, window))
        table.append_tokens(1)
        named += len(table.blocks)
    return named
