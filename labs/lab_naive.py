"""2.2: How much memory contiguous caches reserve, and how much of it is used.

Every user gets a cache of the maximum sequence length. Predicts from the definition how many bytes the caches
allocate and how many stay empty. Then builds the caches and compares their own figures and MLX's active
memory.

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
    """Bytes allocated, and the bytes of them that hold tokens."""

    allocated: float
    used: float

    @property
    def waste(self) -> float:
        """The share of the allocated bytes that holds no token."""
        return 1 - self.used / self.allocated


class Crowd(NamedTuple):
    """Users, each with a length in tokens, drawn uniformly from shortest to longest; heads of K and V."""

    lengths: list[int]
    shortest: int
    longest: int
    num_heads: int
    head_dim: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a key and a value for each head."""
        return 2 * self.num_heads * self.head_dim * DTYPE.size

    def predict(self, max_seq_len: int) -> Memory:
        """Expected bytes, computed only from the definitions."""
        all_heads = len(self.lengths) * self.bytes_per_token
        return Memory(all_heads * max_seq_len, all_heads * (self.shortest + self.longest) / 2)

    def caches(self, max_seq_len: int) -> Iterator[NaiveKVCache]:
        """Yield a cache for each user, filled to its length; MLX allocates it only when it is evaluated."""
        for length in self.lengths:
            cache = NaiveKVCache(max_seq_len, self.num_heads, self.head_dim, DTYPE)
            tokens = mx.zeros((self.num_heads, length, self.head_dim), DTYPE)
            cache.update(tokens, tokens)
            yield cache

    def reported(self, max_seq_len: int) -> Memory:
        """The bytes that the caches report."""
        sizes = [(cache.allocated_bytes(), cache.used_bytes()) for cache in self.caches(max_seq_len)]
        return Memory(*map(sum, zip(*sizes, strict=True)))

    def active_bytes(self, max_seq_len: int, progress: Progress) -> int:
        """The bytes that all caches together add to MLX's active memory."""
        before, filled = mx.get_active_memory(), []
        for done, cache in enumerate(self.caches(max_seq_len)):
            progress("naive: caches filled:", done, len(self.lengths))
            mx.eval(cache.k_cache, cache.v_cache)
            filled.append(cache)
        progress("naive", len(filled), len(filled))
        return mx.get_active_memory() - before


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=1, help="Users, each with one cache.")] = 16,
    max_seq_len: Annotated[int, typer.Option(min=1, help="Capacity of a cache in tokens.")] = 2048,
    shortest: Annotated[int, typer.Option(min=1, help="Fewest tokens of a user.")] = 100,
    longest: Annotated[int, typer.Option(min=1, help="Most tokens of a user.")] = 500,
    num_heads: Annotated[int, typer.Option(min=1, help="Number of KV heads.")] = 32,
    head_dim: Annotated[int, typer.Option(min=1, help="Dimension of a head.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the users' lengths.")] = 0,
) -> Result:
    """Allocate the caches for `max_seq_len` only; for other limits, use the sizes that they report."""
    if not shortest <= longest <= max_seq_len:
        raise typer.BadParameter(
            f"--shortest {shortest}, --longest {longest}, --max-seq-len {max_seq_len}: give these in "
            "increasing order"
        )
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(users)]
    crowd = Crowd(lengths, shortest, longest, num_heads, head_dim)
    limits = sorted({max_seq_len, *(limit for limit in LIMITS if limit >= longest)})
    found = {limit: crowd.reported(limit) for limit in limits}
    active = crowd.active_bytes(max_seq_len, progress)
    here = found[max_seq_len]
    return Result(
        title="A contiguous cache for each user",
        question="How much of the memory allocated for keys and values is used?",
        tables=[_table_of_bytes(crowd, max_seq_len, here, active), _table_of_limits(crowd, found)],
        conclusion=(
            f"{users} caches allocate {as_bytes(here.allocated)} and use {as_bytes(here.used)} of it: "
            f"{percent(here.waste)} is wasted. A lower limit wastes less, but cuts off longer answers."
        ),
        picture=_picture(crowd, found),
    )


def _table_of_bytes(crowd: Crowd, max_seq_len: int, found: Memory, active: int) -> Table:
    predicted, users = crowd.predict(max_seq_len), len(crowd.lengths)
    per_token = found.used / sum(crowd.lengths)
    return Table(
        f"{users} caches of {max_seq_len:,} tokens, {crowd.num_heads} KV heads of dimension {crowd.head_dim} "
        f"in bfloat16; users have {crowd.shortest} to {crowd.longest} tokens",
        [Column("what", "what"), Column("bytes", "bytes", as_bytes)],
        [
            ("keys and values of one token", Pair(crowd.bytes_per_token, per_token)),
            ("allocated, reported by the caches", Pair(predicted.allocated, found.allocated)),
            ("allocated, reported by MLX", Pair(predicted.allocated, active)),
            ("used", Pair(predicted.used, found.used)),
        ],
    )


def _table_of_limits(crowd: Crowd, found: dict[int, Memory]) -> Table:
    return Table(
        "The same users with other limits",
        [
            Column("max_seq_len", "cache size\n(tokens)"),
            Column("allocated", "allocated", as_bytes),
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
        title=f"Contiguous caches for users of {crowd.shortest} to {crowd.longest} tokens",
        x="capacity of a cache (tokens)",
        y="memory wasted",
        lines=[
            Line(name, [Point(limit, crowd.predict(limit).waste) for limit in found], is_predicted=True),
            Line(name, [Point(limit, memory.waste) for limit, memory in found.items()]),
        ],
        x_base=2,
        y_is_share=True,
    )
