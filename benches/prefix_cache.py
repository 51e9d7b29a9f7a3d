"""What does prefix caching cost when nothing hits, and what does it gain when something does?

Without hits: the same requests with random prompts, by an engine with the cache and by one without it, which
take turns step by step, so that a busy neighbour meets both; the mean of the pairs' ratios and its 95%
interval. Expected: under 1%. The bookkeeping is timed alone as well: the same schedule without a model, with
the cache and without, and the difference as a share of the whole run's time.

With hits: prompts whose beginning all have in common, at 0, 50 and 99%: output tokens per second, and the
prompt tokens that were computed. Expected: throughput rises as far as prompts were what took the time.
"""

import math
import random
from statistics import fmean, stdev
from typing import Any

from tiny_llm.policies import NoPrefixSharing
from tiny_llm.prefix_sharing import PrefixSharing

import harness
from tiny_llm import LLM, EngineCore, PagedBatchManager, Policies, SamplingParams

BLOCK_SIZE, SEATS, BUDGET = 16, 16, 512
Prompts = list[list[int]]


def core(llm: LLM | None, cached: bool, blocks: int) -> EngineCore:
    """A fresh engine over the model's weights, or over no model."""
    policies = Policies(prefix=PrefixSharing if cached else NoPrefixSharing)
    model = None if llm is None else llm.model
    manager = PagedBatchManager(
        blocks, BLOCK_SIZE, SEATS, model=model, max_batched_tokens=BUDGET, policies=policies
    )
    return EngineCore(manager, ())


def request(engine: EngineCore, prompts: Prompts, num_outputs: int) -> None:
    """Let all requests arrive."""
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=num_outputs))


def serve(engine: EngineCore, prompts: Prompts, num_outputs: int) -> None:
    """All requests at once, to their ends."""
    request(engine, prompts, num_outputs)
    while engine.has_work:
        engine.step()


def schedule(engine: EngineCore, prompts: Prompts, num_outputs: int) -> None:
    """The same without a model: every sequence that is ready gets a token that nobody else has."""
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
    """Prompts of random tokens, of which all have the first `shared` in common."""
    vocab = llm.model_config.vocab_size
    common = [rng.randrange(100, vocab) for _ in range(round(length * shared))]
    return [common + [rng.randrange(100, vocab) for _ in range(length - len(common))] for _ in range(count)]


def in_turns(llm: LLM, prompts: Prompts, num_outputs: int) -> dict[bool, float]:
    """Seconds with the cache (True) and without it, of two engines that step in turns."""
    engines = {cached: core(llm, cached, blocks_of(prompts, num_outputs)) for cached in (True, False)}
    for engine in engines.values():
        request(engine, prompts, num_outputs)
    seconds = {True: 0.0, False: 0.0}
    first = True
    while engines[True].has_work:
        for cached in (first, not first):
            seconds[cached] += harness.timed(engines[cached].step)
        first = not first
    return seconds


def bookkeeping(prompts: Prompts, num_outputs: int, cached: bool) -> float:
    """Seconds of the schedule alone."""
    engine = core(None, cached, blocks_of(prompts, num_outputs))
    return harness.timed(lambda: schedule(engine, prompts, num_outputs))


def blocks_of(prompts: Prompts, num_outputs: int) -> int:
    """Blocks for all requests at once."""
    return sum(-(-(len(prompt) + num_outputs) // BLOCK_SIZE) for prompt in prompts)


def cost_without_hits(llm: LLM, pairs: int, length: int, num_outputs: int) -> dict[str, float]:
    """The cost in percent: of whole runs with a 95% interval, and of the bookkeeping alone."""
    rng = random.Random(0)
    ratios, whole, extra = [], [], []
    for index in range(pairs + 1):
        prompts = random_prompts(llm, rng, SEATS, length)
        seconds = in_turns(llm, prompts, num_outputs)
        alone = {cached: bookkeeping(prompts, num_outputs, cached) for cached in (True, False)}
        if index:  # the first pair warms up
            ratios.append(math.log(seconds[True] / seconds[False]))
            whole.append(seconds[False])
            extra.append(alone[True] - alone[False])
    mean, half = fmean(ratios), 1.96 * stdev(ratios) / math.sqrt(len(ratios))
    low, middle, high = (100 * math.expm1(x) for x in (mean - half, mean, mean + half))
    return {
        "percent": middle,
        "low": low,
        "high": high,
        "bookkeeping_percent": 100 * sum(extra) / sum(whole),
    }


def gain(llm: LLM, shared: float, repetitions: int, length: int, num_outputs: int) -> dict[str, Any]:
    """Output tokens per second with the cache and without, and how much of the prompts was computed."""
    rng = random.Random(1)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    computed = 1.0
    blocks = SEATS * (-(-(length + num_outputs) // BLOCK_SIZE))
    for repetition in range(repetitions):
        prompts = random_prompts(llm, rng, SEATS, length, shared)
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
    """Print the cost without hits, and the gain with them."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--pairs", type=int, default=12, help="pairs of runs without hits (default: 12)")
    options.add_argument("--prompt-len", type=int, default=96, help="tokens of a prompt without hits")
    options.add_argument("--shared-len", type=int, default=256, help="tokens of a prompt with hits")
    options.add_argument("--max-tokens", type=int, default=16, help="tokens of an answer (default: 16)")
    args = options.parse_args()
    llm = LLM()
    cost = cost_without_hits(llm, args.pairs, args.prompt_len, args.max_tokens)
    gains = [
        gain(llm, shared, args.repetitions, args.shared_len, args.max_tokens) for shared in (0.0, 0.5, 0.99)
    ]
    lines = [
        f"no hits: {cost['percent']:+.2f}% [{cost['low']:+.2f}, {cost['high']:+.2f}], {args.pairs} pairs",
        f"  bookkeeping alone: {cost['bookkeeping_percent']:+.3f}% of the run",
        f"{'in common':>10}{'computed':>10}{'with, tok/s':>13}{'without':>9}{'gain':>7}",
    ]
    for row in gains:
        fast, slow = row["with"]["median"], row["without"]["median"]
        computed = row["prompt_tokens_computed"]
        lines.append(f"{row['shared']:>10.0%}{computed:>10.1%}{fast:>13.1f}{slow:>9.1f}{fast / slow:>6.2f}x")
    result = {"benchmark": "prefix_cache", "without_hits": cost, "with_hits": gains, "pairs": args.pairs}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
