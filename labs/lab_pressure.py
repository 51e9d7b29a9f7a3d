"""3.6: Less and less memory: who runs, who waits, what is computed again or copied, and what that costs.

The same requests, all at once, to the embedded model: in pools from "all fit" down to little more than the
longest needs, in the three modes of preemption: none (who is admitted has pages for his whole life),
recompute and swap. Prefixes are not cached, and the host has room for all. Predicted by counting blocks: how
many begin at once; by looking at who gives way, and with how many tokens: what is computed again, or copied
out; by a line through the steps of the first run, so much a step and so much a token: how fast the others
are. Copies to the host and back are not in that line.

\b
pdm run lab pressure
pdm run lab pressure --users 32 --plot pressure.svg
"""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import fmean
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from tiny_llm.policies import NoPreemption
from tiny_llm.preemption import NewestFirst

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm import LLM, EngineCore, PagedBatchManager, Policies, SamplingParams

BLOCK_SIZE = 16
MODES = ("none", "recompute", "swap")
SHARES = (0.5, 0.25)  # of what all need, between all of it and the least that is possible
BUDGET = 512  # tokens of a step


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=2, help="Requests, all at once.")] = 16,
    prompt_len: Annotated[int, typer.Option(min=8, max=2000, help="Tokens of the longest prompt.")] = 64,
    output_len: Annotated[int, typer.Option(min=4, max=2000, help="Tokens of the longest answer.")] = 96,
    seed: Annotated[int, typer.Option(help="Source of lengths and tokens.")] = 0,
) -> Result:
    """Serve the requests in every pool and mode, and compare with what was counted beforehand."""
    load = Load.drawn(users, prompt_len, output_len, seed)
    served: list[Served] = []
    pools = load.pools()
    total = 1 + len(MODES) * (len(pools) - 1)
    progress("pressure: reading the model", 0, total)
    llm = LLM(block_size=BLOCK_SIZE, num_blocks=8)
    _serve(llm, Load(load.prompts[:1], [4]), pools[0], "none")  # warms up
    for blocks in pools:
        for mode in MODES if served else MODES[:1]:
            progress("pressure: pools and modes served:", len(served), total)
            served.append(_serve(llm, load, blocks, mode))
    progress("pressure", total, total)
    cost = Cost.of(served[0].steps)
    return Result(
        title="More users than memory",
        asks="What do users get when they need more pages than there are, and what does it cost?",
        tables=[_table_of_work(load, served), _table_of_times(load, served, cost)],
        conclusion=_conclusion(load, served),
        picture=_picture(load, served, cost),
    )


class Load(NamedTuple):
    """Requests: the token ids of each prompt, and how many tokens each answer has."""

    prompts: Sequence[list[int]]
    answers: Sequence[int]

    @classmethod
    def drawn(cls, users: int, prompt_len: int, output_len: int, seed: int) -> "Load":
        """Prompts of a quarter of the longest or more, answers of half of it or more; random tokens."""
        draw = random.Random(seed)
        lengths = [draw.randint(prompt_len // 4, prompt_len) for _ in range(users)]
        prompts = [[draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]
        return cls(prompts, [draw.randint(output_len // 2, output_len) for _ in range(users)])

    @property
    def lives(self) -> list[int]:
        """Blocks that each request may need."""
        return [_blocks(len(p) + answer) for p, answer in zip(self.prompts, self.answers, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens that are computed if nothing is computed twice: the last of each answer never is."""
        return sum(len(p) + answer - 1 for p, answer in zip(self.prompts, self.answers, strict=True))

    def pools(self) -> list[int]:
        """Sizes of pools in blocks: for all, for shares of that, and one more than the longest needs."""
        everybody, least = sum(self.lives), max(self.lives) + 1
        between = [round(share * everybody) for share in SHARES]
        return [everybody, *(blocks for blocks in between if blocks > least), least]

    def begin_at_once(self, blocks: int, mode: str) -> int:
        """How many are admitted at the beginning, the first in line first: by what each is promised."""
        known = [_blocks(len(p) + BLOCK_SIZE) for p in self.prompts]
        promised = self.lives if mode == "none" else map(min, known, self.lives)
        return sum(held <= blocks for held in accumulate(promised))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


# ---- On the model ----


class Step(NamedTuple):
    """What a step computed, in tokens, how many sequences ran, and how long it took."""

    tokens: int
    running: int
    seconds: float


class GivenUp(NamedTuple):
    """Somebody gave way: the tokens that he had, and whether they went to the host."""

    tokens: int
    swapped: bool


class Served(NamedTuple):
    """A run. begun: who ran after the first step. latencies: of each request, in steps and in seconds."""

    blocks: int
    mode: str
    begun: int
    steps: list[Step]
    given_up: list[GivenUp]
    copied: int
    latencies: list[tuple[int, float]]

    @property
    def seconds(self) -> float:
        """Until all had their answers."""
        return sum(step.seconds for step in self.steps)

    @property
    def computed(self) -> int:
        """Tokens that went through the model."""
        return sum(step.tokens for step in self.steps)

    def again(self, load: Load) -> Pair:
        """Tokens computed a second time; predicted: those of who gave way without going to the host."""
        predicted = sum(one.tokens for one in self.given_up if not one.swapped)
        return Pair(predicted, self.computed - load.tokens)

    def blocks_out(self) -> Pair:
        """Blocks copied to the host; predicted: those that are begun by the tokens of who went there."""
        return Pair(sum(_blocks(one.tokens) for one in self.given_up if one.swapped), self.copied)

    def latency(self, part: int) -> tuple[float, float]:
        """The mean over requests, and the time that 99 of 100 keep; part 0 in steps, part 1 in seconds."""
        times = sorted(latency[part] for latency in self.latencies)
        return fmean(times), times[math.ceil(0.99 * len(times)) - 1]


def _serve(llm: LLM, load: Load, blocks: int, mode: str) -> Served:
    """Let all requests come at once, and step until the last has its answer."""
    policies = Policies(
        preemption=NoPreemption() if mode == "none" else NewestFirst(),
        swap_blocks=sum(load.lives) if mode == "swap" else 0,
    )
    manager = PagedBatchManager(
        blocks,
        BLOCK_SIZE,
        len(load.prompts),
        model=llm.model,
        max_batched_tokens=BUDGET,
        policies=policies,
    )
    core = EngineCore(manager, ())
    for user, (prompt, answer) in enumerate(zip(load.prompts, load.answers, strict=True)):
        core.add_request(str(user), prompt, SamplingParams(temperature=0, max_tokens=answer))
    begun, steps, given_up, copied = 0, list[Step](), list[GivenUp](), 0
    latencies: list[tuple[int, float]] = []
    start = perf_counter()
    while core.has_work:
        had = {sequence.seq_id: sequence.num_computed for sequence in manager.running}
        began = perf_counter()
        outputs = core.step()
        now = perf_counter()
        ended = [output.seq_id for output in outputs if output.finish_reason is not None]
        plan = manager.last_plan
        tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        steps.append(Step(tokens, len(manager.running) + len(ended), now - began))
        begun = begun or steps[-1].running
        latencies += [(len(steps), now - start)] * len(ended)
        given_up += [
            GivenUp(had[sequence.seq_id], sequence.swapped is not None)
            for sequence in manager.waiting
            if sequence.seq_id in had
        ]
        copied += len(plan.swapped_out)
    return Served(blocks, mode, begun, steps, given_up, copied, latencies)


class Cost(NamedTuple):
    """Seconds of a step: so much for itself, and so much for each of its tokens."""

    a_step: float
    a_token: float

    @classmethod
    def of(cls, steps: Sequence[Step]) -> "Cost":
        """The line through these steps that errs least, by the squares of its errors."""
        tokens, seconds = fmean(step.tokens for step in steps), fmean(step.seconds for step in steps)
        spread = sum((step.tokens - tokens) ** 2 for step in steps)
        slope = sum((step.tokens - tokens) * (step.seconds - seconds) for step in steps) / max(spread, 1e-9)
        return cls(seconds - slope * tokens, slope)

    def speed(self, load: Load, served: Served) -> Pair:
        """Output tokens a second."""
        outputs = sum(load.answers)
        predicted = len(served.steps) * self.a_step + served.computed * self.a_token
        return Pair(outputs / predicted, outputs / served.seconds)


# ---- Tables ----


def _table_of_work(load: Load, served: Sequence[Served]) -> Table:
    return Table(
        f"{len(load.prompts)} requests at once, {sum(map(len, load.prompts)):,} tokens in and "
        f"{sum(load.answers):,} out, blocks of {BLOCK_SIZE}; all need {sum(load.lives):,}",
        [
            Column("blocks", "blocks"),
            Column("mode", "mode"),
            Column("begun", "begin at\nonce"),
            Column("running", "run,\nmean", "{:.1f}".format),
            Column("preemptions", "gave\nway"),
            Column("again", "tokens\nagain"),
            Column("copied", "blocks\nout"),
        ],
        [
            (
                one.blocks,
                one.mode,
                Pair(load.begin_at_once(one.blocks, one.mode), one.begun),
                fmean(step.running for step in one.steps),
                len(one.given_up),
                one.again(load),
                one.blocks_out(),
            )
            for one in served
        ],
    )


def _table_of_times(load: Load, served: Sequence[Served], cost: Cost) -> Table:
    seconds = "{:.2f}".format
    return Table(
        f"What it costs. Predicted: {1e3 * cost.a_step:.1f} ms a step, {1e3 * cost.a_token:.2f} ms a token",
        [
            Column("blocks", "blocks"),
            Column("mode", "mode"),
            Column("steps", "steps"),
            Column("speed", "output\ntokens/s", "{:.1f}".format),
            Column("mean_steps", "answer after\nsteps, mean", "{:.0f}".format),
            Column("p99_steps", "p99"),
            Column("mean_seconds", "after\nseconds, mean", seconds),
            Column("p99_seconds", "p99", seconds),
        ],
        [
            (
                one.blocks,
                one.mode,
                len(one.steps),
                cost.speed(load, one),
                *one.latency(0),
                *one.latency(1),
            )
            for one in served
        ],
    )


def _lines(load: Load, served: Sequence[Served], cost: Cost) -> Iterator[Line]:
    everybody = sum(load.lives)
    for mode in MODES:
        of_mode = [served[0], *(one for one in served[1:] if one.mode == mode)]
        pairs = [(one.blocks / everybody, cost.speed(load, one)) for one in of_mode]
        yield Line(mode, [Point(share, pair.predicted) for share, pair in pairs], is_predicted=True)
        yield Line(mode, [Point(share, pair.measured) for share, pair in pairs])


def _picture(load: Load, served: Sequence[Served], cost: Cost) -> Picture:
    return Picture(
        title=f"{len(load.prompts)} requests in less and less memory",
        x="blocks in the pool, as a share of what all need",
        y="output tokens per second",
        lines=list(_lines(load, served, cost)),
        x_is_share=True,
    )


def _conclusion(load: Load, served: Sequence[Served]) -> str:
    everybody, (none, again, swap) = sum(load.lives), served[-3:]
    speeds = [sum(load.answers) / one.seconds for one in (served[0], none, again, swap)]
    return (
        f"With {percent(none.blocks / everybody)} of the memory that all need, {none.begun} of "
        f"{len(load.prompts)} begin at once in mode 'none', and {again.begun} where somebody may have to "
        f"give way. That happens {len(again.given_up)} times: {again.again(load).measured:,} tokens are "
        f"computed again, or {swap.copied:,} blocks copied out. Tokens per second: {speeds[0]:.0f} in the "
        f"roomy pool, {speeds[1]:.0f} with none, {speeds[2]:.0f} with recompute, {speeds[3]:.0f} with swap."
    )
