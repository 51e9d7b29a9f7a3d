"""2.3: What allocating blocks on demand saves, and what it costs if they must be contiguous.

Users arrive, hold the blocks that their tokens need, and leave, under loads from light to too heavy. For each
level of the pool's usage, counts the requests that are refused although enough blocks are free, once with
blocks that must be contiguous and once with blocks that may be anywhere. Knuth's fifty-percent rule
predicts the number of gaps: half the number of users (The Art of Computer Programming, volume 1, section
2.5).

\b
pdm run lab dynamic
pdm run lab dynamic --pool 256 --plot dynamic.svg
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import typer
from tiny_llm.dynamic_cache import DynamicKVCache, GlobalAllocator
from tiny_llm.errors import OutOfBlocksError

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent

SHORTEST, LONGEST = 100, 500  # tokens of a user
LOADS = (0.5, 0.7, 0.9, 1.1, 1.5)  # blocks held if all requests were admitted, divided by the pool's blocks
BINS = 10
FEWEST = 30  # a bin with fewer requests is not shown


def measure(
    progress: Progress,
    pool: Annotated[int, typer.Option(min=64, help="Blocks in the pool.")] = 512,
    block_size: Annotated[int, typer.Option(min=1, max=64, help="Tokens in a block.")] = 16,
    requests: Annotated[int, typer.Option(min=200, help="Requests in each run.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at each load.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the lengths and of the users' times.")] = 0,
) -> Result:
    """Allocate blocks on demand, then serve the same requests with both ways of allocating blocks."""
    if pool * block_size < 4 * LONGEST:
        raise typer.BadParameter(f"{pool} blocks of {block_size} do not hold four users of {LONGEST} tokens")
    runs = [Run(pool, block_size, requests, load, seed + i) for load in LOADS for i in range(seeds)]
    contiguous, anywhere = Fullness(), Fullness()
    for done, run in enumerate(runs):
        progress("dynamic: runs:", done, len(runs))
        _serve(run, contiguous, must_be_contiguous=True)
        _serve(run, anywhere, must_be_contiguous=False)
    progress("dynamic", len(runs), len(runs))
    shown = [place for place in range(BINS) if _is_worth_showing(contiguous, anywhere, place)]
    worst, refused = contiguous.bins[shown[-1]], sum(level.refused for level in anywhere.bins)
    total = sum(level.requests for level in anywhere.bins)
    return Result(
        title="Blocks on demand",
        question="Enough blocks are free, but they are scattered. Can a request use them?",
        tables=[_table_of_waste(block_size, seed), _table_of_refusals(contiguous, anywhere, shown)],
        conclusion=(
            f"Enough blocks were free for every counted request. If blocks must be contiguous, a pool that "
            f"was {_range(shown[-1])} full refused {percent(worst.refused_share)} of its requests. If blocks "
            f"may be anywhere, pools refused {refused} of {total:,} requests, however full they were."
        ),
        picture=_picture(contiguous, anywhere, shown),
    )


class Run(NamedTuple):
    """One sequence of requests, the same for the same seed."""

    pool: int
    block_size: int
    requests: int
    load: float
    seed: int


@dataclass
class Bin:
    """Requests that found the pool equally full and enough blocks free. users, gaps: sums over them."""

    requests: int = 0
    refused: int = 0
    users: int = 0
    gaps: int = 0

    @property
    def refused_share(self) -> float:
        """The share of the requests that was refused."""
        return self.refused / self.requests


@dataclass
class Fullness:
    """Counts by how full the pool was: bin i is from i to i + 1 tenths."""

    bins: list[Bin] = field(default_factory=lambda: [Bin() for _ in range(BINS)])


def _serve(run: Run, found: Fullness, *, must_be_contiguous: bool) -> None:
    """Serve one request at a time. The chance that a user leaves is such that the mean load is `load`."""
    draw = random.Random(run.seed)
    allocator = GlobalAllocator(run.pool, run.block_size, 1, 1)
    take = allocator.alloc_contiguous if must_be_contiguous else allocator.alloc_blocks
    stay = run.load * run.pool * run.block_size / ((SHORTEST + LONGEST) / 2)
    users: list[Sequence[int]] = []
    for _ in range(run.requests):
        users = [blocks for blocks in users if not _leaves(blocks, allocator, draw.random() < 1 / stay)]
        needed = -(-draw.randint(SHORTEST, LONGEST) // run.block_size)
        if needed > len(allocator.free_blocks):
            continue  # too few blocks are free, wherever they are
        level = found.bins[BINS * (run.pool - len(allocator.free_blocks)) // run.pool]
        level.requests += 1
        level.users += len(users)
        level.gaps += _gaps(allocator)
        try:
            users.append(take(needed))
        except OutOfBlocksError:
            level.refused += 1


def _leaves(blocks: Sequence[int], allocator: GlobalAllocator, is_leaving: bool) -> bool:
    if is_leaving:
        allocator.free_blocks_ids(blocks)
    return is_leaving


def _gaps(allocator: GlobalAllocator) -> int:
    """Number of runs of free blocks."""
    free = set(allocator.free_blocks)
    return sum(block - 1 not in free for block in free)


def _is_worth_showing(one: Fullness, other: Fullness, place: int) -> bool:
    return min(one.bins[place].requests, other.bins[place].requests) >= FEWEST


def _range(place: int) -> str:
    return f"{100 * place // BINS}-{100 * (place + 1) // BINS}%"


def _table_of_waste(block_size: int, seed: int) -> Table:
    """Users that allocate blocks for their present tokens, and none for later ones."""
    users, draw = 100, random.Random(seed)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(users)]
    allocator = GlobalAllocator(users * -(-LONGEST // block_size), block_size, 1, 1)
    caches = [DynamicKVCache(allocator, str(user)) for user in range(users)]
    for cache, length in zip(caches, lengths, strict=True):
        cache.allocate_for_prompt(length)
    allocated = block_size * sum(len(cache.blocks) for cache in caches)
    mean, empty = (SHORTEST + LONGEST) / 2, (block_size - 1) / 2
    return Table(
        f"{users} users of {SHORTEST} to {LONGEST} tokens; predicted: half of each last block stays empty",
        [
            Column("block_size", "block\n(tokens)"),
            Column("used", "used\n(tokens)", "{:,.0f}".format),
            Column("allocated", "allocated\n(tokens)", "{:,.0f}".format),
            Column("waste", "wasted", percent),
        ],
        [
            (
                block_size,
                Pair(users * mean, sum(lengths)),
                Pair(users * (mean + empty), allocated),
                Pair(empty / (mean + empty), 1 - sum(lengths) / allocated),
            )
        ],
    )


def _table_of_refusals(contiguous: Fullness, anywhere: Fullness, shown: list[int]) -> Table:
    rows = []
    for place in shown:
        run, scattered = contiguous.bins[place], anywhere.bins[place]
        gaps = Pair(run.users / 2 / run.requests, run.gaps / run.requests)
        refused = Pair(0, scattered.refused_share)
        rows.append((_range(place), run.requests, gaps, run.refused_share, scattered.requests, refused))
    return Table(
        "Requests for which enough blocks were free, by how full the pool was; gaps: runs of free blocks",
        [
            Column("full", "pool full"),
            Column("requests", "requests,\ncontiguous"),
            Column("gaps", "gaps", "{:.1f}".format),
            Column("refused", "refused", percent),
            Column("requests_anywhere", "requests,\nanywhere"),
            Column("refused_anywhere", "refused", percent),
        ],
        rows,
    )


def _picture(contiguous: Fullness, anywhere: Fullness, shown: list[int]) -> Picture:
    ways = {"contiguous": contiguous, "anywhere": anywhere}
    return Picture(
        title="Refused although enough blocks were free",
        x="share of the pool in use",
        y="requests refused",
        lines=[
            Line(name, [Point((place + 0.5) / BINS, found.bins[place].refused_share) for place in shown])
            for name, found in ways.items()
        ],
        x_is_share=True,
        y_is_share=True,
    )
