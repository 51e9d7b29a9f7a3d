"""2.2: What contiguous caches reserve, and what of it is used.

Every user gets a cache with room for the longest answer that is allowed. Computes from the definition
what that takes and how much of it stays empty, then builds the caches and asks them, and MLX for its live
bytes.

\b
pdm run lab naive
pdm run lab naive --users 64 --max-seq-len 512 --num-heads 8
"""

import random
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import mlx.core as mx
import typer
from tiny_llm.naive_cache import NaiveKVCache

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, as_bytes, percent

DTYPE = mx.bfloat16
LIMITS = (512, 1024, 2048, 4096)


class Memory(NamedTuple):
    """Bytes that are taken, and those of them that hold tokens."""

    allocated: float
    used: float

    @property
    def waste(self) -> float:
        """The share that holds nothing."""
        return 1 - self.used / self.allocated


class Crowd(NamedTuple):
    """Users with a length in tokens each, drawn evenly from shortest to longest; heads of keys and values."""

    lengths: list[int]
    shortest: int
    longest: int
    num_heads: int
    head_dim: int

    @property
    def bytes_per_token(self) -> int:
        """A key and a value for each head."""
        return 2 * self.num_heads * self.head_dim * DTYPE.size

    def predict(self, max_seq_len: int) -> Memory:
        """What they take and use on average, from the definitions alone."""
        all_heads = len(self.lengths) * self.bytes_per_token
        return Memory(all_heads * max_seq_len, all_heads * (self.shortest + self.longest) / 2)

    def caches(self, max_seq_len: int) -> Iterator[NaiveKVCache]:
        """A cache for each, filled to its length; they take no memory until they are evaluated."""
        for length in self.lengths:
            cache = NaiveKVCache(max_seq_len, self.num_heads, self.head_dim, DTYPE)
            tokens = mx.zeros((self.num_heads, length, self.head_dim), DTYPE)
            cache.update(tokens, tokens)
            yield cache

    def ask(self, max_seq_len: int) -> Memory:
        """What the caches themselves say."""
        said = [(cache.allocated_bytes(), cache.used_bytes()) for cache in self.caches(max_seq_len)]
        return Memory(*map(sum, zip(*said, strict=True)))

    def live_bytes(self, max_seq_len: int, progress: Progress) -> int:
        """What all caches together add to the bytes that MLX holds."""
        before, kept = mx.get_active_memory(), []
        for done, cache in enumerate(self.caches(max_seq_len)):
            progress("naive: caches filled:", done, len(self.lengths))
            mx.eval(cache.k_cache, cache.v_cache)
            kept.append(cache)
        progress("naive", len(kept), len(kept))
        return mx.get_active_memory() - before


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=1, help="Caches, one for each user.")] = 16,
    max_seq_len: Annotated[int, typer.Option(min=1, help="Tokens that a cache has room for.")] = 2048,
    shortest: Annotated[int, typer.Option(min=1, help="The least that a user needs, in tokens.")] = 100,
    longest: Annotated[int, typer.Option(min=1, help="The most, in tokens.")] = 500,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads of keys and values.")] = 32,
    head_dim: Annotated[int, typer.Option(min=1, help="Numbers in a head.")] = 128,
    seed: Annotated[int, typer.Option(help="Source of the users' lengths.")] = 0,
) -> Result:
    """Build the caches in memory once, for `max_seq_len`; for other limits their own word is enough."""
    if not shortest <= longest <= max_seq_len:
        raise typer.BadParameter(
            f"--shortest {shortest}, --longest {longest}, --max-seq-len {max_seq_len}: no number may be less "
            "than the one before it"
        )
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(users)]
    crowd = Crowd(lengths, shortest, longest, num_heads, head_dim)
    limits = sorted({max_seq_len, *(limit for limit in LIMITS if limit >= longest)})
    found = {limit: crowd.ask(limit) for limit in limits}
    live = crowd.live_bytes(max_seq_len, progress)
    here = found[max_seq_len]
    return Result(
        title="A contiguous cache for each user",
        asks="How much of the memory that is taken for keys and values holds any?",
        tables=[_table_of_bytes(crowd, max_seq_len, here, live), _table_of_limits(crowd, found)],
        conclusion=(
            f"{users} users take {as_bytes(here.allocated)} and fill {as_bytes(here.used)} of it: "
            f"{percent(here.waste)} is wasted. A lower limit wastes less, and cuts longer answers off."
        ),
        picture=_picture(crowd, found),
    )


def _table_of_bytes(crowd: Crowd, max_seq_len: int, found: Memory, live: int) -> Table:
    predicted, users = crowd.predict(max_seq_len), len(crowd.lengths)
    per_token = found.used / sum(crowd.lengths)
    return Table(
        f"{users} caches of {max_seq_len:,} tokens, {crowd.num_heads} heads of {crowd.head_dim} in bfloat16; "
        f"lengths from {crowd.shortest} to {crowd.longest}",
        [Column("what", "what"), Column("bytes", "bytes", as_bytes)],
        [
            ("one token's keys and values", Pair(crowd.bytes_per_token, per_token)),
            ("taken, say the caches", Pair(predicted.allocated, found.allocated)),
            ("taken, says MLX", Pair(predicted.allocated, live)),
            ("used", Pair(predicted.used, found.used)),
        ],
    )


def _table_of_limits(crowd: Crowd, found: dict[int, Memory]) -> Table:
    return Table(
        "The same users under other limits",
        [
            Column("max_seq_len", "room for\n(tokens)"),
            Column("allocated", "taken", as_bytes),
            Column("waste", "wasted", percent),
        ],
        [
            (
                limit,
                Pair(crowd.predict(limit).allocated, memory.allocated),
                Pair(crowd.predict(limit).waste, memory.waste),
            )
            for limit, memory in found.items()
        ],
    )


def _picture(crowd: Crowd, found: dict[int, Memory]) -> Picture:
    name = f"{len(crowd.lengths)} users"
    return Picture(
        title=f"Contiguous caches, {crowd.shortest} to {crowd.longest} tokens used",
        x="room in each cache (tokens)",
        y="memory wasted",
        lines=[
            Line(name, [Point(limit, crowd.predict(limit).waste) for limit in found], is_predicted=True),
            Line(name, [Point(limit, memory.waste) for limit, memory in found.items()]),
        ],
        x_base=2,
        y_is_share=True,
    )
