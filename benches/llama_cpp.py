"""How fast is one stream compared with llama.cpp? Same model file and threads, interleaved runs.

llama.cpp is measured with its own `llama-bench`, which is not installed with this project: give its path.
"prefill" is a prompt of 512 tokens. "decode" is 128 tokens after a prompt of one token, as in llama-bench.
With `--depth N`, "decode at N" is 32 tokens after a context of N tokens. tiny-llm runs with 16-bit
activations, its default, and with 8-bit activations, which llama.cpp uses.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import tiny_llm_kernels
from tiny_llm import LLM, SamplingParams

PREFILL, DECODE = 512, 128


def measure_tiny_llm(llm: LLM, prompt: Sequence[int], max_tokens: int, salt: str) -> float:
    """Tokens per second: prompt tokens if max_tokens is 1, else output tokens after the first.

    A prompt is found in the prefix cache only under the salt that it was computed with.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, cache_salt=salt)
    start = time.perf_counter()
    moments = [time.perf_counter() for _ in llm.stream(prompt, params)]
    if max_tokens == 1:
        return len(prompt) / (moments[0] - start)
    return (max_tokens - 1) / (moments[-1] - moments[0])


def measure_llama_cpp(
    llama_bench: Path, model: Path, prompt_tokens: int, output_tokens: int, depth: int
) -> float:
    """Tokens per second of one repetition, as llama-bench reports them."""
    lengths = ["-p", str(prompt_tokens), "-n", str(output_tokens), "-d", str(depth), "-r", "1"]
    threads = ["-t", str(tiny_llm_kernels.num_threads())]
    command = [str(llama_bench), "-m", str(model), *lengths, *threads, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)
    return float(row["avg_ts"])


class Job(NamedTuple):
    """Prompt tokens and output tokens that are timed, after `depth` context tokens that are not."""

    prompt: int
    outputs: int
    depth: int = 0


def compare(llms: dict[str, LLM], job: Job, llama_bench: Path, repetitions: int) -> dict[str, Any]:
    """Measure all engines, interleaved: tokens per second of each, and our ratios to llama.cpp."""
    tokens = [1000 + 37 * i % 30_000 for i in range(job.depth or job.prompt or 1)]
    max_tokens = job.outputs + 1 if job.outputs else 1
    for llm in llms.values():
        measure_tiny_llm(llm, tokens, max_tokens, "")  # warm up
    path, runs = next(iter(llms.values())).model_path, []
    for repetition in range(repetitions):
        salt = "" if job.depth else f"run {repetition}"  # a timed prompt must not come from the cache
        run = {name: measure_tiny_llm(llm, tokens, max_tokens, salt) for name, llm in llms.items()}
        runs.append({**run, "llama.cpp": measure_llama_cpp(llama_bench, path, *job)})
    return {
        "tokens_per_s": {name: harness.summary([run[name] for run in runs]) for name in runs[0]},
        "ratio": {name: harness.summary([run[name] / run["llama.cpp"] for run in runs]) for name in llms},
    }


def main() -> None:
    """Print the median tokens per second of every engine, and the ratios."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--llama-bench", type=Path, required=True, help="path of llama.cpp's llama-bench")
    options.add_argument(
        "--depth", type=int, default=0, help="also decode after a context of this many tokens"
    )
    args = options.parse_args()
    llms = {f"{bits} bits": LLM(activation_bits=bits, max_num_seqs=1) for bits in (16, 8)}
    jobs = {"prefill": Job(PREFILL, 0), "decode": Job(0, DECODE)}
    if args.depth:
        jobs[f"decode at {args.depth}"] = Job(0, 32, args.depth)
    rows = {name: compare(llms, job, args.llama_bench, args.repetitions) for name, job in jobs.items()}
    lines = [f"{'':16}{'engine':>10}{'tok/s':>8}{'ratio':>7} (min to max)"]
    for name, row in rows.items():
        for engine, figures in row["tokens_per_s"].items():
            ratio = row["ratio"].get(engine)
            shown = f"{ratio['median']:>7.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
            lines.append(f"{name:16}{engine:>10}{figures['median']:>8.1f}{shown}")
    harness.show({"benchmark": "llama_cpp", "rows": rows}, as_json=args.json, text="\n".join(lines))


if __name__ == "__main__":
    main()
