"""3.3: How one slot number says where a token is stored, and what computing a batch's slots at once saves.

Computes the slot of one token and looks it up in arrays. (A figure of 2,050 is sometimes given for it, which
is a slip: 64 x 32 + 9 x 2 is 2,066.) Then gathers the keys and values of a batch whose sequences grew
alternately, so that their blocks are scattered: token by token, and with one array of slots, which is built
by looking up every token or from whole blocks.

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
STEPS = 4  # batches: with all tokens, a half, a quarter, an eighth
BLOCKS, BLOCK_SIZE, TOKEN = (23, 64, 87), 16, 25  # a sequence's blocks, and its token whose slot is computed
ONE_BY_ONE, LOOKED_UP, BY_BLOCKS, REUSED = (
    "token by token",
    "slots, looked up",
    "slots, whole blocks",
    "slots, reused",
)

KeysValues = tuple[mx.array, mx.array]


def measure(
    progress: Progress,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens in the largest batch.")] = 1000,
    sequences: Annotated[int, typer.Option(min=1, max=512, help="Sequences in each batch.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens in a block.")] = 16,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed gathers of each kind.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the order in which sequences grow.")] = 0,
) -> Result:
    """Compute one slot, then gather batches of growing size."""
    sizes = [tokens >> halvings for halvings in reversed(range(STEPS))]
    batches = [Batch.grown_alternately(size, sequences, block_size, seed) for size in sizes]
    found = [Gathered(size, batch.num_equal(), {}) for size, batch in zip(sizes, batches, strict=True)]
    for done in range(repetitions):
        progress("slots: gathers of each kind:", done, repetitions)
        for batch, row in zip(batches, found, strict=True):
            row.time_all(batch)
    progress("slots", repetitions, repetitions)
    return Result(
        title="Flat slots",
        question="Must every token be looked up in its sequence's block table?",
        tables=[_table_of_one_slot(), _table_of_gathers(found, sequences, block_size)],
        conclusion=_conclusion(found[-1]),
        picture=_picture(found),
    )


# ---- One slot ----


class Place(NamedTuple):
    """A token's slot. predicted: from the definition. measured: from the array or the block table."""

    what: str
    definition: str
    slot: Pair


def _places(block: int, offset: int) -> list[Place]:
    """Slots of a key and a value, in separate arrays and in one of pairs; the arrays hold their indices."""
    count, size = max(BLOCKS) + 1, BLOCK_SIZE
    apart = mx.arange(count * size).reshape(count, size)
    together = mx.arange(count * size * 2).reshape(count, size, 2)  # a key, a value, a key, a value ...
    return [
        Place(
            "key or value, each in its own array",
            f"{block} x {size} + {offset}",
            Pair(block * size + offset, _int(apart[block, offset])),
        ),
        Place(
            "key, in an array of key-value pairs",
            f"{block} x {2 * size} + {offset} x 2",
            Pair(block * 2 * size + 2 * offset, _int(together[block, offset, 0])),
        ),
        Place(
            "value, in an array of key-value pairs",
            f"{block} x {2 * size} + {offset} x 2 + 1",
            Pair(block * 2 * size + 2 * offset + 1, _int(together[block, offset, 1])),
        ),
    ]


def _table_of_one_slot() -> Table:
    index, offset = divmod(TOKEN, BLOCK_SIZE)
    block = BLOCKS[index]
    table = BlockTable(BlockAllocator(max(BLOCKS) + 1), BLOCK_SIZE)
    table.blocks, table.num_tokens = list(BLOCKS), len(BLOCKS) * BLOCK_SIZE
    [looked_up] = table.slots(TOKEN, TOKEN + 1)
    definition = f"slots({TOKEN}, {TOKEN + 1})"
    own = Place("from the block table", definition, Pair(block * BLOCK_SIZE + offset, looked_up))
    shown = ", ".join(map(str, BLOCKS))
    return Table(
        f"Token {TOKEN} of a sequence in blocks {shown} of {BLOCK_SIZE} tokens: {TOKEN} = {index} x "
        f"{BLOCK_SIZE} + {offset}, so it is in block {block} at offset {offset}",
        [Column("what", "slot of"), Column("definition", "definition"), Column("slot", "slot")],
        [*_places(block, offset), own],
    )


# ---- A batch of them ----


class Batch(NamedTuple):
    """A cache, its sequences with their lengths, and the slots of all their tokens."""

    cache: PagedKVCache
    sequences: list[tuple[str, int]]
    slots: mx.array

    @classmethod
    def grown_alternately(cls, tokens: int, sequences: int, block_size: int, seed: int) -> "Batch":
        """Build a batch of `tokens` tokens, divided evenly; random sequences grow by one block at a time."""
        lengths = [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
        order = [i for i, length in enumerate(lengths) for _ in range(-(-length // block_size))]
        random.Random(seed).shuffle(order)
        cache = PagedKVCache(len(order), block_size, HEADS, HEAD_DIM, mx.float16)
        left = list(lengths)
        for i in order:
            count = min(block_size, left[i])
            cache.allocate(str(i), count)
            left[i] -= count
        noise = mx.random.normal((len(order) * block_size, HEADS, HEAD_DIM), key=mx.random.key(seed))
        cache.pool.write(0, mx.arange(len(noise)), noise, -noise)
        named = [(str(i), length) for i, length in enumerate(lengths) if length]
        return cls(cache, named, cache.build_flat_slot_mapping(named))

    def ways(self) -> dict[str, Callable[[], KeysValues]]:
        """Four ways to gather the same keys and values, each [tokens, Hkv, D]."""
        pool, cache = self.cache.pool, self.cache
        return {
            ONE_BY_ONE: self.token_by_token,
            LOOKED_UP: lambda: pool.read(0, self.looked_up_slots()),
            BY_BLOCKS: lambda: pool.read(0, cache.build_flat_slot_mapping(self.sequences)),
            REUSED: lambda: pool.read(0, self.slots),
        }

    def token_by_token(self) -> KeysValues:
        """One block table lookup and one read for every token."""
        pairs = [self.cache.read_blocks(name, i, 1) for name, length in self.sequences for i in range(length)]
        keys, values = (mx.concatenate(list(parts), axis=1) for parts in zip(*pairs, strict=True))
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)

    def looked_up_slots(self) -> mx.array:
        """All slots, looked up in Python one token at a time."""
        tables = [(self.cache.tables[name], length) for name, length in self.sequences]
        return mx.array([slot for table, length in tables for slot in table.slots(0, length)], mx.int32)

    def num_equal(self) -> int:
        """Number of tokens for which all ways give the same key and value; also warms the ways up."""
        first, *others = (gather() for gather in self.ways().values())
        same = mx.array(True)
        for other in others:
            for one, another in zip(first, other, strict=True):
                same = same & mx.all(one == another, axis=(1, 2))
        return _int(mx.sum(same))


class Gathered(NamedTuple):
    """The result for a batch of `tokens` tokens. seconds: the best round of each way."""

    tokens: int
    num_equal: int
    seconds: dict[str, float]

    def time_all(self, batch: Batch) -> None:
        """Run one more round of all ways."""
        for name, gather in batch.ways().items():
            start = perf_counter()
            mx.eval(gather())
            self.seconds[name] = min(perf_counter() - start, self.seconds.get(name, float("inf")))


def _table_of_gathers(found: list[Gathered], sequences: int, block_size: int) -> Table:
    """Predicted: token by token, the time is proportional to the number of tokens."""
    first, ms = found[0], "{:,.3f}".format
    return Table(
        f"Time to gather a batch: {sequences} sequences, blocks of {block_size} tokens, {HEADS} KV heads of "
        f"dimension {HEAD_DIM}. Factors: relative to the smallest batch",
        [
            Column("tokens", "tokens"),
            Column("equal", "equal\ntokens"),
            Column("token_by_token_ms", "token by\ntoken (ms)", ms),
            Column("times", "factor", "{:,.1f}".format),
            Column("looked_up_ms", "slots, looked\nup (ms)", ms),
            Column("by_blocks_ms", "slots, whole\nblocks (ms)", ms),
            Column("reused_ms", "slots,\nreused (ms)", ms),
        ],
        [
            (
                row.tokens,
                Pair(row.tokens, row.num_equal),
                1e3 * row.seconds[ONE_BY_ONE],
                Pair(row.tokens / first.tokens, row.seconds[ONE_BY_ONE] / first.seconds[ONE_BY_ONE]),
                *(1e3 * row.seconds[way] for way in (LOOKED_UP, BY_BLOCKS, REUSED)),
            )
            for row in found
        ],
    )


def _conclusion(last: Gathered) -> str:
    times = last.seconds[ONE_BY_ONE] / last.seconds[BY_BLOCKS]
    return (
        f"Gathering {last.tokens:,} tokens takes {1e3 * last.seconds[BY_BLOCKS]:.2f} ms, including building "
        f"the slots. Token by token takes {times:,.0f} times as long; the separate reads cost more than the "
        f"lookups. All ways agree on {last.num_equal:,} of {last.tokens:,} tokens."
    )


def _picture(found: list[Gathered]) -> Picture:
    a_token = found[0].seconds[ONE_BY_ONE] / found[0].tokens
    predicted = [Point(row.tokens, 1e3 * a_token * row.tokens) for row in found]
    measured = {way: [Point(row.tokens, 1e3 * row.seconds[way]) for row in found] for way in found[0].seconds}
    return Picture(
        title="Time to gather the keys and values of a batch",
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
