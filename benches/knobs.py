"""What does each option of the engine change? The same load with the defaults, and with one option changed.

32 requests go to the embedded model, 16 at a time: each client sends its next request when its last one is
answered. Every other prompt begins with the same 200 tokens, like a system prompt. After that, prompts have
32 to 160 random tokens; answers have 32 to 96 tokens. Each run has a new engine, whose prefix cache is empty.
In each round all settings run once, in random order. Times and speeds are medians over the rounds; counts
are those of the first round.

  ttft, itl    time to the first token, and between two tokens: mean and 99th percentile
  pool         bytes of keys and values; with swapping, those of the host too
  held         the largest share of the pool's blocks that sequences held after a step
  hits         share of the prompt tokens that the prefix cache had
  computed     tokens that the model computed; more if preempted sequences compute theirs again
  equal        answers that have the same tokens as with the defaults

Expected: only `activation_bits` changes answers. A smaller `max_num_seqs` shortens ITL and lengthens TTFT. A
smaller `max_num_batched_tokens` shortens the longest ITLs. A small pool costs throughput, most of all if
nothing is preempted. Large blocks cost memory, but no time.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import harness
import tiny_llm_kernels
from tiny_llm import LLM, SamplingParams
from tiny_llm_cli.serve_load import Answer, figures

SMALL_POOL = 96  # blocks: about half of what the load needs at once
KNOBS: dict[str, dict[str, Any]] = {
    "default": {},
    "num_blocks": {"num_blocks": SMALL_POOL},
    "swap": {"num_blocks": SMALL_POOL, "preemption_mode": "swap"},
    "none": {"num_blocks": SMALL_POOL, "preemption_mode": "none"},
    "block_size": {"block_size": 128},
    "max_num_seqs": {"max_num_seqs": 4},
    "budget_64": {"max_num_batched_tokens": 64},
    "budget_2048": {"max_num_batched_tokens": 2048},
    "no_prefix_cache": {"enable_prefix_caching": False},
    "activation_bits": {"activation_bits": 8},
    "threads": {"threads": 1},
}
"""Options of the engine by the name of a row. `threads` is the number of threads of the kernels."""

PREFIX, SHORTEST, LONGEST = 200, 32, 160  # tokens of the shared prefix, and of a prompt's own part
ANSWERS = range(32, 97)  # tokens
TIMES = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "p99_itl_ms")


class Load(NamedTuple):
    """The token ids of each prompt, and the length of each answer in tokens."""

    prompts: Sequence[list[int]]
    answers: Sequence[int]

    @classmethod
    def drawn(cls, requests: int, seed: int) -> "Load":
        """Draw random tokens and lengths; every other prompt begins with the shared prefix."""
        draw = random.Random(seed)
        prefix = draw.choices(range(1000, 40_000), k=PREFIX)
        prompts = [
            [*prefix[: PREFIX * (1 - number % 2)], *_tokens(draw, draw.randint(SHORTEST, LONGEST))]
            for number in range(requests)
        ]
        return cls(prompts, [draw.choice(ANSWERS) for _ in prompts])


class Ran(NamedTuple):
    """One run: vLLM's figures for times and speed, the counts, and the tokens of each answer."""

    times: dict[str, Any]
    counts: dict[str, float]
    tokens: dict[int, list[int]]


def _tokens(draw: random.Random, length: int) -> list[int]:
    return draw.choices(range(1000, 40_000), k=length)


@contextmanager
def engine(options: dict[str, Any]) -> Iterator[LLM]:
    """A new engine with these options, which has answered one request; closed at the end."""
    engine_options = {name: value for name, value in options.items() if name != "threads"}
    threads = tiny_llm_kernels.num_threads()
    tiny_llm_kernels.set_num_threads(options.get("threads", threads))
    try:
        with LLM(**engine_options) as llm:
            llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
            yield llm
    finally:
        tiny_llm_kernels.set_num_threads(threads)


async def serve(llm: LLM, load: Load, clients: int) -> Ran:
    """Let the clients send all requests, one after the other each."""
    jobs = iter(enumerate(zip(load.prompts, load.answers, strict=True)))
    answers: list[Answer] = []
    tokens: dict[int, list[int]] = {}
    held = [0.0]

    async def client() -> None:
        for number, (prompt, length) in jobs:
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            answer, tokens[number] = Answer(), []
            async for event in llm.engine.generate(prompt, params):
                answer.moments.append(perf_counter())
                tokens[number] += event.token_ids
                stats = llm.engine.stats
                in_use = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
                held[0] = max(held[0], in_use / stats.num_blocks)
            answer.prompt_tokens, answer.output_tokens = len(prompt), len(tokens[number])
            answers.append(answer)

    before, start = llm.engine.stats, perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    times = figures(answers, perf_counter() - start)
    after, capacity = llm.engine.stats, llm.core.manager.capacity
    block_bytes = capacity.nbytes / after.num_blocks
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    counts = {
        "pool_bytes": round(capacity.nbytes + after.num_host_blocks * block_bytes),
        "held": held[0],
        "hits": (after.prefix_cache_hits - before.prefix_cache_hits) / queries,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "steps": sum(after.steps_of) - sum(before.steps_of),
        "computed": after.num_tokens - before.num_tokens,
    }
    return Ran(times, counts, tokens)


def measure(knobs: Sequence[str], requests: int, clients: int, repetitions: int) -> dict[str, Any]:
    """A row for each setting, by name."""
    rounds: list[dict[str, Ran]] = []
    for seed in range(repetitions):
        load, found = Load.drawn(requests, seed), {}
        for name in random.Random(seed).sample(knobs, len(knobs)):
            harness.print_progress(f"round {seed + 1} of {repetitions}: {name}")
            with engine(KNOBS[name]) as llm:
                found[name] = asyncio.run(serve(llm, load, clients))
        rounds.append(found)
    return {name: row(name, rounds) for name in knobs}


def row(name: str, rounds: Sequence[dict[str, Ran]]) -> dict[str, Any]:
    """The figures of one setting. over_default: its throughput over that of the defaults, round by round."""
    ran = [one[name] for one in rounds]
    defaults = [one["default"] for one in rounds]
    pairs = list(zip(ran, defaults, strict=True))
    return {
        **{figure: harness.summary([one.times[figure] for one in ran]) for figure in TIMES},
        "over_default": harness.summary([one.times[TIMES[0]] / two.times[TIMES[0]] for one, two in pairs]),
        **ran[0].counts,
        "answers": len(ran[0].tokens),
        "equal": sum(tokens == defaults[0].tokens[number] for number, tokens in ran[0].tokens.items()),
    }


def as_text(rows: dict[str, Any]) -> str:
    """A line for each setting."""
    heads = ("tok/s", "ratio", "TTFT ms", "p99", "ITL ms", "p99", "pool MiB", "held", "hits", "preempted")
    lines = [f"{'':16}" + "".join(f"{head:>10}" for head in (*heads, "steps", "computed", "equal"))]
    for name, one in rows.items():
        medians = [one[figure]["median"] for figure in TIMES]
        numbers = [f"{medians[0]:.0f}", f"{one['over_default']['median']:.2f}"]
        numbers += [f"{ms:.0f}" for ms in medians[1:]]
        numbers += [f"{one['pool_bytes'] / 2**20:.0f}", f"{one['held']:.0%}", f"{one['hits']:.0%}"]
        numbers += [f"{one[count]}" for count in ("preemptions", "steps", "computed", "equal")]
        lines.append(f"{name:16}" + "".join(f"{number:>10}" for number in numbers))
    return "\n".join(lines)


def main() -> None:
    """Measure all settings, or those that are named, and print a line for each."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--requests", type=harness.positive, default=32, help="requests (default: 32)")
    options.add_argument("--clients", type=harness.positive, default=16, help="clients (default: 16)")
    options.add_argument(
        "--knob", choices=KNOBS, action="append", help="only the defaults and this one; may be repeated"
    )
    options.set_defaults(repetitions=3)
    args = options.parse_args()
    knobs = list(dict.fromkeys(["default", *(args.knob or KNOBS)]))
    rows = measure(knobs, args.requests, args.clients, args.repetitions)
    run = {"requests": args.requests, "clients": args.clients, "repetitions": args.repetitions}
    result = {"benchmark": "knobs", "run": run, "rows": rows}
    harness.show(result, as_json=args.json, text=as_text(rows))


if __name__ == "__main__":
    main()
