"""3.3: What reading only a window of blocks saves: tokens read, bytes moved, time.

A paged cache holds one long sequence. At growing positions, reads all tokens up to the position, then only
the last few blocks (`read_sparse`); bytes are the sizes of the returned arrays. Also counts the pairs of a
query's block and a block that it reads, over a sequence of a few blocks.

\b
pdm run lab sparse
pdm run lab sparse --window-blocks 8 --longest 8192 --plot sparse.svg
"""

from collections.abc import Callable
from time import perf_counter
from typing import Annotated, NamedTuple

import mlx.core as mx
import typer

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, as_bytes, percent
from tiny_llm import PagedKVCache

DTYPE = mx.bfloat16
SEQ = "long"
SHORTEST, EXAMPLE = 63, 500  # the first of the positions 63, 127, 255, ..., and one additional position
FEW_BLOCKS, FEW_WINDOW = 8, 3  # blocks of the sequence whose block pairs are counted, and of its window

Read = Callable[[], tuple[mx.array, mx.array]]


def measure(
    progress: Progress,
    longest: Annotated[
        int,
        typer.Option(min=SHORTEST + 1, help=f"Tokens of the sequence; read at {SHORTEST}, 127, 255, ..."),
    ] = 4096,
    window_blocks: Annotated[int, typer.Option(min=1, help="Blocks in the window.")] = 4,
    block_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens in a block.")] = 16,
    num_heads: Annotated[int, typer.Option(min=1, help="Number of KV heads.")] = 32,
    head_dim: Annotated[int, typer.Option(min=1, help="Dimension of a head.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed reads of each kind.")] = 5,
) -> Result:
    """Fill a sequence, read it in both ways, count pairs of blocks."""
    long = LongSequence.of(longest, window_blocks, block_size, (num_heads, head_dim))
    doubled = range((longest // (SHORTEST + 1)).bit_length())
    positions = {((SHORTEST + 1) << doublings) - 1 for doublings in doubled} | {min(EXAMPLE, longest - 1)}
    found = []
    for done, position in enumerate(sorted(positions)):
        progress("sparse: positions read at:", done, len(positions))
        found.append(long.compare(position, repetitions))
    progress("sparse", len(positions), len(positions))
    return Result(
        title="A window of blocks",
        question="If a token attends only to recent tokens, how much need not be read?",
        tables=[_table_of_reads(long, found), _table_of_pairs()],
        conclusion=_conclusion(long, found),
        picture=_picture(long, found),
    )


class Reading(NamedTuple):
    """A read: tokens, bytes of keys and values, and seconds of the fastest repetition."""

    tokens: int
    nbytes: int
    seconds: float


class Compared(NamedTuple):
    """Both reads at one position. agree: the window equals the end of the full read."""

    position: int
    full: Reading
    window: Reading
    agree: bool


class LongSequence(NamedTuple):
    """A cache with one sequence of random keys and values."""

    cache: PagedKVCache
    window_blocks: int
    block_size: int
    bytes_per_token: int

    @classmethod
    def of(cls, tokens: int, window_blocks: int, block_size: int, heads: tuple[int, int]) -> "LongSequence":
        """Fill a cache; heads: number of KV heads and their dimension."""
        blocks = -(-tokens // block_size)
        cache = PagedKVCache(blocks, block_size, *heads, DTYPE)
        cache.allocate(SEQ, tokens)
        noise = mx.random.normal((tokens, *heads), key=mx.random.key(0))
        cache.pool.write(0, cache.build_flat_slot_mapping([(SEQ, tokens)]), noise, -noise)
        return cls(cache, window_blocks, block_size, 2 * heads[0] * heads[1] * DTYPE.size)

    def tokens_in_window(self, position: int) -> int:
        """By definition: the window's blocks are full except the last, which is read up to the position."""
        place, offset = divmod(position, self.block_size)
        return min(place, self.window_blocks - 1) * self.block_size + offset + 1

    def compare(self, position: int, repetitions: int) -> Compared:
        """Read all tokens up to a position, and the window that ends there."""
        cache, window = self.cache, self.window_blocks
        full, keys = _read(lambda: cache.read_blocks(SEQ, 0, position + 1), repetitions)
        sparse, tail = _read(lambda: cache.read_sparse(SEQ, position, window), repetitions)
        same = mx.array_equal(keys[:, -tail.shape[1] :], tail)
        return Compared(position, full, sparse, bool(same.item()))


def _read(read: Read, repetitions: int) -> tuple[Reading, mx.array]:
    """Time a read after one warm-up; return the reading and its keys [Hkv, tokens, D]."""
    keys, values = read()
    seconds = []
    for _ in range(repetitions):
        start = perf_counter()
        mx.eval(read())
        seconds.append(perf_counter() - start)
    return Reading(keys.shape[1], keys.nbytes + values.nbytes, min(seconds)), keys


def _table_of_reads(long: LongSequence, found: list[Compared]) -> Table:
    ms, rows = "{:,.2f}".format, []
    for row in found:
        everything, windowed = row.position + 1, long.tokens_in_window(row.position)
        rows.append(
            (
                row.position,
                Pair(everything, row.full.tokens),
                Pair(windowed, row.window.tokens),
                Pair(windowed * long.bytes_per_token, row.window.nbytes),
                Pair(1 - windowed / everything, 1 - row.window.nbytes / row.full.nbytes),
                1e3 * row.full.seconds,
                1e3 * row.window.seconds,
            )
        )
    return Table(
        f"Reading all tokens up to a position, or the last {long.window_blocks} blocks of {long.block_size} "
        f"tokens; {long.bytes_per_token:,} bytes per token",
        [
            Column("position", "position"),
            Column("full", "all\n(tokens)"),
            Column("window", "window\n(tokens)"),
            Column("bytes", "window\n(bytes)", as_bytes),
            Column("saved", "saved", percent),
            Column("full_ms", "all\n(ms)", ms),
            Column("window_ms", "window\n(ms)", ms),
        ],
        rows,
    )


# ---- Pairs of blocks ----


def _table_of_pairs() -> Table:
    """The last token of a block reads whole blocks; each is a pair with the token's block."""
    blocks, window = FEW_BLOCKS, FEW_WINDOW
    cache = PagedKVCache(blocks, 1, 1, 1)  # blocks of one token, which is their last
    cache.allocate(SEQ, blocks)
    full = Pair(
        sum(place + 1 for place in range(blocks)),
        sum(cache.read_blocks(SEQ, 0, place + 1)[0].shape[1] for place in range(blocks)),
    )
    sparse = Pair(
        sum(min(place + 1, window) for place in range(blocks)),
        sum(cache.read_sparse(SEQ, place, window)[0].shape[1] for place in range(blocks)),
    )
    saved = Pair(*(1 - some / every for some, every in zip(sparse, full, strict=True)))
    return Table(
        f"Pairs of a query's block and a block that it reads, in a sequence of {blocks} blocks. A "
        f"rectangle of {blocks} x {blocks} = {blocks**2} includes later blocks, which no query may read; one "
        f"of {blocks} x {window} = {blocks * window} includes blocks before the first",
        [Column("reads", "each block reads"), Column("pairs", "pairs"), Column("saved", "saved", percent)],
        [
            ("itself and all earlier blocks", full, Pair(0, 0)),
            (f"itself and the {window - 1} before it", sparse, saved),
        ],
    )


def _conclusion(long: LongSequence, found: list[Compared]) -> str:
    last, agree = found[-1], sum(row.agree for row in found)
    return (
        f"At position {last.position:,}, a window of {long.window_blocks} blocks moves "
        f"{as_bytes(last.window.nbytes)} instead of {as_bytes(last.full.nbytes)} and takes "
        f"{1e3 * last.window.seconds:.2f} ms instead of {1e3 * last.full.seconds:.2f} ms. The window's "
        f"tokens equal the last ones of the full read at {agree} of {len(found)} positions."
    )


def _picture(long: LongSequence, found: list[Compared]) -> Picture:
    mib = long.bytes_per_token / 2**20
    ends = [row.position + 1 for row in found]
    windows = [Point(row.position + 1, mib * long.tokens_in_window(row.position)) for row in found]
    return Picture(
        title=f"Keys and values read for one query, {long.bytes_per_token:,} bytes per token",
        x="tokens up to the query",
        y="read (MiB)",
        lines=[
            Line("all", [Point(end, mib * end) for end in ends], is_predicted=True),
            Line("all", [Point(row.position + 1, row.full.nbytes / 2**20) for row in found]),
            Line(f"last {long.window_blocks} blocks", windows, is_predicted=True),
            Line(
                f"last {long.window_blocks} blocks",
                [Point(row.position + 1, row.window.nbytes / 2**20) for row in found],
            ),
        ],
        x_base=2,
        y_base=2,
    )
