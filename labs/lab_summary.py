"""3.4: What each cache design wastes in the same memory, how many users it serves and what allocation costs.

Users arrive, hold memory for their tokens, and leave. Some user always waits, and users are admitted in order
of arrival. All prompts start with the same tokens, a system prompt. Every design has the same memory:
contiguous caches of the maximum length; blocks on demand, which must be contiguous or may be anywhere; pages;
and pages that store the common prefix once. These are the caches of days 2.2, 2.3, 3.3 and 3.4, with one head
of dimension one, because the shares do not depend on the heads.

\b
pdm run lab summary
pdm run lab summary --common 0 --shortest 20 --longest 2000
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from statistics import fmean, median
from time import perf_counter
from typing import Annotated, NamedTuple, Protocol

import typer
from tiny_llm.dynamic_cache import GlobalAllocator
from tiny_llm.naive_cache import NaiveKVCache

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm import BlockTable, OutOfBlocksError, PrefixCachingKVCache

PREFIX = "system prompt"
WARM_UP = 2  # users that leave before the measurement, as a multiple of the users at the start
COMMONS = 4  # the picture has this many shorter common prefixes
PUBLISHED = "20-38% in use before paging, under 4% wasted with paging"  # for other workloads


def measure(
    progress: Progress,
    shortest: Annotated[int, typer.Option(min=1, help="Fewest tokens of a user.")] = 100,
    longest: Annotated[int, typer.Option(min=1, help="Most tokens of a user.")] = 500,
    common: Annotated[int, typer.Option(min=0, help="Tokens of the common prefix.")] = 100,
    caches: Annotated[int, typer.Option(min=1, help="Contiguous caches that fit into the memory.")] = 16,
    max_seq_len: Annotated[int, typer.Option(min=1, help="Capacity of such a cache in tokens.")] = 2048,
    block_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens in a block.")] = 16,
    turnover: Annotated[int, typer.Option(min=1, help="Users that leave during the measurement.")] = 1500,
    seed: Annotated[int, typer.Option(help="Seed of the lengths and of the users' times.")] = 0,
) -> Result:
    """Serve the same users with every design."""
    if not common <= shortest <= longest <= max_seq_len:
        raise typer.BadParameter(
            f"--common {common}, --shortest {shortest}, --longest {longest}, --max-seq-len {max_seq_len}: "
            "give these in increasing order"
        )
    load = Workload(shortest, longest, common, caches, max_seq_len, block_size, turnover, seed)
    if common == longest or load.blocks(longest) >= load.num_blocks:
        raise typer.BadParameter(
            f"--longest {longest} must be more than --common {common}, and fit into {load.num_blocks - 1} "
            f"blocks of {block_size} tokens, one fewer than the memory has"
        )
    commons = sorted({common * part // COMMONS for part in range(COMMONS)})
    runs = [(kind, load) for kind in DESIGNS] + [(PrefixPages, load._replace(common=c)) for c in commons]
    served = []
    for done, (kind, workload) in enumerate(runs):
        progress("summary: runs:", done, len(runs))
        served.append(_serve(kind(workload), workload))
    progress("summary", len(runs), len(runs))
    found = dict(zip(DESIGNS, served, strict=False))
    sharing = [*zip(commons, served[len(DESIGNS) :], strict=True), (common, found[PrefixPages])]
    return Result(
        title="Cache designs in the same memory",
        question="How many users fit into the memory with each design, when some user always waits?",
        tables=[_table(load, found)],
        conclusion=_conclusion(load, found),
        picture=_picture(load, found, sharing),
    )


class Workload(NamedTuple):
    """Users of all lengths from shortest to longest, whose first `common` tokens are the same.

    The memory holds `caches` caches of `max_seq_len` tokens. turnover: users that leave, one by one.
    """

    shortest: int
    longest: int
    common: int
    caches: int
    max_seq_len: int
    block_size: int
    turnover: int
    seed: int

    @property
    def capacity(self) -> int:
        """Tokens that fit into the memory."""
        return self.caches * self.max_seq_len

    @property
    def num_blocks(self) -> int:
        """Blocks that fit into the memory."""
        return self.capacity // self.block_size

    @property
    def lengths(self) -> range:
        """All lengths; they are equally likely."""
        return range(self.shortest, self.longest + 1)

    @property
    def mean_length(self) -> float:
        """Mean tokens of a user."""
        return (self.shortest + self.longest) / 2

    def deal(self) -> Iterator[int]:
        """Yield lengths in random order, each once before any repeats, so that a short run has their mean."""
        draw = random.Random(self.seed)
        while True:
            yield from draw.sample(self.lengths, len(self.lengths))

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def mean(self, size: Callable[[int], int], power: int = 1) -> float:
        """The mean of size(length) ** power over all lengths."""
        return fmean(size(length) ** power for length in self.lengths)


class Holding(NamedTuple):
    """Users, the token slots allocated to them, and the tokens stored; at one time or on average."""

    users: float
    allocated: float
    stored: float

    @property
    def waste(self) -> float:
        """The share of the allocated slots that is empty."""
        return 1 - self.stored / self.allocated


class Served(NamedTuple):
    """What a design held on average, and the median seconds to allocate a user's memory."""

    held: Holding
    seconds: float

    @property
    def users(self) -> float:
        """How many users ran at once."""
        return self.held.users


# ---- The designs ----


class Design(Protocol):
    """A way to allocate memory to users, by name."""

    name: str

    def __init__(self, load: Workload) -> None: ...

    def allocate(self, user: str, length: int) -> None:
        """Allocate memory for `length` tokens, or raise `OutOfBlocksError` and allocate nothing."""

    def release(self, user: str) -> None:
        """Free a user's memory."""

    def held(self, lengths: Sequence[int]) -> Holding:
        """What all present users, of these lengths, hold."""

    @staticmethod
    def predict(load: Workload) -> Holding | None:
        """Predict what users hold on average; None if there is no formula."""


class Contiguous:
    """A cache of the maximum length for each user, created in advance."""

    name = "contiguous"

    def __init__(self, load: Workload) -> None:
        self._free = [NaiveKVCache(load.max_seq_len, 1, 1) for _ in range(load.caches)]
        self._taken: dict[str, NaiveKVCache] = {}

    def allocate(self, user: str, length: int) -> None:
        """Use the next free cache."""
        if not self._free:
            raise OutOfBlocksError("no cache is free")
        self._taken[user] = self._free.pop()
        self._taken[user].reset()

    def release(self, user: str) -> None:
        """Free the cache."""
        self._free.append(self._taken.pop(user))

    def held(self, lengths: Sequence[int]) -> Holding:
        """The sizes that the caches report: a key and a value of one number each per token."""
        sizes = [cache.allocated_bytes() / 2 / cache.k_cache.itemsize for cache in self._taken.values()]
        return Holding(len(sizes), sum(sizes), sum(lengths))

    @staticmethod
    def predict(load: Workload) -> Holding:
        """All caches are in use."""
        return Holding(load.caches, load.caches * load.max_seq_len, load.caches * load.mean_length)


class Anywhere:
    """Blocks on demand, from anywhere in the pool."""

    name = "blocks anywhere"

    def __init__(self, load: Workload) -> None:
        self._load = load
        self.allocator = GlobalAllocator(load.num_blocks, load.block_size, 1, 1)
        self._blocks: dict[str, list[int]] = {}

    def allocate(self, user: str, length: int) -> None:
        """Allocate any free blocks."""
        self._blocks[user] = self.allocator.alloc_blocks(self._load.blocks(length))

    def release(self, user: str) -> None:
        """Free the blocks."""
        self.allocator.free_blocks_ids(self._blocks.pop(user))

    def held(self, lengths: Sequence[int]) -> Holding:
        """Count the blocks in the users' lists."""
        blocks = sum(map(len, self._blocks.values()))
        return Holding(len(self._blocks), blocks * self._load.block_size, sum(lengths))

    @staticmethod
    def predict(load: Workload) -> Holding | None:
        """All blocks are in use, except for a rest that is too small for the next user."""
        users = _users(load.num_blocks, load, load.blocks)
        allocated = users * load.mean(load.blocks) * load.block_size
        return Holding(users, allocated, users * load.mean_length)


class ContiguousBlocks(Anywhere):
    """Blocks on demand with consecutive ids."""

    name = "contiguous blocks"

    def allocate(self, user: str, length: int) -> None:
        """Allocate the first run of free blocks that is long enough."""
        self._blocks[user] = self.allocator.alloc_contiguous(self._load.blocks(length))

    @staticmethod
    def predict(load: Workload) -> None:
        """There is no formula for how scattered the free blocks become."""


class Pages(Anywhere):
    """Blocks from anywhere, with a block table for each user that kernels read."""

    name = "pages"

    def __init__(self, load: Workload) -> None:
        self._load = load
        self.cache = PrefixCachingKVCache(load.num_blocks, load.block_size, 1, 1)

    def allocate(self, user: str, length: int) -> None:
        """Allocate a block table."""
        self.cache.allocate(user, length)

    def release(self, user: str) -> None:
        """Free the table's blocks."""
        self.cache.free_sequence(user)

    def held(self, lengths: Sequence[int]) -> Holding:
        """Count each block of the tables once, with the most tokens that any table has in it."""
        filled = _filled_blocks(list(self.cache.tables.values()), self._load.block_size)
        return Holding(len(lengths), len(filled) * self._load.block_size, sum(filled.values()))


class PrefixPages(Pages):
    """Pages, with the common prefix stored once."""

    name = "pages, shared prefix"

    def __init__(self, load: Workload) -> None:
        super().__init__(load)
        self.cache.get_or_create_prefix(PREFIX, load.common)

    def allocate(self, user: str, length: int) -> None:
        """Allocate a table that shares the prefix's blocks and adds blocks after them."""
        self.cache.allocate_with_prefix(user, PREFIX, length)

    @staticmethod
    def predict(load: Workload) -> Holding:
        """The prefix is stored once; a user's own blocks start at the first one that it does not fill."""

        def own(length: int) -> int:
            return load.blocks(length) - load.common // load.block_size if length > load.common else 0

        prefix, copied = load.blocks(load.common), load.common % load.block_size
        users = _users(load.num_blocks - prefix, load, own)
        allocated = (prefix + users * load.mean(own)) * load.block_size
        return Holding(users, allocated, load.common + users * (load.mean_length - load.common + copied))


DESIGNS: tuple[type[Design], ...] = (Contiguous, ContiguousBlocks, Anywhere, Pages, PrefixPages)


def _users(num_blocks: int, load: Workload, blocks: Callable[[int], int]) -> float:
    """How many users fit, on average, before the next one does not.

    The number of free blocks is below the next user's need, and all such numbers are equally likely. The
    chance that a user is the next one is proportional to its need. So on average half of (mean square / mean)
    is free, less half a block.
    """
    mean = load.mean(blocks)
    return (num_blocks - (load.mean(blocks, 2) / mean - 1) / 2) / mean


def _filled_blocks(tables: Sequence[BlockTable], block_size: int) -> dict[int, int]:
    """Each block in use, with its number of tokens."""
    filled: dict[int, int] = {}
    for table in tables:
        filled.update(dict.fromkeys(table.blocks[:-1], block_size))
    for table in tables:
        if table.blocks:
            last = table.num_tokens - block_size * (len(table.blocks) - 1)
            filled[table.blocks[-1]] = max(last, filled.get(table.blocks[-1], 0))
    return filled


# ---- The workload ----


def _serve(design: Design, load: Workload) -> Served:
    """Fill the memory, then let users leave one by one and admit the waiting ones."""
    queue, leavers = Queue(load), random.Random(load.seed + 1)
    users = queue.admit(design)
    held: list[Holding] = []
    for left in range(-WARM_UP * len(users), load.turnover):
        leaver = leavers.choice(list(users))
        design.release(leaver)
        del users[leaver]
        users |= queue.admit(design)
        if left >= 0:
            held.append(design.held(list(users.values())))
    return Served(Holding(*map(fmean, zip(*held, strict=True))), median(queue.seconds))


class Queue:
    """Waiting users with their lengths, in order of arrival. seconds: time of each successful allocation."""

    def __init__(self, load: Workload) -> None:
        self.seconds: list[float] = []
        self._next = zip(map(str, count()), load.deal(), strict=False)
        self._first = next(self._next)

    def admit(self, design: Design) -> dict[str, int]:
        """Admit users until the first in the queue does not fit; return the lengths of the admitted users."""
        admitted: dict[str, int] = {}
        while (seconds := _try_to_allocate(design, *self._first)) is not None:
            self.seconds.append(seconds)
            admitted.update([self._first])
            self._first = next(self._next)
        return admitted


def _try_to_allocate(design: Design, user: str, length: int) -> float | None:
    """Return the seconds of the allocation, or None if there was not enough memory."""
    start = perf_counter()
    try:
        design.allocate(user, length)
    except OutOfBlocksError:
        return None
    return perf_counter() - start


def _table(load: Workload, found: Mapping[type[Design], Served]) -> Table:
    rows = []
    for kind, served in found.items():
        predicted, held = kind.predict(load), served.held
        if predicted is None:
            cells: list[Pair | float] = [held.waste, held.stored / load.capacity, held.users]
        else:
            cells = [
                Pair(predicted.waste, held.waste),
                Pair(predicted.stored / load.capacity, held.stored / load.capacity),
                Pair(predicted.users, held.users),
            ]
        rows.append((kind.name, *cells, 1e6 * served.seconds))
    return Table(
        f"Users of {load.shortest} to {load.longest} tokens, {load.common} in common; memory for "
        f"{load.capacity:,} tokens, blocks of {load.block_size} tokens. Published, for other workloads: "
        f"{PUBLISHED}",
        [
            Column("design", "design"),
            Column("waste", "wasted, of\nallocated", percent),
            Column("in_use", "in use, of\nall memory", percent),
            Column("users", "users\nat once", "{:,.1f}".format),
            Column("allocate_us", "time to\nallocate (us)", "{:,.1f}".format),
        ],
        rows,
    )


def _conclusion(load: Workload, found: Mapping[type[Design], Served]) -> str:
    naive, contiguous, pages, shared = (
        found[kind].users for kind in (Contiguous, ContiguousBlocks, Pages, PrefixPages)
    )
    return (
        f"In the memory of {load.caches} caches of {load.max_seq_len:,} tokens, {naive:.0f} users run with "
        f"contiguous caches, {contiguous:.0f} with contiguous blocks and {pages:.0f} with pages: "
        f"{pages / naive:.1f} times as many. If the first {load.common} tokens are stored once, {shared:.0f} "
        f"users run: {shared / naive:.1f} times as many."
    )


def _picture(
    load: Workload, found: Mapping[type[Design], Served], sharing: Sequence[tuple[int, Served]]
) -> Picture:
    """Users at once by the length of the common prefix; it changes only one design."""
    ends = sorted({0, load.common})
    predicted = [
        Point(common, PrefixPages.predict(load._replace(common=common)).users) for common, _ in sharing
    ]
    flat = (kind for kind in DESIGNS if kind is not PrefixPages and kind is not Anywhere)
    return Picture(
        title=f"Users at once in the memory of {load.caches} caches of {load.max_seq_len:,} tokens",
        x="tokens of the common prefix",
        y="users",
        lines=[
            Line(PrefixPages.name, predicted, is_predicted=True),
            Line(PrefixPages.name, [Point(common, served.users) for common, served in sharing]),
            *(Line(kind.name, [Point(end, found[kind].users) for end in ends]) for kind in flat),
        ],
    )
