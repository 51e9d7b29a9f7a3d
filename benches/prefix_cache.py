"""What does prefix caching cost without hits, and what does it gain with hits?

Without hits: an engine with the cache and one without it run the same requests with random prompts. They
alternate step by step, so that other work on the machine slows both. The figure is the mean ratio of the
pairs with its 95% confidence interval. Expected: a cost under 1%. The bookkeeping is also timed separately:
the same schedule without a model, with and without the cache; the difference as a share of the run's time.

With hits: prompts with a common prefix of 0, 50 and 99%: output tokens per second, and the share of prompt
tokens that were computed. Expected: throughput rises by the prefill time that the hits save.
"""

import math
import random
from statistics import fmean, stdev
from typing import Any

from tiny_llm.policies import NoPrefixSharing
from tiny_llm.prefix_sharing import PrefixSharing

import harness
from tiny_llm import LLM, EngineCore, PagedBatchManager, Policies, SamplingParams

BLOCK_SIZE, MAX_SEQS, BUDGET = 16, 16, 512  # tokens, sequences, tokens per step
Prompts = list[list[int]]


def core(llm: LLM | None, cached: bool, blocks: int) -> EngineCore:
    """A new engine with the model's weights, or without a model if `llm` is None."""
    policies = Policies(prefix=PrefixSharing if cached else NoPrefixSharing)
    model = None if llm is None else llm.model
    manager = PagedBatchManager(
        blocks, BLOCK_SIZE, MAX_SEQS, model=model, max_batched_tokens=BUDGET, policies=policies
    )
    return EngineCore(manager, ())


def add_requests(engine: EngineCore, prompts: Prompts, num_outputs: int) -> None:
    """Add all requests to an engine."""
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=num_outputs))


def serve(engine: EngineCore, prompts: Prompts, num_outputs: int) -> None:
    """Run all requests at once to completion."""
    add_requests(engine, prompts, num_outputs)
    while engine.has_work:
        engine.step()


def schedule(engine: EngineCore, prompts: Prompts, num_outputs: int) -> None:
    """Run the same schedule without a model: each sequence that is ready gets a new, unique token."""
    manager = engine.manager
    for index, prompt in enumerate(prompts):
        manager.add_request(prompt, str(index), SamplingParams(max_tokens=num_outputs))
    fresh = -1
    while manager.has_work:
        ready = list(manager.process_batch())
        manager.commit({seq_id: fresh - i for i, seq_id in enumerate(ready)})
        fresh -= len(ready)
        for seq_id in ready:
            if manager.sequence(seq_id).num_tokens == manager.sequence(seq_id).max_len:
                manager.finish(seq_id)


def random_prompts(llm: LLM, rng: random.Random, count: int, length: int, shared: float = 0.0) -> Prompts:
    """Random prompts; the first part, a share `shared` of the length, is common to all."""
    vocab = llm.model_config.vocab_size
    common = [rng.randrange(100, vocab) for _ in range(round(length * shared))]
    return [common + [rng.randrange(100, vocab) for _ in range(length - len(common))] for _ in range(count)]


def alternate(llm: LLM, prompts: Prompts, num_outputs: int) -> dict[bool, float]:
    """Seconds with the cache (True) and without it (False), of two engines that step alternately."""
    engines = {cached: core(llm, cached, blocks_needed(prompts, num_outputs)) for cached in (True, False)}
    for engine in engines.values():
        add_requests(engine, prompts, num_outputs)
    seconds = {True: 0.0, False: 0.0}
    first = True
    while engines[True].has_work:
        for cached in (first, not first):
            seconds[cached] += harness.timed(engines[cached].step)
        first = not first
    return seconds


def bookkeeping(prompts: Prompts, num_outputs: int, cached: bool) -> float:
    """Seconds of the schedule without a model."""
    engine = core(None, cached, blocks_needed(prompts, num_outputs))
    return harness.timed(lambda: schedule(engine, prompts, num_outputs))


def blocks_needed(prompts: Prompts, num_outputs: int) -> int:
    """Blocks that all requests need at once."""
    return sum(-(-(len(prompt) + num_outputs) // BLOCK_SIZE) for prompt in prompts)


def cost_without_hits(llm: LLM, pairs: int, length: int, num_outputs: int) -> dict[str, float]:
    """The cache's cost in percent of a run's time.

    Measured on whole runs, with a 95% interval, and on the bookkeeping only.
    """
    rng = random.Random(0)
    ratios, whole, extra = [], [], []
    for index in range(pairs + 1):
        prompts = random_prompts(llm, rng, MAX_SEQS, length)
        seconds = alternate(llm, prompts, num_outputs)
        booked = {cached: bookkeeping(prompts, num_outputs, cached) for cached in (True, False)}
        if index:  # the first pair warms up
            ratios.append(math.log(seconds[True] / seconds[False]))
            whole.append(seconds[False])
            extra.append(booked[True] - booked[False])
    mean, half = fmean(ratios), 1.96 * stdev(ratios) / math.sqrt(len(ratios))
    low, middle, high = (100 * math.expm1(x) for x in (mean - half, mean, mean + half))
    return {
        "percent": middle,
        "low": low,
        "high": high,
        "bookkeeping_percent": 100 * sum(extra) / sum(whole),
    }


def gain(llm: LLM, shared: float, repetitions: int, length: int, num_outputs: int) -> dict[str, Any]:
    """Output tokens per second with and without the cache, and the share of the prompts that was computed."""
    rng = random.Random(1)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    computed = 1.0
    blocks = MAX_SEQS * (-(-(length + num_outputs) // BLOCK_SIZE))
    for repetition in range(repetitions):
        prompts = random_prompts(llm, rng, MAX_SEQS, length, shared)
        for cached in (repetition % 2 == 0, repetition % 2 == 1):
            engine = core(llm, cached, blocks)
            seconds = harness.timed(lambda: serve(engine, prompts, num_outputs))  # noqa: B023
            speeds[cached].append(len(prompts) * num_outputs / seconds)
            if cached:
                stats = engine.stats
                computed = 1 - stats.prefix_cache_hits / stats.prefix_cache_queries
    return {
        "shared": shared,
        "prompt_tokens_computed": computed,
        "with": harness.summary(speeds[True]),
        "without": harness.summary(speeds[False]),
    }


def main() -> None:
    """Print the cost without hits and the gain with hits."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--pairs", type=int, default=12, help="pairs of runs without hits (default: 12)")
    options.add_argument(
        "--prompt-len", type=int, default=96, help="prompt tokens without hits (default: 96)"
    )
    options.add_argument("--shared-len", type=int, default=256, help="prompt tokens with hits (default: 256)")
    options.add_argument("--max-tokens", type=int, default=16, help="tokens of each answer (default: 16)")
    args = options.parse_args()
    llm = LLM()
    cost = cost_without_hits(llm, args.pairs, args.prompt_len, args.max_tokens)
    gains = [
        gain(llm, shared, args.repetitions, args.shared_len, args.max_tokens) for shared in (0.0, 0.5, 0.99)
    ]
    lines = [
        f"time with the cache, no hits: {cost['percent']:+.2f}% "
        f"(95% interval {cost['low']:+.2f}% to {cost['high']:+.2f}%, {args.pairs} pairs)",
        f"  bookkeeping, timed separately: {cost['bookkeeping_percent']:+.3f}% of the run",
        f"{'in common':>10}{'computed':>10}{'cache on, tok/s':>17}{'cache off, tok/s':>18}{'gain':>7}",
    ]
    for row in gains:
        fast, slow = row["with"]["median"], row["without"]["median"]
        computed = row["prompt_tokens_computed"]
        lines.append(f"{row['shared']:>10.0%}{computed:>10.1%}{fast:>17.1f}{slow:>18.1f}{fast / slow:>6.2f}x")
    result = {"benchmark": "prefix_cache", "without_hits": cost, "with_hits": gains, "pairs": args.pairs}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
