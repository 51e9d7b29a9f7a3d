"""2.3: What blocks on demand save, and what free blocks are worth that must lie side by side.

Users come, hold the blocks that their tokens need, and go, under loads from light to too heavy. Counted
by how full the pool is: requests that are refused although enough blocks are free, where a user's blocks
must lie side by side and where they may lie anywhere. Knuth's fifty-percent rule predicts the gaps: half
as many as there are users (The Art of Computer Programming, volume 1, section 2.5).

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
LOADS = (0.5, 0.7, 0.9, 1.1, 1.5)  # blocks that would be held if all were admitted, over those of the pool
BINS = 10
FEWEST = 30  # requests in a bin, for their share to be worth showing


def measure(
    progress: Progress,
    pool: Annotated[int, typer.Option(min=64, help="Blocks in the pool.")] = 512,
    block_size: Annotated[int, typer.Option(min=1, max=64, help="Tokens in a block.")] = 16,
    requests: Annotated[int, typer.Option(min=200, help="Requests in each run.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at each load.")] = 2,
    seed: Annotated[int, typer.Option(help="Source of lengths and of who leaves when.")] = 0,
) -> Result:
    """Fill blocks on demand; then the same stream of requests to both ways of taking blocks."""
    if pool * block_size < 4 * LONGEST:
        raise typer.BadParameter(f"{pool} blocks of {block_size} tokens do not hold four users of {LONGEST}")
    runs = [Run(pool, block_size, requests, load, seed + i) for load in LOADS for i in range(seeds)]
    side_by_side, anywhere = Fullness(), Fullness()
    for done, run in enumerate(runs):
        progress("dynamic: runs:", done, len(runs))
        _come_and_go(run, side_by_side, must_be_contiguous=True)
        _come_and_go(run, anywhere, must_be_contiguous=False)
    progress("dynamic", len(runs), len(runs))
    shown = [place for place in range(BINS) if _is_worth_showing(side_by_side, anywhere, place)]
    worst, ever = side_by_side.bins[shown[-1]], sum(bin.refused for bin in anywhere.bins)
    total = sum(bin.requests for bin in anywhere.bins)
    return Result(
        title="Blocks on demand",
        asks="Enough blocks are free, but scattered: can a request have them?",
        tables=[_table_of_waste(block_size, seed), _table_of_refusals(side_by_side, anywhere, shown)],
        conclusion=(
            f"Enough blocks were free, yet of the requests to a pool {_range(shown[-1])} full "
            f"{percent(worst.refused_share)} were refused where blocks must lie side by side. Where they may "
            f"lie anywhere: {ever} of {total:,}, however full the pool."
        ),
        picture=_picture(side_by_side, anywhere, shown),
    )


class Run(NamedTuple):
    """One stream of requests, the same for the same seed."""

    pool: int
    block_size: int
    requests: int
    load: float
    seed: int


@dataclass
class Bin:
    """Requests that met a pool about as full, with enough free blocks. users, gaps: summed over them."""

    requests: int = 0
    refused: int = 0
    users: int = 0
    gaps: int = 0

    @property
    def refused_share(self) -> float:
        """Of the requests."""
        return self.refused / self.requests


@dataclass
class Fullness:
    """What happened, by how full the pool was: bin i is about i to i + 1 tenths."""

    bins: list[Bin] = field(default_factory=lambda: [Bin() for _ in range(BINS)])


def _come_and_go(run: Run, found: Fullness, *, must_be_contiguous: bool) -> None:
    """A request at a time. All users leave with one chance, so that they would hold `load` of the pool."""
    draw = random.Random(run.seed)
    allocator = GlobalAllocator(run.pool, run.block_size, 1, 1)
    take = allocator.alloc_contiguous if must_be_contiguous else allocator.alloc_blocks
    stay = run.load * run.pool * run.block_size / ((SHORTEST + LONGEST) / 2)
    users: list[Sequence[int]] = []
    for _ in range(run.requests):
        users = [blocks for blocks in users if not _leaves(blocks, allocator, draw.random() < 1 / stay)]
        wanted = -(-draw.randint(SHORTEST, LONGEST) // run.block_size)
        if wanted > len(allocator.free_blocks):
            continue  # the pool is full, and no way of taking blocks could help
        met = found.bins[BINS * (run.pool - len(allocator.free_blocks)) // run.pool]
        met.requests += 1
        met.users += len(users)
        met.gaps += _gaps(allocator)
        try:
            users.append(take(wanted))
        except OutOfBlocksError:
            met.refused += 1


def _leaves(blocks: Sequence[int], allocator: GlobalAllocator, wants_to: bool) -> bool:
    if wants_to:
        allocator.free_blocks_ids(blocks)
    return wants_to


def _gaps(allocator: GlobalAllocator) -> int:
    """Runs of free blocks, each counted at its first."""
    free = set(allocator.free_blocks)
    return sum(block - 1 not in free for block in free)


def _is_worth_showing(one: Fullness, other: Fullness, place: int) -> bool:
    return min(one.bins[place].requests, other.bins[place].requests) >= FEWEST


def _range(place: int) -> str:
    return f"{100 * place // BINS}-{100 * (place + 1) // BINS}%"


def _table_of_waste(block_size: int, seed: int) -> Table:
    """Users who take blocks for their tokens as they come, and none for what may come."""
    users, draw = 100, random.Random(seed)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(users)]
    allocator = GlobalAllocator(users * -(-LONGEST // block_size), block_size, 1, 1)
    caches = [DynamicKVCache(allocator, str(user)) for user in range(users)]
    for cache, length in zip(caches, lengths, strict=True):
        cache.allocate_for_prompt(length)
    taken = block_size * sum(len(cache.blocks) for cache in caches)
    mean, empty = (SHORTEST + LONGEST) / 2, (block_size - 1) / 2
    return Table(
        f"Room taken for {users} users of {SHORTEST} to {LONGEST} tokens: half of the last block stays empty",
        [
            Column("block_size", "block\n(tokens)"),
            Column("used", "tokens", "{:,.0f}".format),
            Column("taken", "room\n(tokens)", "{:,.0f}".format),
            Column("waste", "wasted", percent),
        ],
        [
            (
                block_size,
                Pair(users * mean, sum(lengths)),
                Pair(users * (mean + empty), taken),
                Pair(empty / (mean + empty), 1 - sum(lengths) / taken),
            )
        ],
    )


def _table_of_refusals(side_by_side: Fullness, anywhere: Fullness, shown: list[int]) -> Table:
    rows = []
    for place in shown:
        run, scattered = side_by_side.bins[place], anywhere.bins[place]
        gaps = Pair(run.users / 2 / run.requests, run.gaps / run.requests)
        refused = Pair(0, scattered.refused_share)
        rows.append((_range(place), run.requests, gaps, run.refused_share, scattered.requests, refused))
    return Table(
        "Requests for which enough blocks were free, by how full the pool was",
        [
            Column("full", "pool full"),
            Column("requests", "side by side:\nrequests"),
            Column("gaps", "gaps", "{:.1f}".format),
            Column("refused", "refused", percent),
            Column("requests_anywhere", "anywhere:\nrequests"),
            Column("refused_anywhere", "refused", percent),
        ],
        rows,
    )


def _picture(side_by_side: Fullness, anywhere: Fullness, shown: list[int]) -> Picture:
    ways = {"side by side": side_by_side, "anywhere": anywhere}
    return Picture(
        title="Refused although enough blocks were free",
        x="share of the pool that is taken",
        y="requests refused",
        lines=[
            Line(name, [Point((place + 0.5) / BINS, found.bins[place].refused_share) for place in shown])
            for name, found in ways.items()
        ],
        x_is_share=True,
        y_is_share=True,
    )
