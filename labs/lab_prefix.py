"""3.4: What a shared system prompt costs if it is computed once and stored once.

Users whose prompts share a prefix arrive at once at the embedded model, with the prefix cache off and on.
Measures the tokens computed, the blocks that hold the prompts, and the time to first token: medians of a few
repetitions, in which the two engines alternate, so that other work on the machine slows both. Then, without a
model, counts the blocks of a crowd of users with one long system prompt, and the users that run in the memory
of a few contiguous caches.

\b
pdm run lab prefix
pdm run lab prefix --prompt-len 512 --users 8 --plot prefix.svg
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from statistics import fmean, median
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.policies import NoPrefixSharing
from tiny_llm.prefix_sharing import MIN_TOKENS_TO_COPY, PrefixSharing

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm import LLM, PagedBatchManager, Policies, SamplingParams

SHARES = (0, 50, 99)  # percent of a prompt that is common to all users
BLOCK_SIZE = 16
OFF, ON = "off", "on"
CACHES, CACHE_LEN = 16, 2048  # contiguous caches, and their capacity in tokens
GOAL, COMMON, LONGEST = 64, 100, 500  # users to run in that memory; prefix and longest prompt in tokens

Policy = type[PrefixSharing] | type[NoPrefixSharing]


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=2, max=256, help="Users of the model, all at once.")] = 4,
    prompt_len: Annotated[int, typer.Option(min=32, max=2000, help="Tokens of each user's prompt.")] = 192,
    crowd: Annotated[int, typer.Option(min=2, help="Users of one system prompt, without a model.")] = 100,
    system_prompt: Annotated[int, typer.Option(min=1, help="Tokens of that system prompt.")] = 5000,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Timed runs of each kind.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the tokens and lengths.")] = 0,
) -> Result:
    """Serve users with the model, then count blocks for larger crowds."""
    served = _serve(users, prompt_len, seed, repetitions, progress)
    one_prompt = Crowd.drawn(crowd, system_prompt, system_prompt + 100, seed)
    running = _table_of_running(Crowd.drawn(CACHES * CACHE_LEN // COMMON, COMMON, LONGEST, seed))
    return Result(
        title="Prefix caching",
        question="Many prompts start with the same tokens. How often are these computed and stored?",
        tables=[
            _table_of_served(served, users, prompt_len, repetitions),
            _table_of_crowds([Crowd((15, 17, 18), 12, 4), one_prompt]),
            running,
        ],
        conclusion=_conclusion(served[-1], one_prompt),
        picture=_picture(served, users, prompt_len),
    )


# ---- On the model ----


class Prompts(NamedTuple):
    """`users` prompts of `length` tokens; the first `shared` tokens are equal and the next one differs."""

    users: int
    length: int
    shared: int

    @property
    def cached(self) -> int:
        """Tokens that each later prompt reuses from the first; a prompt's last token is always computed.

        These are whole blocks, and the first tokens of one more block if the first prompt fills that block
        and the tokens are enough to be worth a copy.
        """
        full, part = divmod(min(self.shared, self.length - 1), BLOCK_SIZE)
        is_filled = (full + 1) * BLOCK_SIZE <= self.length
        return full * BLOCK_SIZE + (part if is_filled and part >= MIN_TOKENS_TO_COPY else 0)

    @property
    def computed(self) -> int:
        """Tokens computed until all users have their first token, with the cache on."""
        return self.users * self.length - (self.users - 1) * self.cached

    @property
    def blocks(self) -> int:
        """Blocks that then hold all prompts: a block is shared if it is full of common tokens."""
        own = -(-self.length // BLOCK_SIZE)
        return self.users * own - (self.users - 1) * (min(self.shared, self.length - 1) // BLOCK_SIZE)

    def tokens(self, vocabulary: range, draw: random.Random) -> list[list[int]]:
        """Random token ids, so that other prompts do not share a prefix with them."""
        common = draw.choices(vocabulary, k=self.shared)
        firsts = draw.sample(vocabulary, self.users)  # each user's own tokens start differently
        own = self.length - self.shared - 1
        return [[*common, first, *draw.choices(vocabulary, k=own)] for first in firsts]


class First(NamedTuple):
    """When all users have their first token: tokens computed, blocks that hold the prompts, seconds.

    mean: mean time to first token over users. last: time until all users have it.
    """

    computed: int
    blocks: int
    mean: float
    last: float

    @classmethod
    def median(cls, runs: Sequence["First"]) -> "First":
        """The median seconds of several runs. All must have the same counts."""
        ((computed, blocks),) = {(run.computed, run.blocks) for run in runs}
        return cls(computed, blocks, median(run.mean for run in runs), median(run.last for run in runs))


class Served(NamedTuple):
    """The same users with the cache off and on."""

    share: int
    prompts: Prompts
    off: First
    on: First


def _serve(users: int, prompt_len: int, seed: int, repetitions: int, progress: Progress) -> list[Served]:
    draw, found = random.Random(seed), []
    engines = [_engine(users, prompt_len, is_on) for is_on in (False, True)]
    vocabulary = range(1000, engines[0].model_config.vocab_size)
    for llm in engines:
        _first_tokens(llm, [[1] * BLOCK_SIZE])  # warms up
    for done, share in enumerate(SHARES):
        progress("prefix: shares of the prompt served:", done, len(SHARES))
        prompts = Prompts(users, prompt_len, prompt_len * share // 100)
        runs = _alternate(engines, partial(prompts.tokens, vocabulary, draw), repetitions)
        found.append(Served(share, prompts, *map(First.median, runs)))
    progress("prefix", len(SHARES), len(SHARES))
    return found


def _alternate(
    engines: Sequence[LLM], new_prompts: Callable[[], list[list[int]]], repetitions: int
) -> list[list[First]]:
    """Serve new prompts with every engine, in alternating order, several times; return the runs by engine."""
    runs: list[list[First]] = [[] for _ in engines]
    order = list(range(len(engines)))
    for _ in range(repetitions):
        tokens = new_prompts()
        for place in order:
            runs[place].append(_first_tokens(engines[place], tokens))
        order.reverse()
    return runs


def _engine(users: int, prompt_len: int, enable_prefix_caching: bool) -> LLM:
    """An engine with blocks for all prompts and for the answers until the last user has its first token."""
    return LLM(
        block_size=BLOCK_SIZE,
        num_blocks=users * (1 + -(-(prompt_len + _longest_answer(users, prompt_len)) // BLOCK_SIZE)),
        max_num_seqs=users,
        enable_prefix_caching=enable_prefix_caching,
    )


def _longest_answer(users: int, prompt_len: int) -> int:
    """More steps than all users need to a first token: prompts get half of a step's token budget."""
    return 4 + users * prompt_len // 256


def _first_tokens(llm: LLM, prompts: list[list[int]]) -> First:
    """Add all prompts at once, and step the engine until each has its first token."""
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
    prompt_blocks = -(-len(prompts[0]) // llm.engine_config.block_size)
    tables = [sequence.table for sequence in core.manager.running]
    blocks = {block for table in tables for block in table.blocks[:prompt_blocks]}
    for user in range(len(prompts)):
        call(partial(core.cancel, str(user)))
    return First(computed, len(blocks), fmean(seconds.values()), max(seconds.values()))


def _table_of_served(served: list[Served], users: int, prompt_len: int, repetitions: int) -> Table:
    rows = []
    for row in served:
        unshared = Prompts(users, prompt_len, 0)
        for name, prompts, first in ((OFF, unshared, row.off), (ON, row.prompts, row.on)):
            rows.append(
                (
                    row.share,
                    name,
                    Pair(prompts.computed, first.computed),
                    Pair(prompts.blocks, first.blocks),
                    1e3 * first.mean,
                    1e3 * first.last,
                    Pair(unshared.computed / prompts.computed, row.off.last / first.last),
                )
            )
    ms = "{:,.0f}".format
    return Table(
        f"{users} users at once, prompts of {prompt_len} tokens, blocks of {BLOCK_SIZE} tokens; medians of "
        f"{repetitions} alternating runs. Predicted times: in proportion to tokens computed",
        [
            Column("share", "in common\n(%)"),
            Column("cache", "cache"),
            Column("computed", "tokens\ncomputed"),
            Column("blocks", "blocks"),
            Column("mean_ms", "first token,\nmean (ms)", ms),
            Column("last_ms", "first token,\nlast (ms)", ms),
            Column("times", "times\nas fast", "{:.2f}".format),
        ],
        rows,
    )


def _picture(served: list[Served], users: int, prompt_len: int) -> Picture:
    """Times are predicted from the tokens computed and from the first row's time without a cache."""
    per_token = served[0].off.last / served[0].prompts.computed
    on = f"cache {ON}"
    predicted = [
        Point(share / 100, per_token * Prompts(users, prompt_len, prompt_len * share // 100).computed)
        for share in range(max(SHARES) + 1)
    ]
    return Picture(
        title=f"{users} users at once, prompts of {prompt_len} tokens",
        x="common share of the prompt",
        y="time until all users have their first token (s)",
        lines=[
            Line(f"cache {OFF}", [Point(row.share / 100, row.off.last) for row in served]),
            Line(on, predicted, is_predicted=True),
            Line(on, [Point(row.share / 100, row.on.last) for row in served]),
        ],
        x_is_share=True,
    )


# ---- Bookkeeping without a model ----


class Held(NamedTuple):
    """Distinct blocks of a crowd's prompts, and the blocks of them that hold the common prefix."""

    blocks: int
    prefix: int


class Crowd(NamedTuple):
    """Users with prompts of these lengths in tokens, of which the first `common` are the same."""

    lengths: Sequence[int]
    common: int
    block_size: int = BLOCK_SIZE

    @classmethod
    def drawn(cls, users: int, common: int, longest: int, seed: int) -> "Crowd":
        """Draw lengths uniformly; each prompt has at least one token after the common ones."""
        draw = random.Random(seed)
        return cls([draw.randint(common + 1, longest) for _ in range(users)], common)

    def shared_by(self, policy: Policy) -> int:
        """Blocks that a user shares with the others: those that are full of common tokens."""
        return self.common // self.block_size if policy is PrefixSharing else 0

    def predict(self, policy: Policy) -> Held:
        """Predict the blocks that the users hold."""
        shared, full = self.shared_by(policy), self.common // self.block_size
        own = (-(-length // self.block_size) - shared for length in self.lengths)
        return Held(shared + sum(own), shared or full * len(self.lengths))

    def serve(self, policy: Policy) -> Held:
        """Count the blocks that the users hold in a pool that is large enough for all."""
        tables = self._run(policy, pages=sum(self.lengths) // self.block_size + 2 * len(self.lengths))
        full = self.common // self.block_size
        return Held(_num_distinct(tables), _num_distinct([table[:full] for table in tables]))

    def predict_running(self, policy: Policy, pages: int) -> int:
        """How many users run at once in `pages` blocks, in order of arrival, each until its first token."""
        shared = self.shared_by(policy)
        own = (-(-(length + 1) // self.block_size) - shared for length in self.lengths)
        return sum(shared + held <= pages for held in accumulate(own))

    def num_running(self, policy: Policy, pages: int) -> int:
        """How many users the batch manager runs at once."""
        return len(self._run(policy, pages))

    def _run(self, policy: Policy, pages: int) -> list[list[int]]:
        """The blocks of every running user when nothing is left to compute."""
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
        """How many users run at once in contiguous caches."""
        manager = DenseBatchManager(CACHES, CACHE_LEN, max_batched_tokens=sum(self.lengths))
        self._queue(manager)
        manager.process_batch()
        return len(manager.running)

    def _queue(self, manager: PagedBatchManager | DenseBatchManager) -> None:
        """Add a request for each user; each user's own tokens start differently."""
        for user, length in enumerate(self.lengths):
            tokens = [0] * self.common + [1 + user] * (length - self.common)
            manager.add_request(tokens, str(user), SamplingParams(max_tokens=1))


def _num_distinct(tables: Sequence[Sequence[int]]) -> int:
    return len({block for table in tables for block in table})


def _table_of_crowds(crowds: Sequence[Crowd]) -> Table:
    rows = []
    for crowd in crowds:
        unshared = crowd.serve(NoPrefixSharing), crowd.predict(NoPrefixSharing)
        name = f"{len(crowd.lengths)}, {crowd.common:,} tokens in common, blocks of {crowd.block_size}"
        for cache, policy in ((OFF, NoPrefixSharing), (ON, PrefixSharing)):
            held, predicted = crowd.serve(policy), crowd.predict(policy)
            saved = Pair(1 - predicted.blocks / unshared[1].blocks, 1 - held.blocks / unshared[0].blocks)
            prefix = Pair(predicted.prefix, held.prefix)
            rows.append((name, cache, prefix, Pair(predicted.blocks, held.blocks), saved))
    return Table(
        "Blocks of a crowd, counted without a model; blocks that are full of common tokens are shared",
        [
            Column("users", "users"),
            Column("cache", "cache"),
            Column("prefix", "blocks of\nthe prefix"),
            Column("blocks", "all\nblocks"),
            Column("saved", "saved", percent),
        ],
        rows,
    )


def _table_of_running(crowd: Crowd) -> Table:
    """A user starts when the blocks for its prompt and its first token are available."""
    pages = CACHES * CACHE_LEN // BLOCK_SIZE
    rows: list[tuple[str, Pair, Pair]] = []
    counted = [("contiguous caches", Pair(CACHES, crowd.num_running_contiguously()))]
    for name, policy in (("pages", NoPrefixSharing), ("pages, shared prefix", PrefixSharing)):
        pair = Pair(crowd.predict_running(policy, pages), crowd.num_running(policy, pages))
        counted.append((name, pair))
    for name, users in counted:
        rows.append((name, users, Pair(*(number / CACHES for number in users))))
    return Table(
        f"Users at once in the memory of {CACHES} contiguous caches of {CACHE_LEN:,} tokens: prompts of "
        f"{crowd.common + 1} to {LONGEST} tokens, {crowd.common} in common. Goal: {GOAL} users",
        [
            Column("design", "design"),
            Column("users", "users"),
            Column("times", "times as many", "{:.1f}".format),
        ],
        rows,
    )


def _conclusion(last: Served, crowd: Crowd) -> str:
    unshared, shared = crowd.serve(NoPrefixSharing), crowd.serve(PrefixSharing)
    return (
        f"With {last.share}% of their prompts in common, all {last.prompts.users} users have their first "
        f"token after {1e3 * last.on.last:,.0f} ms with the cache and after {1e3 * last.off.last:,.0f} ms "
        f"without. {len(crowd.lengths)} users of a system prompt of {crowd.common:,} tokens store it in "
        f"{shared.prefix:,} blocks instead of {unshared.prefix:,}; they need {shared.blocks:,} blocks in all "
        f"instead of {unshared.blocks:,}."
    )
