"""One stream, measured: `bench latency`."""

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

from tiny_llm import LLM, SamplingParams

from .workload import Progress, RandomPrompts, what_was_run


class LatencyRun(NamedTuple):
    """What is run: prompts and outputs in tokens, and how often."""

    prefill_tokens: int
    prompt_tokens: int
    output_tokens: int
    repetitions: int
    warmups: int
    seed: int


class Stream(NamedTuple):
    """Seconds from the request to its first token, and from there to its last."""

    first: float
    rest: float


def measure_latency(llm: LLM, run: LatencyRun, progress: Progress) -> dict[str, object]:
    """Medians over the repetitions, their spread, and what was run."""
    prompts = RandomPrompts(llm, run.seed)
    prefills, decodes = [], []
    total = run.warmups + run.repetitions
    for repetition in range(total):
        progress("bench latency", repetition, total)
        prefills.append(_stream(llm, prompts.tokens(run.prefill_tokens), 1))
        decodes.append(_stream(llm, prompts.tokens(run.prompt_tokens), run.output_tokens))
    progress("bench latency", total, total)
    prefills, decodes = prefills[run.warmups :], decodes[run.warmups :]
    decode = _spread([(run.output_tokens - 1) / stream.rest for stream in decodes])
    prefill = _spread([run.prefill_tokens / stream.first for stream in prefills])
    ttft = _spread([1000 * stream.first for stream in decodes])
    return {
        "decode_tokens_per_s": decode["median"],
        "prefill_tokens_per_s": prefill["median"],
        "ttft_ms": ttft["median"],
        "decode_tokens_per_s_spread": decode,
        "prefill_tokens_per_s_spread": prefill,
        "ttft_ms_spread": ttft,
        "run": what_was_run(llm, run._asdict()),
    }


def _stream(llm: LLM, tokens: list[int], max_tokens: int) -> Stream:
    """Run one greedy request alone, end-of-sequence tokens ignored."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = perf_counter()
    moments = [perf_counter() for _ in llm.stream(tokens, params)]
    return Stream(moments[0] - start, moments[-1] - moments[0])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}
