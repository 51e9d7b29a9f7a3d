"""Measures one request at a time: `bench latency`."""

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

from tiny_llm import LLM, SamplingParams

from .workload import Progress, RandomPrompts, run_conditions


class LatencyRun(NamedTuple):
    """What to run: the lengths of prompts and outputs in tokens, and how often."""

    prefill_tokens: int
    prompt_tokens: int
    output_tokens: int
    repetitions: int
    warmups: int
    seed: int


class Stream(NamedTuple):
    """Seconds from the request to its first token, and from the first token to the last."""

    first: float
    rest: float


def measure_latency(llm: LLM, run: LatencyRun, progress: Progress) -> dict[str, object]:
    """Return medians and extremes over the repetitions, and the conditions of the run."""
    prompts = RandomPrompts(llm, run.seed)
    prefills, decodes = [], []
    total = run.warmups + run.repetitions
    for repetition in range(total):
        progress("bench latency", repetition, total)
        prefills.append(_stream(llm, prompts.tokens(run.prefill_tokens), 1))
        decodes.append(_stream(llm, prompts.tokens(run.prompt_tokens), run.output_tokens))
    progress("bench latency", total, total)
    prefills, decodes = prefills[run.warmups :], decodes[run.warmups :]
    return {
        **_spread("decode_tokens_per_s", [(run.output_tokens - 1) / stream.rest for stream in decodes]),
        **_spread("prefill_tokens_per_s", [run.prefill_tokens / stream.first for stream in prefills]),
        **_spread("ttft_ms", [1000 * stream.first for stream in decodes]),
        "run": run_conditions(llm, run._asdict()),
    }


def _stream(llm: LLM, tokens: list[int], max_tokens: int) -> Stream:
    """Run one greedy request while nothing else runs; end-of-sequence tokens are ignored."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = perf_counter()
    moments = [perf_counter() for _ in llm.stream(tokens, params)]
    return Stream(moments[0] - start, moments[-1] - moments[0])


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median under `name`, the extremes under `name_min` and `name_max`."""
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
