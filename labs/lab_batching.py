"""2.7: What it gains that a request joins and leaves a batch between any two steps.

The same requests are served on the embedded model in three ways, each with contiguous caches: one at a time;
in static batches, each of which ends with its longest answer; and with continuous batching, where the next
request starts as soon as a slot is free.

The numbers of steps follow from the lengths of the answers. The speed follows from the steps and from a line
fitted to the first run (time per step and time per token), which does not include what the attention of each
further sequence costs.

\b
pdm run lab batching
pdm run lab batching --requests 16 --slots 4 --plot batching.svg
"""

import random
from collections.abc import Iterator, Sequence
from heapq import heapreplace
from itertools import pairwise
from statistics import fmean
from time import perf_counter
from typing import Annotated, NamedTuple

import typer
from tiny_llm.dense_batch import DenseBatchManager

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from step_cost import Cost, Step
from tiny_llm import LLM, EngineCore, SamplingParams

SHORTEST, LONGEST = 8, 32  # tokens of a prompt
MISSED = 1.5  # from this factor on, the conclusion says that speeds are lower than predicted
SMALLEST_SHARE = 1 / 16  # the shortest answer, as a share of the longest; the logarithm is evenly distributed


def measure(
    progress: Progress,
    requests: Annotated[
        int, typer.Option(min=2, max=256, help="Number of requests, which arrive at once.")
    ] = 32,
    slots: Annotated[int, typer.Option(min=2, max=64, help="Sequences that run at once.")] = 8,
    output_len: Annotated[int, typer.Option(min=16, max=1000, help="Tokens of the longest answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the lengths and tokens.")] = 0,
) -> Result:
    """Serve the requests in each way, and compare with the predictions."""
    load = Load.drawn(requests, output_len, seed)
    ways = [
        Way("one at a time", 1, 1),
        Way("static batches", slots, slots),
        Way("continuous", slots, requests),
    ]
    progress("batching: reading the model", 0, len(ways))
    llm = LLM(num_blocks=8)
    _serve(llm, Load(load.prompts[:1], [4]), ways[0])  # warms up
    served = []
    for done, way in enumerate(ways):
        progress("batching: ways served:", done, len(ways))
        served.append(_serve(llm, load, way))
    progress("batching", len(ways), len(ways))
    return Result(
        title="Joining and leaving between two steps",
        question="Answers have different lengths. What does a batch gain if no request waits for another?",
        tables=[_table_of_steps(load, served), _table_of_speed(load, served)],
        conclusion=_conclusion(load, served),
        picture=_picture(served[1:]),
    )


class Load(NamedTuple):
    """Requests: the token ids of each prompt, and the length of each answer in tokens."""

    prompts: Sequence[list[int]]
    answers: Sequence[int]

    @classmethod
    def drawn(cls, requests: int, output_len: int, seed: int) -> "Load":
        """Random tokens; short prompts; answers from a sixteenth to all of output_len, most of them short."""
        draw = random.Random(seed)
        lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(requests)]
        prompts = [[draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]
        shares = [SMALLEST_SHARE ** draw.random() for _ in range(requests)]
        return cls(prompts, [round(share * output_len) for share in shares])


class Way(NamedTuple):
    """A way to serve requests. slots: sequences that run at once. group: requests that are added at once.

    The next group is added when all requests of the one before have ended.
    """

    name: str
    slots: int
    group: int

    def last_steps(self, answers: Sequence[int]) -> list[int]:
        """The step in which each request gets its last token, counted from 1.

        A prompt takes one step, so an answer takes as many steps as it has tokens. It starts in the slot that
        is free first.
        """
        ends: list[int] = []
        for start in range(0, len(answers), self.group):
            free_after = [max(ends, default=0)] * self.slots  # a heap: the last step of each slot
            for answer in answers[start : start + self.group]:
                ends.append(free_after[0] + answer)
                heapreplace(free_after, ends[-1])
        return ends


# ---- On the model ----


class Served(NamedTuple):
    """A run. first_steps: by request, the step in which it gets its first token, counted from 1."""

    way: Way
    steps: list[Step]
    first_steps: dict[str, int]

    @property
    def seconds(self) -> float:
        """Seconds until all requests have ended."""
        return sum(step.seconds for step in self.steps)

    def num_steps(self, load: Load) -> Pair:
        """The number of steps."""
        return Pair(max(self.way.last_steps(load.answers)), len(self.steps))

    def used(self, load: Load) -> Pair:
        """The share of the slots, over all steps, that compute for a request."""
        predicted, measured = self.num_steps(load)
        running = sum(step.running for step in self.steps)
        return Pair(sum(load.answers) / (predicted * self.way.slots), running / (measured * self.way.slots))

    def mean_first_step(self, load: Load) -> Pair:
        """The step of the first token, the mean over all requests."""
        ends = self.way.last_steps(load.answers)
        starts = [end - answer + 1 for end, answer in zip(ends, load.answers, strict=True)]
        return Pair(fmean(starts), fmean(self.first_steps.values()))

    def speed(self, load: Load, cost: Cost) -> Pair:
        """Output tokens per second."""
        outputs, tokens = sum(load.answers), sum(step.tokens for step in self.steps)
        return Pair(outputs / cost.seconds(len(self.steps), tokens), outputs / self.seconds)


def _serve(llm: LLM, load: Load, way: Way) -> Served:
    """Add the requests group by group, and step until the last one has ended."""
    longest = max(len(p) + answer for p, answer in zip(load.prompts, load.answers, strict=True))
    budget = way.slots * LONGEST  # a prompt never waits for tokens
    manager = DenseBatchManager(way.slots, longest, model=llm.model, max_batched_tokens=budget)
    core, served = EngineCore(manager, eos_token_ids=()), Served(way, [], {})
    for start in range(0, len(load.prompts), way.group):
        for user in range(start, min(start + way.group, len(load.prompts))):
            params = SamplingParams(temperature=0, max_tokens=load.answers[user])
            core.add_request(str(user), load.prompts[user], params)
        while core.has_work:
            before = core.stats.num_tokens
            step_start = perf_counter()
            outputs = core.step()
            seconds = perf_counter() - step_start
            served.steps.append(Step(core.stats.num_tokens - before, len(outputs), seconds))
            for output in outputs:
                served.first_steps.setdefault(output.seq_id, len(served.steps))
    return served


# ---- The result ----


def _table_of_steps(load: Load, served: Sequence[Served]) -> Table:
    return Table(
        f"{len(load.prompts)} requests, {sum(map(len, load.prompts)):,} tokens in and "
        f"{sum(load.answers):,} out; 1 slot for one request at a time, otherwise {served[-1].way.slots}",
        [
            Column("way", "way"),
            Column("steps", "steps"),
            Column("used", "slots in use", percent),
            Column("first_step", "step of the first\ntoken, mean", "{:,.0f}".format),
        ],
        [(one.way.name, one.num_steps(load), one.used(load), one.mean_first_step(load)) for one in served],
    )


def _table_of_speed(load: Load, served: Sequence[Served]) -> Table:
    cost = Cost.of(served[0].steps)
    return Table(
        f"Speed. Predicted: {1e3 * cost.per_step:.1f} ms per step, {1e3 * cost.per_token:.1f} ms per token",
        [
            Column("way", "way"),
            Column("step_ms", "step, mean (ms)", "{:,.1f}".format),
            Column("speed", "output tokens/s", "{:,.0f}".format),
        ],
        [(one.way.name, 1e3 * one.seconds / len(one.steps), one.speed(load, cost)) for one in served],
    )


def _picture(served: Sequence[Served]) -> Picture:
    return Picture(
        title="Sequences that compute in each step",
        x="step",
        y="sequences",
        lines=[Line(one.way.name, list(_changes([step.running for step in one.steps]))) for one in served],
    )


def _changes(running: Sequence[int]) -> Iterator[Point]:
    """The first and the last point of a line over the steps, and the points around each change."""
    yield Point(1, running[0])
    for step, (before, after) in enumerate(pairwise(running), start=1):
        if before != after:
            yield Point(step, before)
            yield Point(step + 1, after)
    yield Point(len(running), running[-1])


def _conclusion(load: Load, served: Sequence[Served]) -> str:
    cost = Cost.of(served[0].steps)
    speeds = [one.speed(load, cost) for one in served]
    alone, static, continuous = (
        (len(one.steps), speed.measured) for one, speed in zip(served, speeds, strict=True)
    )
    slots = served[-1].way.slots
    return (
        f"With {slots} slots, static batches need {static[0]:,} steps and continuous batching "
        f"{continuous[0]:,}. One request at a time needs {alone[0]:,}. Continuous batching gives "
        f"{continuous[1] / static[1]:.1f} times as many tokens per second as static batches, and "
        f"{continuous[1] / alone[1]:.1f} times as many as one request at a time.{_missed(speeds)}"
    )


def _missed(speeds: Sequence[Pair]) -> str:
    """The cause, after a space, if a speed is lower than predicted by a factor of `MISSED`; or nothing."""
    factor = max(speed.predicted / speed.measured for speed in speeds)
    if factor < MISSED:
        return ""
    return (
        f" Speeds are up to {factor:.1f} times lower than predicted: the line does not include what "
        "the attention of each further sequence costs. A busy machine can change the factor."
    )
