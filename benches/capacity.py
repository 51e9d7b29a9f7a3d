"""How many sequences fit in the same bytes? Contiguous caches, pages, pages with a prefix cache.

The same requests, all at once, to the embedded model under the same bytes for keys and values: those of a few
contiguous caches of the longest length. Prompts are random tokens, of random lengths, behind a beginning that
all have in common. Counted at every step: sequences that run; and at the end: answers that are those of the
contiguous caches, token by token.

Expected: as many sequences as caches where memory is contiguous; on pages as many as have room for the tokens
that they hold by then ("whole lives" counts those whose last token would fit, too), and more where the common
beginning is there once. Throughput grows less: a step of more sequences takes longer, most of all in
prefill. Pages are promised for what is known, so that some sequences may have to give way, and be computed
again (preemptions).
"""

import random
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import harness
from tiny_llm import LLM, SamplingParams

WAYS: dict[str, dict[str, Any]] = {
    "contiguous caches": {"batching": "dense"},
    "pages": {"batching": "paged", "enable_prefix_caching": False},
    "pages, prefix cache": {"batching": "paged", "enable_prefix_caching": True},
}
BLOCK_SIZE = 16
SHORTEST, LONGEST = 32, 160  # tokens of a prompt behind what all have in common

Answers = dict[str, list[int]]


class Workload(NamedTuple):
    """Prompts, the tokens of each answer, and the tokens that the prompts have in common."""

    prompts: Sequence[list[int]]
    output_len: int
    common: int

    @classmethod
    def drawn(cls, requests: int, common: int, output_len: int, seed: int) -> "Workload":
        """Lengths and tokens of random prompts."""
        draw = random.Random(seed)
        beginning = [draw.randrange(1000, 40_000) for _ in range(common)]
        lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(requests)]
        prompts = [beginning + [draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]
        return cls(prompts, output_len, common)

    def whole_lives(self, tokens: int, way: str, max_model_len: int) -> float:
        """Mean sequences whose whole lives fit into so many tokens of room, by counting."""
        if way == "contiguous caches":
            return tokens // max_model_len
        shared = self.common // BLOCK_SIZE if way == "pages, prefix cache" else 0
        lives = (len(prompt) + self.output_len - 1 for prompt in self.prompts)
        return (tokens // BLOCK_SIZE - shared) / fmean(-(-life // BLOCK_SIZE) - shared for life in lives)


def serve(llm: LLM, load: Workload) -> tuple[dict[str, float], Answers]:
    """Run all requests; what was counted, and the tokens of each answer."""
    core, call, before = llm.core, llm.engine.call, llm.core.stats.num_preemptions
    params = SamplingParams(temperature=0, max_tokens=load.output_len, ignore_eos=True)
    start = perf_counter()
    for number, prompt in enumerate(load.prompts):
        call(partial(core.add_request, str(number), prompt, params))
    answers: Answers = {str(number): [] for number in range(len(load.prompts))}
    running = []
    while core.has_work:
        outputs = call(core.step)
        running.append(len(core.manager.running) + sum(out.finish_reason is not None for out in outputs))
        for output in outputs:
            answers[output.seq_id].append(output.token)
    seconds = perf_counter() - start
    return {
        "most_at_once": max(running),
        "mean_at_once": fmean(running),
        "steps": len(running),
        "preemptions": core.stats.num_preemptions - before,
        "output_tokens_per_s": sum(map(len, answers.values())) / seconds,
    }, answers


def measure(load: Workload, caches: int, max_model_len: int, repetitions: int) -> list[dict[str, Any]]:
    """A row for each way; every repetition has an engine of its own, whose caches are empty."""
    rows: list[dict[str, Any]] = []
    expected: Answers = {}
    for way, options in WAYS.items():
        found = []
        for _ in range(repetitions):
            llm = LLM(
                block_size=BLOCK_SIZE,
                num_blocks=caches * max_model_len // BLOCK_SIZE,
                max_model_len=max_model_len,
                max_num_seqs=len(load.prompts),
                **options,
            )
            figures, answers = serve(llm, load)
            expected = expected or answers
            equal = sum(answers[number] == expected[number] for number in answers)
            found.append({**figures, "equal_answers": equal})
        rows.append(
            {
                "way": way,
                "kv_bytes": llm.core.manager.capacity.nbytes,
                "whole_lives": load.whole_lives(caches * max_model_len, way, max_model_len),
                **{name: found[0][name] for name in found[0] if name != "output_tokens_per_s"},
                "output_tokens_per_s": harness.summary([one["output_tokens_per_s"] for one in found]),
            }
        )
    return rows


def main() -> None:
    """Print what each way served at once, and how fast."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--requests", type=int, default=32, help="requests in all (default: 32)")
    options.add_argument("--caches", type=int, default=2, help="contiguous caches in the bytes (default: 2)")
    options.add_argument("--max-model-len", type=int, default=2048, help="tokens of each (default: 2048)")
    options.add_argument("--common", type=int, default=128, help="tokens all begin with (default: 128)")
    options.add_argument("--output-tokens", type=int, default=64, help="of each answer (default: 64)")
    options.add_argument("--seed", type=int, default=0, help="source of prompts (default: 0)")
    options.set_defaults(repetitions=1)
    args = options.parse_args()
    load = Workload.drawn(args.requests, args.common, args.output_tokens, args.seed)
    rows = measure(load, args.caches, args.max_model_len, args.repetitions)
    lines = [
        f"{'':20}{'KV bytes':>12}{'whole lives':>13}{'most at once':>14}{'mean':>7}{'preempted':>11}"
        f"{'steps':>7}{'equal':>7}{'output tok/s':>14}"
    ]
    for row in rows:
        speed = row["output_tokens_per_s"]["median"]
        lines.append(
            f"{row['way']:20}{row['kv_bytes'] / 2**20:>8.0f} MiB{row['whole_lives']:>13.1f}"
            f"{row['most_at_once']:>14}{row['mean_at_once']:>7.1f}{row['preemptions']:>11}{row['steps']:>7}"
            f"{row['equal_answers']:>7}{speed:>14.1f}"
            f"  {speed / rows[0]['output_tokens_per_s']['median']:.2f} x"
        )
    run = {name: value for name, value in vars(args).items() if name != "json"}
    result = {"benchmark": "capacity", "run": run, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
