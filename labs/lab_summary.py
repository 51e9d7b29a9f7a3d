"""3.4: Four designs under one workload: what they waste, how many they serve, what their room costs.

Users come, hold room for their tokens, and go; somebody always waits, and the first in line is served first.
All of them begin with the same tokens, a system prompt. Every design has the same bytes: contiguous caches of
the longest length; blocks on demand that must lie side by side, or may lie anywhere; pages; pages whose
common beginning is stored once. These are the caches of days 2.2, 2.3, 3.3 and 3.4, with one head of one
number each: shares do not depend on heads.

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
WARM_UP = 2  # times the users that are there at first leave before anything is measured
COMMONS = 4  # parts that the common beginning is divided into, for the picture
PUBLISHED = "20-38% in use before paging, under 4% wasted with it"  # on other workloads


def measure(
    progress: Progress,
    shortest: Annotated[int, typer.Option(min=1, help="The least that a user needs, in tokens.")] = 100,
    longest: Annotated[int, typer.Option(min=1, help="The most, in tokens.")] = 500,
    common: Annotated[int, typer.Option(min=0, help="Tokens that all users begin with.")] = 100,
    caches: Annotated[int, typer.Option(min=1, help="Contiguous caches that fit into the bytes.")] = 16,
    max_seq_len: Annotated[int, typer.Option(min=1, help="Tokens that such a cache has room for.")] = 2048,
    block_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens in a block.")] = 16,
    turnover: Annotated[int, typer.Option(min=1, help="Users that leave while it is measured.")] = 1500,
    seed: Annotated[int, typer.Option(help="Source of lengths and of who leaves when.")] = 0,
) -> Result:
    """Put the same stream of users through every design."""
    if not common <= shortest <= longest <= max_seq_len:
        raise typer.BadParameter(
            f"--common {common}, --shortest {shortest}, --longest {longest}, --max-seq-len {max_seq_len}: no "
            "number may be less than the one before it"
        )
    load = Workload(shortest, longest, common, caches, max_seq_len, block_size, turnover, seed)
    if common == longest or load.blocks(longest) >= load.num_blocks:
        raise typer.BadParameter(
            f"--longest {longest} must be more than --common {common}, and leave a block of the room for "
            f"{load.room} tokens"
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
        title="Four designs in the same bytes",
        asks="What do keys and values cost under each design, when somebody always waits?",
        tables=[_table(load, found)],
        conclusion=_conclusion(load, found),
        picture=_picture(load, found, sharing),
    )


class Workload(NamedTuple):
    """Users of all lengths from shortest to longest, who all begin with `common` tokens.

    The bytes have room for `caches` of `max_seq_len` tokens. turnover: users that leave, one by one.
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
    def room(self) -> int:
        """Tokens that fit into the bytes."""
        return self.caches * self.max_seq_len

    @property
    def num_blocks(self) -> int:
        """Blocks that fit into them."""
        return self.room // self.block_size

    @property
    def lengths(self) -> range:
        """All lengths, one as likely as another."""
        return range(self.shortest, self.longest + 1)

    @property
    def mean_length(self) -> float:
        """Tokens of a user."""
        return (self.shortest + self.longest) / 2

    def deal(self) -> Iterator[int]:
        """Lengths in random order, each once before any comes again: so that a short run has their mean."""
        draw = random.Random(self.seed)
        while True:
            yield from draw.sample(self.lengths, len(self.lengths))

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.block_size)

    def mean(self, size: Callable[[int], int], power: int = 1) -> float:
        """The mean over all lengths of a size, to a power."""
        return fmean(size(length) ** power for length in self.lengths)


class Holding(NamedTuple):
    """What is held, or is on average: users, the tokens that their room has, the tokens that are stored."""

    users: float
    taken: float
    stored: float

    @property
    def waste(self) -> float:
        """The share of what is taken that holds nothing."""
        return 1 - self.stored / self.taken


class Served(NamedTuple):
    """What a design held on average, and the seconds that a user's room took to take."""

    held: Holding
    seconds: float

    @property
    def users(self) -> float:
        """How many ran at once."""
        return self.held.users


# ---- The designs ----


class Design(Protocol):
    """A way to take room, by the name of who takes it."""

    name: str

    def __init__(self, load: Workload) -> None: ...

    def take(self, user: str, length: int) -> None:
        """Room for so many tokens. Raises `OutOfBlocksError`, and takes none, where there is too little."""

    def give_back(self, user: str) -> None:
        """A user's room is free."""

    def held(self, lengths: Sequence[int]) -> Holding:
        """What users of these lengths, who are all that there are, hold."""

    @staticmethod
    def predict(load: Workload) -> Holding | None:
        """What they hold on average; None where no definition says."""


class Contiguous:
    """A cache of the longest length for each, made before anybody comes."""

    name = "contiguous"

    def __init__(self, load: Workload) -> None:
        self._free = [NaiveKVCache(load.max_seq_len, 1, 1) for _ in range(load.caches)]
        self._taken: dict[str, NaiveKVCache] = {}

    def take(self, user: str, length: int) -> None:
        """The next free cache."""
        if not self._free:
            raise OutOfBlocksError("no cache is free")
        self._taken[user] = self._free.pop()
        self._taken[user].reset()

    def give_back(self, user: str) -> None:
        """The cache is free."""
        self._free.append(self._taken.pop(user))

    def held(self, lengths: Sequence[int]) -> Holding:
        """Every cache says what it takes: keys and values, of one number each."""
        sizes = [cache.allocated_bytes() / 2 / cache.k_cache.itemsize for cache in self._taken.values()]
        return Holding(len(sizes), sum(sizes), sum(lengths))

    @staticmethod
    def predict(load: Workload) -> Holding:
        """All caches are taken."""
        return Holding(load.caches, load.caches * load.max_seq_len, load.caches * load.mean_length)


class Anywhere:
    """Blocks on demand, wherever they are free."""

    name = "blocks anywhere"

    def __init__(self, load: Workload) -> None:
        self._load = load
        self.allocator = GlobalAllocator(load.num_blocks, load.block_size, 1, 1)
        self._blocks: dict[str, list[int]] = {}

    def take(self, user: str, length: int) -> None:
        """Any blocks that are free."""
        self._blocks[user] = self.allocator.alloc_blocks(self._load.blocks(length))

    def give_back(self, user: str) -> None:
        """The blocks are free."""
        self.allocator.free_blocks_ids(self._blocks.pop(user))

    def held(self, lengths: Sequence[int]) -> Holding:
        """Blocks, by the users' lists."""
        blocks = sum(map(len, self._blocks.values()))
        return Holding(len(self._blocks), blocks * self._load.block_size, sum(lengths))

    @staticmethod
    def predict(load: Workload) -> Holding | None:
        """All blocks are taken but those that are too few for the next in line."""
        users = _users(load.num_blocks, load, load.blocks)
        taken = users * load.mean(load.blocks) * load.block_size
        return Holding(users, taken, users * load.mean_length)


class SideBySide(Anywhere):
    """Blocks on demand whose ids follow each other."""

    name = "blocks side by side"

    def take(self, user: str, length: int) -> None:
        """The first run of free blocks that is long enough."""
        self._blocks[user] = self.allocator.alloc_contiguous(self._load.blocks(length))

    @staticmethod
    def predict(load: Workload) -> None:
        """How scattered the free blocks become, no definition says."""


class Pages(Anywhere):
    """Blocks anywhere, with a table for each user that kernels read through."""

    name = "pages"

    def __init__(self, load: Workload) -> None:
        self._load = load
        self.cache = PrefixCachingKVCache(load.num_blocks, load.block_size, 1, 1)

    def take(self, user: str, length: int) -> None:
        """A table of its own."""
        self.cache.allocate(user, length)

    def give_back(self, user: str) -> None:
        """The table's blocks go back."""
        self.cache.free_sequence(user)

    def held(self, lengths: Sequence[int]) -> Holding:
        """Blocks by what the tables hold, each counted once, and the tokens of whoever fills it furthest."""
        filled = _filled_blocks(list(self.cache.tables.values()), self._load.block_size)
        return Holding(len(lengths), len(filled) * self._load.block_size, sum(filled.values()))


class PrefixPages(Pages):
    """Pages, and the tokens that all begin with in the pool once."""

    name = "pages, shared prefix"

    def __init__(self, load: Workload) -> None:
        super().__init__(load)
        self.cache.get_or_create_prefix(PREFIX, load.common)

    def take(self, user: str, length: int) -> None:
        """The prefix's blocks, and own ones behind them."""
        self.cache.allocate_with_prefix(user, PREFIX, length)

    @staticmethod
    def predict(load: Workload) -> Holding:
        """The prefix once; own blocks from the first that is not full of it."""

        def own(length: int) -> int:
            return load.blocks(length) - load.common // load.block_size if length > load.common else 0

        prefix, copied = load.blocks(load.common), load.common % load.block_size
        users = _users(load.num_blocks - prefix, load, own)
        taken = (prefix + users * load.mean(own)) * load.block_size
        return Holding(users, taken, load.common + users * (load.mean_length - load.common + copied))


DESIGNS: tuple[type[Design], ...] = (Contiguous, SideBySide, Anywhere, Pages, PrefixPages)


def _users(num_blocks: int, load: Workload, blocks: Callable[[int], int]) -> float:
    """How many fit, on average, until the next in line does not.

    What they leave free is any number below what the next one needs, and whom it is not enough for is the
    likelier the more he needs: on average it is half of the mean square over the mean, less half a block.
    """
    mean = load.mean(blocks)
    return (num_blocks - (load.mean(blocks, 2) / mean - 1) / 2) / mean


def _filled_blocks(tables: Sequence[BlockTable], block_size: int) -> dict[int, int]:
    """Each held block with its tokens."""
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
    """Fill the room, then let users leave one by one, and whoever waits come."""
    queue, leavers = Queue(load), random.Random(load.seed + 1)
    users = queue.let_in(design)
    held: list[Holding] = []
    for left in range(-WARM_UP * len(users), load.turnover):
        leaver = leavers.choice(list(users))
        design.give_back(leaver)
        del users[leaver]
        users |= queue.let_in(design)
        if left >= 0:
            held.append(design.held(list(users.values())))
    return Served(Holding(*map(fmean, zip(*held, strict=True))), median(queue.seconds))


class Queue:
    """Who waits: users with a length each, the first in line first. seconds: that each one's room took."""

    def __init__(self, load: Workload) -> None:
        self.seconds: list[float] = []
        self._next = zip(map(str, count()), load.deal(), strict=False)
        self._first = next(self._next)

    def let_in(self, design: Design) -> dict[str, int]:
        """All whom there is room for, until it is too little for the first in line; their lengths."""
        came: dict[str, int] = {}
        while (took := _try_to_take(design, *self._first)) is not None:
            self.seconds.append(took)
            came.update([self._first])
            self._first = next(self._next)
        return came


def _try_to_take(design: Design, user: str, length: int) -> float | None:
    """The seconds that it took, None where there was too little room."""
    start = perf_counter()
    try:
        design.take(user, length)
    except OutOfBlocksError:
        return None
    return perf_counter() - start


def _table(load: Workload, found: Mapping[type[Design], Served]) -> Table:
    rows = []
    for kind, served in found.items():
        predicted, held = kind.predict(load), served.held
        if predicted is None:
            cells: list[Pair | float] = [held.waste, held.stored / load.room, held.users]
        else:
            cells = [
                Pair(predicted.waste, held.waste),
                Pair(predicted.stored / load.room, held.stored / load.room),
                Pair(predicted.users, held.users),
            ]
        rows.append((kind.name, *cells, 1e6 * served.seconds))
    return Table(
        f"Lengths from {load.shortest} to {load.longest}, of which {load.common} in common; room for "
        f"{load.room:,} tokens, blocks of {load.block_size}. Published, on other workloads: {PUBLISHED}",
        [
            Column("design", "design"),
            Column("waste", "of what is\ntaken, wasted", percent),
            Column("in_use", "of all room,\nin use", percent),
            Column("users", "users\nat once", "{:,.1f}".format),
            Column("take_us", "taking a user's\nroom (us)", "{:,.1f}".format),
        ],
        rows,
    )


def _conclusion(load: Workload, found: Mapping[type[Design], Served]) -> str:
    naive, runs, pages, shared = (found[kind].users for kind in (Contiguous, SideBySide, Pages, PrefixPages))
    return (
        f"In the bytes of {load.caches} caches of {load.max_seq_len:,} tokens {naive:.0f} users run "
        f"contiguously, {runs:.0f} in blocks side by side and {pages:.0f} on pages: {pages / naive:.1f} "
        f"times as many. With the first {load.common} tokens stored once it is {shared:.0f}: "
        f"{shared / naive:.1f} times."
    )


def _picture(
    load: Workload, found: Mapping[type[Design], Served], sharing: Sequence[tuple[int, Served]]
) -> Picture:
    """Users by the tokens that they have in common; only one design knows."""
    ends = sorted({0, load.common})
    predicted = [
        Point(common, PrefixPages.predict(load._replace(common=common)).users) for common, _ in sharing
    ]
    flat = (kind for kind in DESIGNS if kind is not PrefixPages and kind is not Anywhere)
    return Picture(
        title=f"Users at once in the bytes of {load.caches} caches of {load.max_seq_len:,} tokens",
        x="tokens that all begin with",
        y="users",
        lines=[
            Line(PrefixPages.name, predicted, is_predicted=True),
            Line(PrefixPages.name, [Point(common, served.users) for common, served in sharing]),
            *(Line(kind.name, [Point(end, found[kind].users) for end in ends]) for kind in flat),
        ],
    )
