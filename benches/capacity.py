"""How many sequences run at once in the same KV memory: contiguous caches, pages, pages with a prefix cache?

The same requests arrive at once at the embedded model, with the same bytes for keys and values: those of a
few contiguous caches of the maximum length. Prompts have a common prefix, then random tokens of a random
length. Counted at every step: running sequences. Counted at the end: answers that equal those of the
contiguous caches, token by token.

Expected: with contiguous caches, as many sequences as caches. With pages, as many as have blocks for their
current tokens. That is more than would fit if all had their full length (the column "at full length"). With
the prefix cache still more, because the common prefix is stored once. Throughput grows less than the number
of sequences: a step with more sequences takes longer, above all in prefill. Admission reserves blocks only
for the known tokens, so some sequences may be preempted and computed again.
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
SHORTEST, LONGEST = 32, 160  # tokens of a prompt after the common prefix

Answers = dict[str, list[int]]


class Workload(NamedTuple):
    """Prompts, the length of each answer and of the common prefix, in tokens."""

    prompts: Sequence[list[int]]
    output_len: int
    common: int

    @classmethod
    def drawn(cls, requests: int, common: int, output_len: int, seed: int) -> "Workload":
        """Draw prompts of random lengths and tokens after one random prefix."""
        draw = random.Random(seed)
        prefix = [draw.randrange(1000, 40_000) for _ in range(common)]
        lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(requests)]
        prompts = [prefix + [draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]
        return cls(prompts, output_len, common)

    def num_at_full_length(self, tokens: int, way: str, max_model_len: int) -> float:
        """How many sequences fit at full length, on average, into a pool of `tokens` tokens."""
        if way == "contiguous caches":
            return tokens // max_model_len
        shared = self.common // BLOCK_SIZE if way == "pages, prefix cache" else 0
        lengths = (len(prompt) + self.output_len - 1 for prompt in self.prompts)
        return (tokens // BLOCK_SIZE - shared) / fmean(
            -(-length // BLOCK_SIZE) - shared for length in lengths
        )


def serve(llm: LLM, load: Workload) -> tuple[dict[str, float], Answers]:
    """Run all requests; return the counts and the tokens of each answer."""
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
        "max_at_once": max(running),
        "mean_at_once": fmean(running),
        "steps": len(running),
        "preemptions": core.stats.num_preemptions - before,
        "output_tokens_per_s": sum(map(len, answers.values())) / seconds,
    }, answers


def measure(load: Workload, caches: int, max_model_len: int, repetitions: int) -> list[dict[str, Any]]:
    """One row for each way; every repetition has a new engine with empty caches."""
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
                "num_at_full_length": load.num_at_full_length(caches * max_model_len, way, max_model_len),
                **{name: found[0][name] for name in found[0] if name != "output_tokens_per_s"},
                "output_tokens_per_s": harness.summary([one["output_tokens_per_s"] for one in found]),
            }
        )
    return rows


def main() -> None:
    """Print how many sequences each way ran at once, and how fast."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--requests", type=int, default=32, help="number of requests (default: 32)")
    options.add_argument("--caches", type=int, default=2, help="contiguous caches (default: 2)")
    options.add_argument(
        "--max-model-len", type=int, default=2048, help="tokens of each cache (default: 2048)"
    )
    options.add_argument("--common", type=int, default=128, help="tokens of the common prefix (default: 128)")
    options.add_argument("--output-tokens", type=int, default=64, help="tokens of each answer (default: 64)")
    options.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: 0)")
    options.set_defaults(repetitions=1)
    args = options.parse_args()
    load = Workload.drawn(args.requests, args.common, args.output_tokens, args.seed)
    rows = measure(load, args.caches, args.max_model_len, args.repetitions)
    lines = [
        f"{'':20}{'KV memory':>12}{'at full length':>16}{'max at once':>13}{'mean':>7}{'preempted':>11}"
        f"{'steps':>7}{'equal':>7}{'output tok/s':>14}"
    ]
    for row in rows:
        speed = row["output_tokens_per_s"]["median"]
        lines.append(
            f"{row['way']:20}{row['kv_bytes'] / 2**20:>8.0f} MiB{row['num_at_full_length']:>16.1f}"
            f"{row['max_at_once']:>13}{row['mean_at_once']:>7.1f}{row['preemptions']:>11}{row['steps']:>7}"
            f"{row['equal_answers']:>7}{speed:>14.1f}"
            f"  {speed / rows[0]['output_tokens_per_s']['median']:.2f} x"
        )
    run = {name: value for name, value in vars(args).items() if name != "json"}
    result = {"benchmark": "capacity", "run": run, "rows": rows}
    harness.show(result, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
