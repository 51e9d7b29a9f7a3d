"""3.6: What happens with less and less memory: requests that run, wait and are preempted, and the cost.

The same requests arrive at once at the embedded model, in pools from "all fit" down to little more than the
longest request needs, in three modes of preemption: none (an admitted request has blocks for its whole life),
recompute and swap. The prefix cache is off, and host memory is large enough for all.

Three numbers are predicted. How many requests start at once follows from counting blocks. How many tokens are
computed again, or blocks copied out, follows from the preempted requests and their tokens. The speed of the
other runs follows from a line fitted to the first run's steps (time per step and time per token), which does
not include copies to the host and back.

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
from step_cost import Cost, Step
from tiny_llm import LLM, EngineCore, PagedBatchManager, Policies, SamplingParams

BLOCK_SIZE = 16
MODES = ("none", "recompute", "swap")
SHARES = (0.5, 0.25)  # pool sizes between the largest and the smallest, as shares of what all need
BUDGET = 512  # tokens per step


def measure(
    progress: Progress,
    users: Annotated[int, typer.Option(min=2, help="Number of requests, which arrive at once.")] = 16,
    prompt_len: Annotated[int, typer.Option(min=8, max=2000, help="Tokens of the longest prompt.")] = 64,
    output_len: Annotated[int, typer.Option(min=4, max=2000, help="Tokens of the longest answer.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed of the lengths and tokens.")] = 0,
) -> Result:
    """Serve the requests in every pool and mode, and compare with the predictions."""
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
        title="More requests than memory",
        question="What happens when requests need more blocks than the pool has, and what does it cost?",
        tables=[_table_of_work(load, served), _table_of_times(load, served, cost)],
        conclusion=_conclusion(load, served),
        picture=_picture(load, served, cost),
    )


class Load(NamedTuple):
    """Requests: the token ids of each prompt, and the length of each answer in tokens."""

    prompts: Sequence[list[int]]
    answers: Sequence[int]

    @classmethod
    def drawn(cls, users: int, prompt_len: int, output_len: int, seed: int) -> "Load":
        """Random tokens; prompts of a quarter to all of prompt_len, answers of half to all of output_len."""
        draw = random.Random(seed)
        lengths = [draw.randint(prompt_len // 4, prompt_len) for _ in range(users)]
        prompts = [[draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]
        return cls(prompts, [draw.randint(output_len // 2, output_len) for _ in range(users)])

    @property
    def max_blocks(self) -> list[int]:
        """Blocks that each request needs at its end."""
        return [_blocks(len(p) + answer) for p, answer in zip(self.prompts, self.answers, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens computed if none is computed twice; the last token of each answer is never computed."""
        return sum(len(p) + answer - 1 for p, answer in zip(self.prompts, self.answers, strict=True))

    def pools(self) -> list[int]:
        """Pool sizes in blocks: enough for all, shares of that, and one more than the longest needs."""
        largest, smallest = sum(self.max_blocks), max(self.max_blocks) + 1
        between = [round(share * largest) for share in SHARES]
        return [largest, *(blocks for blocks in between if blocks > smallest), smallest]

    def admitted_at_once(self, blocks: int, mode: str) -> int:
        """How many requests are admitted to an empty pool, in order of arrival, by their reserved blocks."""
        known = [_blocks(len(p) + BLOCK_SIZE) for p in self.prompts]
        reserved = self.max_blocks if mode == "none" else map(min, known, self.max_blocks)
        return sum(total <= blocks for total in accumulate(reserved))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


# ---- On the model ----


class Preempted(NamedTuple):
    """A preempted sequence: its computed tokens, and whether it was swapped to the host."""

    tokens: int
    swapped: bool


class Served(NamedTuple):
    """A run. admitted: requests in the first step. copied: blocks copied to the host.

    latencies: of each request, in steps and in seconds.
    """

    blocks: int
    mode: str
    admitted: int
    steps: list[Step]
    preempted: list[Preempted]
    copied: int
    latencies: list[tuple[int, float]]

    @property
    def seconds(self) -> float:
        """Seconds until all requests are finished."""
        return sum(step.seconds for step in self.steps)

    @property
    def computed(self) -> int:
        """Tokens that the model computed."""
        return sum(step.tokens for step in self.steps)

    def recomputed(self, load: Load) -> Pair:
        """Tokens computed again; predicted: those of sequences that were preempted and not swapped."""
        predicted = sum(one.tokens for one in self.preempted if not one.swapped)
        return Pair(predicted, self.computed - load.tokens)

    def blocks_out(self) -> Pair:
        """Blocks copied to the host; predicted: the blocks that hold the tokens of swapped sequences."""
        return Pair(sum(_blocks(one.tokens) for one in self.preempted if one.swapped), self.copied)

    def latency(self, part: int) -> tuple[float, float]:
        """Mean and 99th percentile over requests; part 0 is in steps, part 1 in seconds."""
        times = sorted(latency[part] for latency in self.latencies)
        return fmean(times), times[math.ceil(0.99 * len(times)) - 1]


def _serve(llm: LLM, load: Load, blocks: int, mode: str) -> Served:
    """Add all requests at once, and step until the last is finished."""
    policies = Policies(
        preemption=NoPreemption() if mode == "none" else NewestFirst(),
        swap_blocks=sum(load.max_blocks) if mode == "swap" else 0,
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
    admitted, steps, preempted, copied = 0, list[Step](), list[Preempted](), 0
    latencies: list[tuple[int, float]] = []
    start = perf_counter()
    while core.has_work:
        before = {sequence.seq_id: sequence.num_computed for sequence in manager.running}
        step_start = perf_counter()
        outputs = core.step()
        now = perf_counter()
        finished = [output.seq_id for output in outputs if output.finish_reason is not None]
        plan = manager.last_plan
        tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        steps.append(Step(tokens, len(manager.running) + len(finished), now - step_start))
        admitted = admitted or steps[-1].running
        latencies += [(len(steps), now - start)] * len(finished)
        preempted += [
            Preempted(before[sequence.seq_id], sequence.swapped is not None)
            for sequence in manager.waiting
            if sequence.seq_id in before
        ]
        copied += len(plan.swapped_out)
    return Served(blocks, mode, admitted, steps, preempted, copied, latencies)


def _speed(load: Load, served: Served, cost: Cost) -> Pair:
    """Output tokens per second."""
    outputs = sum(load.answers)
    return Pair(outputs / cost.seconds(len(served.steps), served.computed), outputs / served.seconds)


# ---- Tables ----


def _table_of_work(load: Load, served: Sequence[Served]) -> Table:
    return Table(
        f"{len(load.prompts)} requests at once, {sum(map(len, load.prompts)):,} tokens in and "
        f"{sum(load.answers):,} out, blocks of {BLOCK_SIZE} tokens; all requests together need "
        f"{sum(load.max_blocks):,} blocks",
        [
            Column("blocks", "pool\n(blocks)"),
            Column("mode", "mode"),
            Column("admitted", "start\nat once"),
            Column("running", "running,\nmean", "{:.1f}".format),
            Column("preemptions", "pre-\nemptions"),
            Column("recomputed", "tokens\nrecomputed"),
            Column("copied", "blocks\nswapped out"),
        ],
        [
            (
                one.blocks,
                one.mode,
                Pair(load.admitted_at_once(one.blocks, one.mode), one.admitted),
                fmean(step.running for step in one.steps),
                len(one.preempted),
                one.recomputed(load),
                one.blocks_out(),
            )
            for one in served
        ],
    )


def _table_of_times(load: Load, served: Sequence[Served], cost: Cost) -> Table:
    seconds = "{:.2f}".format
    return Table(
        f"Throughput and latency. Predicted: {1e3 * cost.per_step:.1f} ms per step and "
        f"{1e3 * cost.per_token:.2f} ms per token",
        [
            Column("blocks", "pool\n(blocks)"),
            Column("mode", "mode"),
            Column("steps", "steps"),
            Column("speed", "output\ntokens/s", "{:.1f}".format),
            Column("mean_steps", "latency, mean\n(steps)", "{:.0f}".format),
            Column("p99_steps", "p99\n(steps)"),
            Column("mean_seconds", "latency,\nmean (s)", seconds),
            Column("p99_seconds", "p99\n(s)", seconds),
        ],
        [
            (
                one.blocks,
                one.mode,
                len(one.steps),
                _speed(load, one, cost),
                *one.latency(0),
                *one.latency(1),
            )
            for one in served
        ],
    )


def _lines(load: Load, served: Sequence[Served], cost: Cost) -> Iterator[Line]:
    all_blocks = sum(load.max_blocks)
    for mode in MODES:
        of_mode = [served[0], *(one for one in served[1:] if one.mode == mode)]
        pairs = [(one.blocks / all_blocks, _speed(load, one, cost)) for one in of_mode]
        yield Line(mode, [Point(share, pair.predicted) for share, pair in pairs], is_predicted=True)
        yield Line(mode, [Point(share, pair.measured) for share, pair in pairs])


def _picture(load: Load, served: Sequence[Served], cost: Cost) -> Picture:
    return Picture(
        title=f"{len(load.prompts)} requests with less and less memory",
        x="pool size, as a share of what all requests need",
        y="output tokens per second",
        lines=list(_lines(load, served, cost)),
        x_is_share=True,
    )


def _conclusion(load: Load, served: Sequence[Served]) -> str:
    all_blocks, (none, recompute, swap) = sum(load.max_blocks), served[-3:]
    speeds = [sum(load.answers) / one.seconds for one in (served[0], none, recompute, swap)]
    return (
        f"With {percent(none.blocks / all_blocks)} of the memory that all requests need, {none.admitted} of "
        f"{len(load.prompts)} start at once without preemption, and {recompute.admitted} with it. Recompute "
        f"preempts {len(recompute.preempted)} times and computes {recompute.recomputed(load).measured:,} "
        f"tokens again; swap copies {swap.copied:,} blocks out. Output tokens per second: {speeds[0]:.0f} in "
        f"the largest pool; in the smallest {speeds[1]:.0f} without preemption, {speeds[2]:.0f} with "
        f"recompute, {speeds[3]:.0f} with swap."
    )
