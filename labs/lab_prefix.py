"""3.4: What a shared system prompt costs: computed once, stored once.

Users whose prompts begin alike come at once to the embedded model, with the prefix cache off and on: tokens
computed, blocks that hold their prompts, time until the first token. Then bookkeeping alone, without a model:
a crowd on one long system prompt, and how many users run in the bytes of a few contiguous caches.

\b
pdm run lab prefix
pdm run lab prefix --prompt-len 512 --users 8 --plot prefix.svg
"""

import random
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from statistics import fmean
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.policies import NoPrefixSharing
from tiny_llm.prefix_sharing import LEAST_WORTH_COPYING, PrefixSharing

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm import LLM, PagedBatchManager, Policies, SamplingParams

SHARES = (0, 50, 99)  # per cent of a prompt that all users have in common
BLOCK_SIZE = 16
OFF, ON = "off", "on"
CACHES, CACHE_LEN = 16, 2048  # contiguous caches, and the tokens of each
WANTED, COMMON, LONGEST = 64, 100, 500  # users who shall run in their bytes, and tokens of their prompts

Policy = type[PrefixSharing] | type[NoPrefixSharing]


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=2, max=256, help="Users of the model, who come at once.")] = 4,
    prompt_len: Annotated[int, typer.Option(min=32, max=2000, help="Tokens of their prompts.")] = 192,
    crowd: Annotated[int, typer.Option(min=2, help="Users on one long system prompt; no model runs.")] = 100,
    system_prompt: Annotated[int, typer.Option(min=1, help="Its tokens.")] = 5000,
    seed: Annotated[int, typer.Option(help="Source of the tokens, and of lengths.")] = 0,
) -> Result:
    """Serve the model's users, then count pages for larger crowds."""
    served = _serve(users, prompt_len, seed, progress)
    one_prompt = Crowd.drawn(crowd, system_prompt, system_prompt + 100, seed)
    running = _table_of_running(Crowd.drawn(CACHES * CACHE_LEN // COMMON, COMMON, LONGEST, seed))
    return Result(
        title="Prefix caching",
        asks="Many prompts begin with the same tokens. How often are they computed, how often stored?",
        tables=[
            _table_of_served(served, users, prompt_len),
            _table_of_crowds([Crowd((15, 17, 18), 12, 4), one_prompt]),
            running,
        ],
        conclusion=_conclusion(served[-1], one_prompt),
        picture=_picture(served, users, prompt_len),
    )


# ---- On the model ----


class Prompts(NamedTuple):
    """`users` prompts of so many tokens, the first `shared` of them alike and the next one different."""

    users: int
    length: int
    shared: int

    @property
    def cached(self) -> int:
        """Tokens of all but the first prompt that the first one leaves behind: the last is always computed.

        Whole blocks; and of one block more, where the first prompt fills it, the beginning, if it is worth a
        copy.
        """
        full, part = divmod(min(self.shared, self.length - 1), BLOCK_SIZE)
        is_filled = (full + 1) * BLOCK_SIZE <= self.length
        return full * BLOCK_SIZE + (part if is_filled and part >= LEAST_WORTH_COPYING else 0)

    @property
    def computed(self) -> int:
        """Tokens that are computed when everybody has the first token, with the cache on."""
        return self.users * self.length - (self.users - 1) * self.cached

    @property
    def blocks(self) -> int:
        """Blocks that hold them all then: a block is shared when it is full of what all have in common."""
        own = -(-self.length // BLOCK_SIZE)
        return self.users * own - (self.users - 1) * (min(self.shared, self.length - 1) // BLOCK_SIZE)

    def tokens(self, vocabulary: range, draw: random.Random) -> list[list[int]]:
        """Token ids that no other prompts begin with, most likely."""
        common = draw.choices(vocabulary, k=self.shared)
        firsts = draw.sample(vocabulary, self.users)  # nobody's own tokens begin like another's
        own = self.length - self.shared - 1
        return [[*common, first, *draw.choices(vocabulary, k=own)] for first in firsts]


class First(NamedTuple):
    """When all users have their first token: tokens computed, blocks that hold the prompts, seconds.

    mean: until the first token, over users. last: until everybody had it.
    """

    computed: int
    blocks: int
    mean: float
    last: float


class Served(NamedTuple):
    """The same users with the cache off and on."""

    share: int
    prompts: Prompts
    off: First
    on: First


def _serve(users: int, prompt_len: int, seed: int, progress: Progress) -> list[Served]:
    draw, found = random.Random(seed), []
    engines = [_engine(users, prompt_len, is_on) for is_on in (False, True)]
    vocabulary = range(1000, engines[0].model_config.vocab_size)
    for llm in engines:
        _first_tokens(llm, [[1] * BLOCK_SIZE])  # warms up
    for done, share in enumerate(SHARES):
        progress("prefix: shares of the prompt served:", done, len(SHARES))
        prompts = Prompts(users, prompt_len, prompt_len * share // 100)
        tokens = prompts.tokens(vocabulary, draw)
        found.append(Served(share, prompts, *(_first_tokens(llm, tokens) for llm in engines)))
    progress("prefix", len(SHARES), len(SHARES))
    return found


def _engine(users: int, prompt_len: int, enable_prefix_caching: bool) -> LLM:
    """With pages for all, and for what they answer until the last of them has begun to."""
    return LLM(
        block_size=BLOCK_SIZE,
        num_blocks=users * (1 + -(-(prompt_len + _longest_answer(users, prompt_len)) // BLOCK_SIZE)),
        max_num_seqs=users,
        enable_prefix_caching=enable_prefix_caching,
    )


def _longest_answer(users: int, prompt_len: int) -> int:
    """More steps than it takes until all have their first tokens: half of a step's budget is for prompts."""
    return 4 + users * prompt_len // 256


def _first_tokens(llm: LLM, prompts: list[list[int]]) -> First:
    """Let all prompts come at once, and step the engine until each has its first token."""
    core, call = llm.core, llm.engine.call
    assert isinstance(core.manager, PagedBatchManager)
    answer = _longest_answer(len(prompts), len(prompts[0]))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=answer)
    for user, tokens in enumerate(prompts):
        call(partial(core.add_request, str(user), tokens, params))
    seconds: dict[str, float] = {}
    computed, start = 0, perf_counter()
    while len(seconds) < len(prompts):
        for output in call(core.step):
            if output.seq_id not in seconds:
                seconds[output.seq_id] = perf_counter() - start
                computed += len(prompts[int(output.seq_id)]) - output.num_cached_tokens
    of_prompt = -(-len(prompts[0]) // llm.engine_config.block_size)
    tables = [sequence.table for sequence in core.manager.running]
    blocks = {block for table in tables for block in table.blocks[:of_prompt]}
    for user in range(len(prompts)):
        call(partial(core.cancel, str(user)))
    return First(computed, len(blocks), fmean(seconds.values()), max(seconds.values()))


def _table_of_served(served: list[Served], users: int, prompt_len: int) -> Table:
    rows = []
    for row in served:
        alone = Prompts(users, prompt_len, 0)
        for name, prompts, first in ((OFF, alone, row.off), (ON, row.prompts, row.on)):
            rows.append(
                (
                    row.share,
                    name,
                    Pair(prompts.computed, first.computed),
                    Pair(prompts.blocks, first.blocks),
                    1e3 * first.mean,
                    1e3 * first.last,
                    Pair(alone.computed / prompts.computed, row.off.last / first.last),
                )
            )
    ms = "{:,.0f}".format
    return Table(
        f"{users} users at once, prompts of {prompt_len} tokens, blocks of {BLOCK_SIZE}",
        [
            Column("share", "in common\n(%)"),
            Column("cache", "cache"),
            Column("computed", "tokens\ncomputed"),
            Column("blocks", "blocks"),
            Column("mean_ms", "first token,\nmean (ms)", ms),
            Column("last_ms", "all have\nit (ms)", ms),
            Column("times", "times\nas fast", "{:.2f}".format),
        ],
        rows,
    )


def _picture(served: list[Served], users: int, prompt_len: int) -> Picture:
    """Time is predicted by the tokens that are computed, from the first row without a cache."""
    a_token = served[0].off.last / served[0].prompts.computed
    on = f"cache {ON}"
    predicted = [
        Point(share / 100, a_token * Prompts(users, prompt_len, prompt_len * share // 100).computed)
        for share in range(max(SHARES) + 1)
    ]
    return Picture(
        title=f"{users} users at once, prompts of {prompt_len} tokens",
        x="share of the prompt that all have in common",
        y="until all have their first token (s)",
        lines=[
            Line(f"cache {OFF}", [Point(row.share / 100, row.off.last) for row in served]),
            Line(on, predicted, is_predicted=True),
            Line(on, [Point(row.share / 100, row.on.last) for row in served]),
        ],
        x_is_share=True,
    )


# ---- Bookkeeping alone ----


class Held(NamedTuple):
    """Different blocks that a crowd's prompts are in, and those of them that all users have in common."""

    blocks: int
    prefix: int


class Crowd(NamedTuple):
    """Users by the tokens of their prompts, the first `common` of which are the same."""

    lengths: Sequence[int]
    common: int
    block_size: int = BLOCK_SIZE

    @classmethod
    def drawn(cls, users: int, common: int, longest: int, seed: int) -> "Crowd":
        """Users whose lengths are drawn evenly; each has a token of its own at least."""
        draw = random.Random(seed)
        return cls([draw.randint(common + 1, longest) for _ in range(users)], common)

    def shared_by(self, policy: Policy) -> int:
        """Blocks that one user takes over from another: those that are full of what all have in common."""
        return self.common // self.block_size if policy is PrefixSharing else 0

    def predict(self, policy: Policy) -> Held:
        """What they hold, by counting blocks."""
        shared, full = self.shared_by(policy), self.common // self.block_size
        own = (-(-length // self.block_size) - shared for length in self.lengths)
        return Held(shared + sum(own), shared or full * len(self.lengths))

    def serve(self, policy: Policy) -> Held:
        """What they hold in a pool that has room for all."""
        tables = self._run(policy, pages=sum(self.lengths) // self.block_size + 2 * len(self.lengths))
        full = self.common // self.block_size
        return Held(_num_different(tables), _num_different([table[:full] for table in tables]))

    def predict_running(self, policy: Policy, pages: int) -> int:
        """How many run at once in so many pages, the first in line first, each until its first token."""
        shared = self.shared_by(policy)
        own = (-(-(length + 1) // self.block_size) - shared for length in self.lengths)
        return sum(shared + held <= pages for held in accumulate(own))

    def num_running(self, policy: Policy, pages: int) -> int:
        """How many the batch manager lets run."""
        return len(self._run(policy, pages))

    def _run(self, policy: Policy, pages: int) -> list[list[int]]:
        """The blocks of everybody who runs, when nothing is left to compute."""
        manager = PagedBatchManager(
            pages,
            self.block_size,
            len(self.lengths),
            max_batched_tokens=sum(self.lengths),
            policies=Policies(prefix=policy),
        )
        self._queue(manager)
        while manager.process_batch():
            pass
        return [sequence.table.blocks for sequence in manager.running]

    def num_running_contiguously(self) -> int:
        """How many run in contiguous caches."""
        manager = DenseBatchManager(CACHES, CACHE_LEN, max_batched_tokens=sum(self.lengths))
        self._queue(manager)
        manager.process_batch()
        return len(manager.running)

    def _queue(self, manager: PagedBatchManager | DenseBatchManager) -> None:
        """Everybody comes; nobody's own tokens begin like another's."""
        for user, length in enumerate(self.lengths):
            tokens = [0] * self.common + [1 + user] * (length - self.common)
            manager.add_request(tokens, str(user), SamplingParams(max_tokens=1))


def _num_different(tables: Sequence[Sequence[int]]) -> int:
    return len({block for table in tables for block in table})


def _table_of_crowds(crowds: Sequence[Crowd]) -> Table:
    rows = []
    for crowd in crowds:
        alone = crowd.serve(NoPrefixSharing), crowd.predict(NoPrefixSharing)
        name = f"{len(crowd.lengths)} on {crowd.common:,} tokens, blocks of {crowd.block_size}"
        for cache, policy in ((OFF, NoPrefixSharing), (ON, PrefixSharing)):
            held, predicted = crowd.serve(policy), crowd.predict(policy)
            saved = Pair(1 - predicted.blocks / alone[1].blocks, 1 - held.blocks / alone[0].blocks)
            prefix = Pair(predicted.prefix, held.prefix)
            rows.append((name, cache, prefix, Pair(predicted.blocks, held.blocks), saved))
    return Table(
        "Pages of a crowd, by bookkeeping alone; shared are blocks that are full of what all have in common",
        [
            Column("users", "users"),
            Column("cache", "cache"),
            Column("prefix", "blocks in\ncommon"),
            Column("blocks", "all\nblocks"),
            Column("saved", "saved", percent),
        ],
        rows,
    )


def _table_of_running(crowd: Crowd) -> Table:
    """Everybody waits for a whole life's pages: prompt and first token."""
    pages = CACHES * CACHE_LEN // BLOCK_SIZE
    rows: list[tuple[str, Pair, Pair]] = []
    counted = [("contiguous caches", Pair(CACHES, crowd.num_running_contiguously()))]
    for name, policy in (("pages", NoPrefixSharing), ("pages, shared prefix", PrefixSharing)):
        pair = Pair(crowd.predict_running(policy, pages), crowd.num_running(policy, pages))
        counted.append((name, pair))
    for name, users in counted:
        rows.append((name, users, Pair(*(number / CACHES for number in users))))
    return Table(
        f"Users at once in the bytes of {CACHES} contiguous caches of {CACHE_LEN:,} tokens: prompts of "
        f"{crowd.common + 1} to {LONGEST} tokens, {crowd.common} in common. Wanted: {WANTED}",
        [
            Column("design", "design"),
            Column("users", "users"),
            Column("times", "times as many", "{:.1f}".format),
        ],
        rows,
    )


def _conclusion(last: Served, crowd: Crowd) -> str:
    alone, together = crowd.serve(NoPrefixSharing), crowd.serve(PrefixSharing)
    return (
        f"With {last.share}% of their prompts in common {last.prompts.users} users have their first tokens "
        f"after {1e3 * last.on.last:,.0f} ms instead of {1e3 * last.off.last:,.0f}. {len(crowd.lengths)} on "
        f"{crowd.common:,} tokens hold {together.prefix:,} blocks of these instead of {alone.prefix:,}, and "
        f"{together.blocks:,} in all instead of {alone.blocks:,}."
    )
