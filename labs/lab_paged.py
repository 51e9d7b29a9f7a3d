"""3.1: What paging wastes, whether it refuses a request that would fit, and what allocating a block costs.

Waste: the engine's batch manager, without a model, serves requests that arrive, grow and finish, with blocks
of 1 to 128 tokens. Lengths are exponentially distributed, with means like those of chat data (161 tokens in,
338 out) and instruction data (19 in, 58 out). Refusals: pools that were filled and then half emptied, one for
each seed. Cost: the time to allocate a block by the size of the pool, from a free list and by a search.

\b
pdm run lab paged
pdm run lab paged --users 64 --plot paged.svg
"""

import math
import random
from collections.abc import Callable, Iterator
from statistics import fmean
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from tiny_llm.dynamic_cache import GlobalAllocator

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm import BlockAllocator, BlockTable, OutOfBlocksError, PagedBatchManager, SamplingParams

BLOCK_SIZES = (1, 8, 16, 32, 64, 128)
DECK = 64  # lengths in a deck
WARM_UP, MEASURED = 2, 3  # in mean lifetimes of a request
WANTED = 100  # blocks requested from a pool that was half emptied
POOLS = (1_000, 10_000, 100_000)  # blocks
TIMED = 16  # blocks allocated one by one


class Workload(NamedTuple):
    """Requests with exponentially distributed lengths; the fields are their means in tokens.

    Lengths are dealt from a shuffled deck of the distribution's quantiles, so short runs have its mean too.
    """

    name: str
    mean_prompt: int
    mean_output: int

    @property
    def prompts(self) -> list[int]:
        """A deck of prompt lengths."""
        return _deck(self.mean_prompt)

    @property
    def outputs(self) -> list[int]:
        """A deck of output lengths."""
        return _deck(self.mean_output)

    @property
    def mean_running(self) -> float:
        """Mean tokens of a running request over all steps; in n steps it has 0 to n - 1 output tokens."""
        outputs = self.outputs
        return fmean(self.prompts) + sum(n * (n - 1) / 2 for n in outputs) / sum(outputs)

    def predict_waste(self, block_size: int) -> float:
        """Wasted share if last blocks are half empty on average, as for requests much longer than a block."""
        empty = (block_size - 1) / 2
        return empty / (self.mean_running + empty)


WORKLOADS = (Workload("chat", 161, 338), Workload("instructions", 19, 58))


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=1, help="Requests at a time; a new one follows each.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Pools that are filled and half emptied.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
) -> Result:
    """Serve both workloads with every block size, fill and empty pools, time allocations."""
    wastes = _wastes(users, seed, progress)
    refills = [_refill(seed + i) for i in range(seeds)]
    chat = {block_size: pairs[0].measured for block_size, pairs in wastes.items()}
    short = {block_size: pairs[1].measured for block_size, pairs in wastes.items()}
    enough = [refill for refill in refills if refill.is_enough]
    refused = sum(refill.is_refused for refill in enough)
    return Result(
        title="Paging",
        question="What do blocks that may be anywhere cost in memory, in refused requests and in time?",
        tables=[_table_of_wastes(wastes), _table_of_refills(refills), _table_of_costs()],
        conclusion=(
            f"Chats waste {percent(chat[16])}, {percent(chat[32])} and {percent(chat[128])} of their memory "
            f"with blocks of 16, 32 and 128 tokens. Instructions are short and waste {percent(short[16])} "
            f"with blocks of 16. Of {len(enough)} requests for which enough blocks were free, {refused} were "
            "refused."
        ),
        picture=_picture(wastes),
    )


# ---- Waste ----


def _deck(mean: int) -> list[int]:
    return [max(1, round(-mean * math.log(1 - (card + 0.5) / DECK))) for card in range(DECK)]


def _deal(deck: list[int], draw: random.Random) -> Iterator[int]:
    """Yield the deck's lengths in random order, and shuffle again when they are used up."""
    while True:
        yield from draw.sample(deck, len(deck))


def _wastes(users: int, seed: int, progress: Progress) -> dict[int, list[Pair]]:
    """By block size, for each workload: the share of the token slots in allocated blocks that is empty."""
    found = {}
    for done, block_size in enumerate(BLOCK_SIZES):
        progress("paged: block sizes served:", done, len(BLOCK_SIZES))
        found[block_size] = [
            Pair(load.predict_waste(block_size), _serve(load, block_size, users, seed)) for load in WORKLOADS
        ]
    progress("paged", len(BLOCK_SIZES), len(BLOCK_SIZES))
    return found


def _serve(load: Workload, block_size: int, users: int, seed: int) -> float:
    """The wasted share, over all steps, of a batch manager that always has `users` requests."""
    draw = random.Random(seed)
    prompts, outputs = _deal(load.prompts, draw), _deal(load.outputs, draw)
    pages = users * -(-(max(load.prompts) + max(load.outputs)) // block_size)
    manager = PagedBatchManager(pages, block_size, users, max_batched_tokens=pages * block_size)
    capacity = tokens = arrived = 0
    for step in range((WARM_UP + MEASURED) * load.mean_output):
        while len(manager.running) + len(manager.waiting) < users:
            manager.add_request([0] * next(prompts), str(arrived), SamplingParams(max_tokens=next(outputs)))
            arrived += 1
        ready = list(manager.process_batch())
        if step >= WARM_UP * load.mean_output:
            tables = [sequence.table for sequence in manager.running]
            capacity += block_size * sum(len(table.blocks) for table in tables)
            tokens += sum(table.num_tokens for table in tables)
        manager.commit(dict.fromkeys(ready, 0))
        for seq_id in ready:
            sequence = manager.sequence(seq_id)
            if len(sequence.outputs) == sequence.params.max_tokens:
                manager.finish(seq_id)
    return 1 - tokens / capacity


def _table_of_wastes(wastes: dict[int, list[Pair]]) -> Table:
    means = (f"{load.mean_running:.0f} tokens ({load.name})" for load in WORKLOADS)
    return Table(
        f"Memory wasted in last blocks. Mean lengths of running requests: {', '.join(means)}",
        [
            Column("block_size", "block\n(tokens)"),
            *(Column(load.name, load.name, percent) for load in WORKLOADS),
        ],
        [(block_size, *pairs) for block_size, pairs in wastes.items()],
    )


def _picture(wastes: dict[int, list[Pair]]) -> Picture:
    lines = []
    for place, load in enumerate(WORKLOADS):
        pairs = {block_size: found[place] for block_size, found in wastes.items()}
        predicted = [Point(block_size, pair.predicted) for block_size, pair in pairs.items()]
        measured = [Point(block_size, pair.measured) for block_size, pair in pairs.items()]
        name = f"{load.name} ({load.mean_prompt} in, {load.mean_output} out)"
        lines += [Line(name, predicted, is_predicted=True), Line(name, measured)]
    return Picture(
        title="Memory wasted in partly filled last blocks",
        x="block size (tokens)",
        y="memory wasted",
        lines=lines,
        x_base=2,
        y_is_share=True,
    )


# ---- Refusals ----


class Refill(NamedTuple):
    """A request for 100 blocks from a pool that was half emptied. longest_run: of free blocks."""

    is_enough: bool
    is_refused: bool
    longest_run: int


def _refill(seed: int) -> Refill:
    """In 200 blocks of 16: up to 15 users of 50 to 300 tokens arrive, 7 leave, then one needs 100 blocks."""
    draw, allocator = random.Random(seed), BlockAllocator(2 * WANTED)
    tables: list[BlockTable] = []
    for length in (draw.randint(50, 300) for _ in range(15)):
        table = BlockTable(allocator, 16)
        if table.blocks_to_append(length) <= allocator.num_free:
            table.append_tokens(length)
            tables.append(table)
    draw.shuffle(tables)
    for _ in range(7):
        tables.pop().release()
    held = {block for table in tables for block in table.blocks}
    is_enough, is_refused = allocator.num_free >= WANTED, False
    try:
        BlockTable(allocator, 16).append_tokens(16 * WANTED)
    except OutOfBlocksError:
        is_refused = True
    return Refill(is_enough, is_refused, _longest_run(set(range(allocator.num_blocks)) - held))


def _longest_run(free: set[int]) -> int:
    longest = run = 0
    for block in range(2 * WANTED):
        run = run + 1 if block in free else 0
        longest = max(longest, run)
    return longest


def _table_of_refills(refills: list[Refill]) -> Table:
    rows = []
    for is_enough, name in ((True, f"{WANTED} or more"), (False, "fewer")):
        found = [refill for refill in refills if refill.is_enough == is_enough]
        scattered = sum(refill.longest_run < WANTED for refill in found)
        refused = sum(refill.is_refused for refill in found)
        rows.append((name, len(found), Pair(0 if is_enough else len(found), refused), scattered))
    return Table(
        f"A request for {WANTED} blocks from a pool of {2 * WANTED}, in which up to 15 sequences were stored "
        "and 7 of them released",
        [
            Column("free", "free blocks"),
            Column("pools", "pools"),
            Column("refused", "refused"),
            Column("no_run", f"pools without\n{WANTED} contiguous"),
        ],
        rows,
    )


# ---- Cost ----


def _table_of_costs() -> Table:
    """Predicted: a free list does not depend on the pool; a search from the start is proportional to it."""
    pages = {pool: _seconds_per_page(pool) for pool in POOLS}
    runs = {pool: _seconds_per_run(pool) for pool in POOLS}
    us, factor = "{:,.2f}".format, "{:,.1f}".format
    return Table(
        f"Time to allocate a block when all except the last {TIMED} are in use: from the free list of the "
        "pages, and by a search for a free run. Factors: relative to the smallest pool",
        [
            Column("pool", "pool\n(blocks)"),
            Column("page_us", "free list\n(us)", us),
            Column("page_times", "factor", factor),
            Column("search_us", "search\n(us)", us),
            Column("search_times", "factor", factor),
        ],
        [
            (
                pool,
                1e6 * pages[pool],
                Pair(1, pages[pool] / pages[POOLS[0]]),
                1e6 * runs[pool],
                Pair(pool / POOLS[0], runs[pool] / runs[POOLS[0]]),
            )
            for pool in POOLS
        ],
    )


def _seconds_per_page(pool: int) -> float:
    allocator = BlockAllocator(pool)
    BlockTable(allocator, 1).append_tokens(pool - TIMED)

    def take() -> Callable[[], None]:
        table = BlockTable(allocator, 1)
        for _ in range(TIMED):
            table.append_tokens(1)
        return table.release

    return _best(take)


def _seconds_per_run(pool: int) -> float:
    allocator = GlobalAllocator(pool, 1, 1, 1)
    allocator.alloc_contiguous(pool - TIMED)

    def take() -> Callable[[], None]:
        blocks = [allocator.alloc_contiguous(1)[0] for _ in range(TIMED)]
        return lambda: allocator.free_blocks_ids(blocks)

    return _best(take)


def _best(take: Callable[[], Callable[[], None]], repetitions: int = 5) -> float:
    """Seconds per block, best of several runs.

    take: allocates `TIMED` blocks and returns a function that frees them.
    """
    seconds = []
    for _ in range(repetitions):
        start = perf_counter()
        release = take()
        seconds.append(perf_counter() - start)
        release()
    return min(seconds) / TIMED
