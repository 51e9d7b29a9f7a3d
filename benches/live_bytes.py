"""Does the engine leak memory? MLX's active memory over a thousand requests, a third of them cancelled.

Prints MLX's active memory and the free blocks after every hundred requests to one engine. Some requests are
too long and are rejected. Unevaluated graphs or references to old pool arrays would show as growth.
"""

import random
from functools import partial

import mlx.core as mx

import harness
from tiny_llm import LLM, SamplingParams


def run_hundred(llm: LLM, rng: random.Random, first: int) -> int:
    """Run a hundred mixed requests; return how many were rejected at admission."""
    core, call, rejected = llm.core, llm.engine.call, 0
    for i in range(first, first + 100):
        prompt = [rng.randrange(1000, 40_000) for _ in range(rng.randint(1, 48))]
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 3]),
            temperature=rng.choice([0.0, 0.8]),
            max_tokens=rng.choice([1, 8, 40, 10**6]),
            ignore_eos=True,
            logprobs=rng.choice([None, None, 2]),
        )
        try:
            call(partial(core.add_request, str(i), prompt, params))
        except ValueError:
            rejected += 1
        call(core.step)
        if rng.random() < 1 / 3:
            call(partial(core.cancel, str(i)))
    while core.has_work:
        call(core.step)
    return rejected


def main() -> None:
    """Print active memory and free blocks after every hundred requests."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--hundreds", type=int, default=10, help="hundreds of requests (default: 10)")
    args = options.parse_args()
    llm, rng, rows = LLM(num_blocks=24, max_num_seqs=16), random.Random(0), []
    for hundred in range(args.hundreds):
        rejected = run_hundred(llm, rng, hundred * 100)
        stats = llm.core.stats
        rows.append(
            {
                "requests": (hundred + 1) * 100,
                "rejected": rejected,
                "live_bytes": mx.get_active_memory(),
                "free_blocks": stats.num_free_blocks + stats.num_cached_blocks,
                "preemptions": stats.num_preemptions,
            }
        )
    text = "\n".join(
        f"{row['requests']:>5} requests  {row['live_bytes'] / 2**20:8.2f} MiB active  "
        f"{row['free_blocks']} blocks free  {row['preemptions']} preemptions in total"
        for row in rows
    )
    harness.show({"benchmark": "live_bytes", "rows": rows}, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
