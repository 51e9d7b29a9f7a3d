"""3.3: Where a token lives, as one number, and what it saves to know it for a whole batch at once.

Works out the slot of one token, which one can read elsewhere as 2,050, and asks arrays where they have that
token. Then gathers the keys and values of a batch whose sequences grew in turns, so that nobody's blocks lie
side by side: token by token, and by one array of slots, which is made by looking every token up, or for
whole blocks at a time.

\b
pdm run lab slots
pdm run lab slots --tokens 8000 --sequences 32 --plot slots.svg
"""

import random
from collections.abc import Callable
from time import perf_counter
from typing import Annotated, NamedTuple, cast

import mlx.core as mx
import typer

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table
from tiny_llm import BlockAllocator, BlockTable, PagedKVCache

HEADS, HEAD_DIM = 3, 64  # the embedded model's keys and values
STEPS = 4  # batches: of all tokens, and halved again and again
BLOCKS, BLOCK_SIZE, TOKEN = (23, 64, 87), 16, 25  # one slot: of a sequence's blocks, and one of its tokens
ONE_BY_ONE, LOOKED_UP, BY_BLOCKS, KEPT = (
    "token by token",
    "slots, one by one",
    "slots, whole blocks",
    "slots made before",
)

KeysValues = tuple[mx.array, mx.array]


def measure(
    progress: Progress,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of the largest batch.")] = 1000,
    sequences: Annotated[int, typer.Option(min=1, max=512, help="Sequences that they belong to.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens in a block.")] = 16,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed gathers of each kind.")] = 5,
    seed: Annotated[int, typer.Option(help="Source of whose turn it is to grow.")] = 0,
) -> Result:
    """Work out one slot, then gather batches of growing size."""
    sizes = [tokens >> halvings for halvings in reversed(range(STEPS))]
    batches = [Batch.grown_in_turns(size, sequences, block_size, seed) for size in sizes]
    found = [Gathered(size, batch.num_equal(), {}) for size, batch in zip(sizes, batches, strict=True)]
    for done in range(repetitions):
        progress("slots: gathers of each kind:", done, repetitions)
        for batch, row in zip(batches, found, strict=True):
            row.note(batch)
    progress("slots", repetitions, repetitions)
    return Result(
        title="Flat slots",
        asks="Must every token's place be looked up in its sequence's block table?",
        tables=[_table_of_one_slot(), _table_of_gathers(found, sequences, block_size)],
        conclusion=_conclusion(found[-1]),
        picture=_picture(found),
    )


# ---- One slot ----


class Place(NamedTuple):
    """A place of a token's number. predicted: by its definition. measured: by the array, or table, itself."""

    what: str
    definition: str
    slot: Pair


def _places(block: int, offset: int) -> list[Place]:
    """Of a key and a value, in arrays of their own and side by side in one that hold their own addresses."""
    count, size = max(BLOCKS) + 1, BLOCK_SIZE
    apart = mx.arange(count * size).reshape(count, size)
    together = mx.arange(count * size * 2).reshape(count, size, 2)  # a key, a value, a key, a value ...
    return [
        Place(
            "its key, or value, in an array of its own",
            f"{block} x {size} + {offset}",
            Pair(block * size + offset, _int(apart[block, offset])),
        ),
        Place(
            "its key, where keys and values take turns",
            f"{block} x {2 * size} + {offset} x 2",
            Pair(block * 2 * size + 2 * offset, _int(together[block, offset, 0])),
        ),
        Place(
            "its value there",
            f"{block} x {2 * size} + {offset} x 2 + 1",
            Pair(block * 2 * size + 2 * offset + 1, _int(together[block, offset, 1])),
        ),
    ]


def _table_of_one_slot() -> Table:
    index, offset = divmod(TOKEN, BLOCK_SIZE)
    block = BLOCKS[index]
    table = BlockTable(BlockAllocator(max(BLOCKS) + 1), BLOCK_SIZE)
    table.blocks, table.num_tokens = list(BLOCKS), len(BLOCKS) * BLOCK_SIZE
    [asked] = table.slots(TOKEN, TOKEN + 1)
    definition = f"slots({TOKEN}, {TOKEN + 1})"
    own = Place("the first, says the block table", definition, Pair(block * BLOCK_SIZE + offset, asked))
    shown = ", ".join(map(str, BLOCKS))
    return Table(
        f"Token {TOKEN} of a sequence in blocks {shown} of {BLOCK_SIZE}: {TOKEN} = {index} x {BLOCK_SIZE} + "
        f"{offset}, so block {block}, offset {offset}",
        [Column("what", "what"), Column("definition", "definition"), Column("slot", "slot")],
        [*_places(block, offset), own],
    )


# ---- A batch of them ----


class Batch(NamedTuple):
    """A cache, its sequences with their lengths, and the slots of all their tokens."""

    cache: PagedKVCache
    sequences: list[tuple[str, int]]
    slots: mx.array

    @classmethod
    def grown_in_turns(cls, tokens: int, sequences: int, block_size: int, seed: int) -> "Batch":
        """So many tokens in all, about as many in each sequence; each turn one of them takes a block."""
        lengths = [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
        turns = [i for i, length in enumerate(lengths) for _ in range(-(-length // block_size))]
        random.Random(seed).shuffle(turns)
        cache = PagedKVCache(len(turns), block_size, HEADS, HEAD_DIM, mx.float16)
        left = list(lengths)
        for i in turns:
            count = min(block_size, left[i])
            cache.allocate(str(i), count)
            left[i] -= count
        noise = mx.random.normal((len(turns) * block_size, HEADS, HEAD_DIM), key=mx.random.key(seed))
        cache.pool.write(0, mx.arange(len(noise)), noise, -noise)
        named = [(str(i), length) for i, length in enumerate(lengths) if length]
        return cls(cache, named, cache.build_flat_slot_mapping(named))

    def ways(self) -> dict[str, Callable[[], KeysValues]]:
        """The same gather, keys and values [tokens, Hkv, D], in each way."""
        pool, cache = self.cache.pool, self.cache
        return {
            ONE_BY_ONE: self.token_by_token,
            LOOKED_UP: lambda: pool.read(0, self.looked_up_slots()),
            BY_BLOCKS: lambda: pool.read(0, cache.build_flat_slot_mapping(self.sequences)),
            KEPT: lambda: pool.read(0, self.slots),
        }

    def token_by_token(self) -> KeysValues:
        """One look into a block table, and one read, for every token."""
        pairs = [self.cache.read_blocks(name, i, 1) for name, length in self.sequences for i in range(length)]
        keys, values = (mx.concatenate(list(parts), axis=1) for parts in zip(*pairs, strict=True))
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)

    def looked_up_slots(self) -> mx.array:
        """All slots, by one step of Python for every token."""
        tables = [(self.cache.tables[name], length) for name, length in self.sequences]
        return mx.array([slot for table, length in tables for slot in table.slots(0, length)], mx.int32)

    def num_equal(self) -> int:
        """Tokens whose key and value all ways find alike; this warms them up, too."""
        first, *others = (gather() for gather in self.ways().values())
        same = mx.array(True)
        for other in others:
            for one, another in zip(first, other, strict=True):
                same = same & mx.all(one == another, axis=(1, 2))
        return _int(mx.sum(same))


class Gathered(NamedTuple):
    """What was found for a batch of so many tokens. seconds: of each way, the best of all rounds."""

    tokens: int
    num_equal: int
    seconds: dict[str, float]

    def note(self, batch: Batch) -> None:
        """One round more."""
        for name, gather in batch.ways().items():
            start = perf_counter()
            mx.eval(gather())
            self.seconds[name] = min(perf_counter() - start, self.seconds.get(name, float("inf")))


def _table_of_gathers(found: list[Gathered], sequences: int, block_size: int) -> Table:
    """Reading token by token costs the same for each of them: as many times as there are tokens."""
    first, ms = found[0], "{:,.3f}".format
    return Table(
        f"A batch gathered: {sequences} sequences, blocks of {block_size}, {HEADS} heads of {HEAD_DIM}",
        [
            Column("tokens", "tokens"),
            Column("equal", "equal"),
            Column("token_by_token_ms", "token by token\n(ms)", ms),
            Column("times", "times the\nfewest's", "{:,.1f}".format),
            Column("looked_up_ms", "slots, one\nby one (ms)", ms),
            Column("by_blocks_ms", "slots, whole\nblocks (ms)", ms),
            Column("kept_ms", "slots made\nbefore (ms)", ms),
        ],
        [
            (
                row.tokens,
                Pair(row.tokens, row.num_equal),
                1e3 * row.seconds[ONE_BY_ONE],
                Pair(row.tokens / first.tokens, row.seconds[ONE_BY_ONE] / first.seconds[ONE_BY_ONE]),
                *(1e3 * row.seconds[way] for way in (LOOKED_UP, BY_BLOCKS, KEPT)),
            )
            for row in found
        ],
    )


def _conclusion(last: Gathered) -> str:
    times = last.seconds[ONE_BY_ONE] / last.seconds[BY_BLOCKS]
    return (
        f"By slots {last.tokens:,} tokens take {1e3 * last.seconds[BY_BLOCKS]:.2f} ms, making the slots "
        f"included, token by token {times:,.0f} times as long: what costs is a read for each, more than "
        f"looking it up. All ways agree on {last.num_equal:,} of {last.tokens:,} tokens."
    )


def _picture(found: list[Gathered]) -> Picture:
    a_token = found[0].seconds[ONE_BY_ONE] / found[0].tokens
    predicted = [Point(row.tokens, 1e3 * a_token * row.tokens) for row in found]
    measured = {way: [Point(row.tokens, 1e3 * row.seconds[way]) for row in found] for way in found[0].seconds}
    return Picture(
        title="Keys and values of a batch, gathered",
        x="tokens in the batch",
        y="time (ms)",
        lines=[
            Line(ONE_BY_ONE, predicted, is_predicted=True),
            *(Line(way, points) for way, points in measured.items()),
        ],
        x_base=2,
        y_base=10,
    )


def _int(scalar: mx.array) -> int:
    return cast(int, scalar.item())
