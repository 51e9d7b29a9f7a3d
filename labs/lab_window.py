"""3.5: What windows save in a real model: bytes read, memory held, time, at growing contexts.

One sequence is decoded twice with the same weights: each layer as far as the model's windows go, and every
layer all the way. The pages are there; nobody computes what would be in them. Bytes read are those of the
blocks that a step's tables name; time is that of the whole step, and, in steps of their own in which each
layer is waited for, that of attention alone. Without the model's package, SmolLM2 is given windows: what it
says then is nonsense, what it costs is not. At the end, the pairs of blocks of a small example.

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

SHORTEST = 512  # tokens of the first context, doubled again and again
BLOCK_SIZE, CHUNK = 16, 512  # tokens of a block, and of a step while the prompt is computed
DTYPE = mx.float16
GIVEN_WINDOW, GIVEN_PERIOD = 512, 6  # to a model without windows: all layers but every sixth
FEW_BLOCKS, FEW_WINDOW = 8, 3  # of the sequence whose block pairs are counted

Windows = Sequence[int | None]


def measure(
    progress: Progress,
    model: Annotated[
        str, typer.Option(help="Its weights; where that is not installed, SmolLM2's with windows given.")
    ] = "gemma3-270m",
    longest: Annotated[
        int, typer.Option(min=SHORTEST, help=f"Tokens: contexts of {SHORTEST}, and so on up to this.")
    ] = 8192,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Timed steps of each kind.")] = 7,
) -> Result:
    """Decode at every context in both ways, count what was read and held, count pairs of blocks."""
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
        asks="Most layers look at their neighbours alone. What does a token cost at the end of a long text?",
        tables=[_table_of_steps(subject, found), _table_of_memory(subject, found), _table_of_pairs()],
        conclusion=_conclusion(subject, found),
        picture=_picture(subject, found),
    )


class Decoded(NamedTuple):
    """A way's decode of the last token of a context.

    nbytes: of the blocks that its tables named. blocks: held afterwards; most_blocks: held on the way. step:
    seconds at best; attention: seconds of all layers' attention at best.
    """

    nbytes: int
    blocks: int
    most_blocks: int
    step: float
    attention: float


class Compared(NamedTuple):
    """The same token with every layer looking all the way, and with the windows."""

    context: int
    full: Decoded
    window: Decoded


class Subject(NamedTuple):
    """A model, and how far its layers see here."""

    name: str
    model: Model
    windows: Windows

    @classmethod
    def named(cls, name: str) -> "Subject":
        """A model as it is; one without windows, or SmolLM2 where there is none, with some given."""
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
        return cls(f"{loaded.name}, given windows", loaded.model, tuple(given))

    @property
    def ways(self) -> tuple[Windows, Windows]:
        """Every layer all the way; and the windows."""
        return (None,) * len(self.windows), self.windows

    @property
    def layer_bytes(self) -> int:
        """Of one token's keys and values in one layer."""
        of_all: int = self.model.config.kv_bytes_per_token(DTYPE.size)
        return of_all // len(self.windows)

    @property
    def described(self) -> str:
        """In words: which layers see how far."""
        sizes = {window for window in self.windows if window is not None}
        windowed = len(self.windows) - list(self.windows).count(None)
        far = " and ".join(map(str, sorted(sizes)))
        return f"{self.name}: {windowed} layers see {far} tokens, {len(self.windows) - windowed} see all"

    def tokens_read(self, windows: Windows, context: int) -> int:
        """By definition: what the last of so many tokens sees, over all layers."""
        return sum(context if window is None else min(window, context) for window in windows)

    def compare(self, context: int, repetitions: int) -> Compared:
        """Decode up to a context in both ways, in turns."""
        decoders = [Decoder(self.model, windows, context) for windows in self.ways]
        for decoder in decoders:
            decoder.grow(context - 1 - 2 * repetitions)
            decoder.step()  # warms up

        def in_turns(time: Callable[[Decoder], float]) -> list[float]:
            rounds = [[time(decoder) for decoder in decoders] for _ in range(repetitions)]
            return [min(times) for times in zip(*rounds, strict=True)]

        times = zip(in_turns(Decoder.attention), in_turns(Decoder.step), strict=True)
        full, window = (
            Decoded(decoder.tokens_read * self.layer_bytes, decoder.held, decoder.most_held, step, attention)
            for decoder, (attention, step) in zip(decoders, times, strict=True)
        )
        return Compared(context, full, window)


class Decoder:
    """One sequence that grows to a context, over pages of its own.

    tokens_read: over all layers, whole blocks, that the last step's tables named. held: blocks after it.
    most_held: the most that it held on the way.
    """

    def __init__(self, model: Model, windows: Windows, context: int) -> None:
        self.tokens_read = self.most_held = self._length = 0
        self._model, config = model, model.config
        self._layout = PageLayout(group_layers(windows), BLOCK_SIZE, CHUNK)
        self._num_blocks: int = self._layout.most_blocks(context)
        heads, layers = config.num_key_value_heads, layers_per_block(self._layout.groups)
        self._pool = KVPool(self._num_blocks, BLOCK_SIZE, heads, config.head_dim, layers, DTYPE)
        self._allocator = BlockAllocator(self._num_blocks)
        self._tables = self._layout.tables(self._allocator)

    @property
    def held(self) -> int:
        """Blocks that are in use."""
        free: int = self._allocator.num_free
        return self._num_blocks - free

    def grow(self, length: int) -> None:
        """Take and give back pages as a prompt of so many tokens does, and compute nothing."""
        while self._length < length:
            self._append(min(CHUNK, length - self._length))
            self._forget()

    def step(self) -> float:
        """Seconds of a decode step."""
        start = perf_counter()
        self._decode(self._begin())
        return perf_counter() - start

    def attention(self) -> float:
        """Seconds of attention in a decode step whose layers wait for one another."""
        stopwatch = Stopwatch(self._begin())
        self._decode(stopwatch)
        return stopwatch.seconds

    def _begin(self) -> KVContext:
        self._append(1)
        pairs = zip(self._layout.groups, self._tables, strict=True)
        self.tokens_read = sum(len(table.blocks) * BLOCK_SIZE * len(group.layers) for group, table in pairs)
        spans = [(self._tables, self._length - 1, self._length)]
        scale = self._model.config.attention_scale
        return self._layout.context(self._pool, spans, scale, mx.array([0]))

    def _decode(self, context: KVContext) -> None:
        self._pool.evaluate(self._model(mx.array([[1]], mx.int32), context))
        self._forget()

    def _append(self, num_tokens: int) -> None:
        for table in self._tables:
            table.append_tokens(num_tokens)
        self._length += num_tokens
        self.most_held = max(self.most_held, self.held)

    def _forget(self) -> None:
        self._layout.release_passed(self._tables, self._length)


class Stopwatch:
    """A context that waits for each layer's attention, and adds up how long that takes."""

    def __init__(self, context: KVContext) -> None:
        self.positions, self.logit_rows = context.positions, context.logit_rows
        self.seconds = 0.0
        self._context = context

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """As the context's own."""
        mx.eval(q, k, v)
        start = perf_counter()
        out: mx.array = self._context.attend(layer, q, k, v)
        mx.eval(out)
        self.seconds += perf_counter() - start
        return out


# ---- What is shown ----


def _table_of_steps(subject: Subject, found: Sequence[Compared]) -> Table:
    """The windows' times are predicted from those without: attention takes as long as what it reads."""
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
        f"A token at the end of a context. {subject.described}. Read: measured in whole blocks of "
        f"{BLOCK_SIZE} tokens, {subject.layer_bytes:,} bytes a token and layer",
        [
            Column("context", "tokens"),
            Column("all_bytes", "read,\nall", as_bytes),
            Column("window_bytes", "read,\nwindows", as_bytes),
            Column("all_attention_ms", "attention,\nall (ms)", ms),
            Column("window_attention_ms", "attention,\nwindows (ms)", ms),
            Column("all_ms", "step,\nall (ms)", ms),
            Column("window_ms", "step,\nwindows (ms)", ms),
        ],
        rows,
    )


def _table_of_memory(subject: Subject, found: Sequence[Compared]) -> Table:
    """Blocks after the context's last token, by the positions that the next one sees; and at most."""
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
                Pair(windows.most_blocks(row.context), row.window.most_blocks),
                1 - held[1] / held[0],
            )
        )
    return Table(
        f"Blocks that the sequence holds: a block is for {layers_per_block(full.groups)} layers where all "
        f"see all, for {layers_per_block(windows.groups)} with windows. At most: while the prompt is "
        f"computed in chunks of {CHUNK}",
        [
            Column("context", "tokens"),
            Column("all_blocks", "blocks,\nall"),
            Column("all_held", "held", as_bytes),
            Column("window_blocks", "blocks,\nwindows"),
            Column("window_held", "held", as_bytes),
            Column("most_blocks", "at most,\nwindows"),
            Column("saved", "saved", percent),
        ],
        rows,
    )


def _blocks_held(layout: PageLayout, context: int) -> int:
    """By definition: those of the positions that the next query sees, the last one begun included."""
    blocks = -(-context // BLOCK_SIZE)
    firsts = (0 if group.window is None else first_visible(context, group.window) for group in layout.groups)
    return sum(blocks - first // BLOCK_SIZE for first in firsts)


def _conclusion(subject: Subject, found: Sequence[Compared]) -> str:
    last = found[-1]
    of_full = list(subject.windows).count(None) * last.context * subject.layer_bytes
    return (
        f"After {last.context:,} tokens the next one reads {as_bytes(last.window.nbytes)} of keys and values "
        f"instead of {as_bytes(last.full.nbytes)}; its attention takes {1e3 * last.window.attention:.1f} ms "
        f"instead of {1e3 * last.full.attention:.1f}, and all of it {1e3 * last.window.step:.1f} instead of "
        f"{1e3 * last.full.step:.1f}. Of what is still read, {as_bytes(of_full)} are of layers that see all."
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
            Line("all layers see all", [Point(row.context, 1e3 * row.full.attention) for row in found]),
            Line("windows", predicted, is_predicted=True),
            Line("windows", [Point(row.context, 1e3 * row.window.attention) for row in found]),
        ],
        x_base=2,
    )


# ---- Pairs of blocks ----


def _table_of_pairs() -> Table:
    """Blocks of one token: as many pairs as the tables of the tokens' steps name blocks."""
    blocks, window = FEW_BLOCKS, FEW_WINDOW
    full = Pair(sum(place + 1 for place in range(blocks)), _pairs_named(blocks, blocks))
    near = Pair(sum(min(place + 1, window) for place in range(blocks)), _pairs_named(blocks, window))
    saved = Pair(*(1 - some / every for some, every in zip(near, full, strict=True)))
    return Table(
        f"Pairs of a query's block and one that it reads, {blocks} blocks in all. {blocks} x {blocks} = "
        f"{blocks**2} counts blocks that come later, which nobody may read; {blocks} x {window} = "
        f"{blocks * window} counts some before the first, which are not there",
        [
            Column("reads", "each block reads"),
            Column("pairs", "pairs"),
            Column("saved", "saved", percent),
            Column("rectangle", "as a\nrectangle"),
            Column("rectangle_saved", "saved\nthen", percent),
        ],
        [
            ("itself and all before", full, Pair(0, 0), blocks**2, 0),
            (f"the last {window}, itself included", near, saved, blocks * window, 1 - window / blocks),
        ],
    )


def _pairs_named(blocks: int, window: int) -> int:
    """Blocks that a table of one-token blocks has at each token's step."""
    table, named = WindowedTable(BlockAllocator(blocks), 1), 0
    for position in range(blocks):
        table.release_before(first_visible(position, window))
        table.append_tokens(1)
        named += len(table.blocks)
    return named
