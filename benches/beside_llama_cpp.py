"""One stream beside llama.cpp: the same model file, threads and lengths, in turns, in one run.

llama.cpp is measured by its own `llama-bench`, which is not installed with this project: give its path.
Prefill is a prompt of 512 tokens; decode is 128 tokens after a prompt of one token, as llama-bench does it.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import tiny_llm_kernels
from tiny_llm import LLM, SamplingParams

PREFILL, DECODE = 512, 128


def ours(llm: LLM, prompt: Sequence[int], max_tokens: int) -> float:
    """Tokens per second: of the prompt for one output token, else of the outputs after the first."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    start = time.perf_counter()
    moments = [time.perf_counter() for _ in llm.stream(prompt, params)]
    if max_tokens == 1:
        return len(prompt) / (moments[0] - start)
    return (max_tokens - 1) / (moments[-1] - moments[0])


def theirs(llama_bench: Path, model: Path, prompt_tokens: int, output_tokens: int) -> float:
    """llama-bench's own tokens per second for one repetition."""
    lengths = ["-p", str(prompt_tokens), "-n", str(output_tokens), "-r", "1"]
    threads = ["-t", str(tiny_llm_kernels.num_threads())]
    command = [str(llama_bench), "-m", str(model), *lengths, *threads, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)
    return float(row["avg_ts"])


def main() -> None:
    """Print both engines' medians and the ratio of each pair of runs."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--llama-bench", type=Path, required=True, help="path of llama.cpp's llama-bench")
    args = options.parse_args()
    llm = LLM(max_num_seqs=1)
    prompt = [1000 + 37 * i % 30_000 for i in range(PREFILL)]
    jobs = {"prefill": (prompt, 1, (PREFILL, 0)), "decode": (prompt[:1], DECODE, (0, DECODE))}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, (tokens, max_tokens, lengths) in jobs.items():
        ours(llm, tokens, max_tokens)  # warm up
        pairs = [
            (ours(llm, tokens, max_tokens), theirs(args.llama_bench, llm.model_path, *lengths))
            for _ in range(args.repetitions)
        ]
        rows[name] = {
            "tiny_llm_tokens_per_s": harness.summary([a for a, _ in pairs]),
            "llama_cpp_tokens_per_s": harness.summary([b for _, b in pairs]),
            "ratio": harness.summary([a / b for a, b in pairs]),
        }
    text = "\n".join(
        f"{name:8} tiny-llm {row['tiny_llm_tokens_per_s']['median']:7.1f} tok/s   "
        f"llama.cpp {row['llama_cpp_tokens_per_s']['median']:7.1f} tok/s   "
        f"ratio {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f})"
        for name, row in rows.items()
    )
    harness.show({"benchmark": "beside_llama_cpp", "rows": rows}, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
