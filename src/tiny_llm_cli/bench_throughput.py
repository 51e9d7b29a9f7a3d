"""Measures many requests: `bench throughput`. Figures and names are those of `vllm bench serve`."""

import asyncio
from itertools import pairwise
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

from tiny_llm import LLM, SamplingParams

from .statistics_of import statistics_of
from .workload import Progress, RandomPrompts, run_conditions


class ThroughputRun(NamedTuple):
    """What to run: how many requests, how many at a time, and their lengths in tokens."""

    num_prompts: int
    max_concurrency: int
    min_input_tokens: int
    max_input_tokens: int
    output_tokens: int
    shared_prefix: int
    seed: int


class Timeline:
    """The arrival of one request and of each of its tokens, on the clock of `perf_counter`."""

    def __init__(self) -> None:
        self.arrival = perf_counter()
        self.moments: list[float] = []

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.moments[0] - self.arrival

    @property
    def e2el(self) -> float:
        """Seconds from arrival to the last token."""
        return self.moments[-1] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - earlier for earlier, later in pairwise(self.moments)]


def measure_throughput(llm: LLM, run: ThroughputRun, progress: Progress) -> dict[str, object]:
    """Run the requests in a closed loop and return the figures, and the conditions of the run."""
    random = RandomPrompts(llm, run.seed)
    prefix = random.tokens(run.shared_prefix)
    lengths = [random.length(run.min_input_tokens, run.max_input_tokens) for _ in range(run.num_prompts)]
    prompts = [prefix + random.tokens(length) for length in lengths]
    warmup = ThroughputRun(1, 1, 1, 1, 2, 0, run.seed)
    asyncio.run(_closed_loop(llm, [random.tokens(16)], warmup, lambda *_: None))

    start = perf_counter()
    timelines = asyncio.run(_closed_loop(llm, prompts, run, progress))
    duration = perf_counter() - start
    num_in, num_out = sum(map(len, prompts)), sum(len(timeline.moments) for timeline in timelines)
    gaps = [gap for timeline in timelines for gap in timeline.gaps]
    return {
        "duration": duration,
        "completed": len(timelines),
        "failed": 0,
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(timelines) / duration,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        **statistics_of("ttft", [timeline.ttft for timeline in timelines]),
        **statistics_of("tpot", [fmean(t.gaps) for t in timelines if t.gaps]),
        **statistics_of("itl", gaps),
        **statistics_of("e2el", [timeline.e2el for timeline in timelines]),
        "run": run_conditions(llm, run._asdict()),
    }


async def _closed_loop(
    llm: LLM, prompts: list[list[int]], run: ThroughputRun, progress: Progress
) -> list[Timeline]:
    """Run all prompts, `max_concurrency` at a time: a new one arrives when another one ends."""
    params = SamplingParams(temperature=0.0, max_tokens=run.output_tokens, ignore_eos=True)
    limit, timelines, num_ended = asyncio.Semaphore(run.max_concurrency), list[Timeline](), 0

    async def client(tokens: list[int]) -> None:
        nonlocal num_ended
        async with limit:
            timeline = Timeline()
            timelines.append(timeline)
            async for _ in llm.engine.generate(tokens, params):
                timeline.moments.append(perf_counter())
                progress("bench throughput", num_ended, len(prompts))
            num_ended += 1

    await asyncio.gather(*map(client, prompts))
    progress("bench throughput", num_ended, len(prompts))
    return timelines
