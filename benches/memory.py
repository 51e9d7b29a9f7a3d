"""How much memory does the engine need besides weights and KV pool? Peak resident memory of whole processes.

Three `tiny-llm` processes: one that loads the model and runs one full step (`info`), one that serves 32
requests, 16 at a time (`bench throughput`), and one with a pool as small as llama.cpp's context. llama.cpp is
measured with its own `llama-bench` (512 tokens in, 128 out), which is not installed with this project: give
its path. It maps the model file; the pages that it touched count as resident.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

MIB = 1 << 20
CONTEXT = 512 + 128
OURS = [sys.executable, "-m", "tiny_llm_cli"]


def measure_peak(command: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its peak resident memory in bytes, and its output."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), printed


def engine_info(*options: str) -> dict[str, Any]:
    """The output of `tiny-llm info --json`: model, pool and memory."""
    found: dict[str, Any] = json.loads(measure_peak([*OURS, "info", "--json", *options])[1])
    return found


def row(peak: int, weights: int, pool: int) -> dict[str, int]:
    """One process's figures, in bytes."""
    return {"weights": weights, "pool": pool, "peak": peak, "beyond": peak - weights - pool}


def main() -> None:
    """Print the weights, the pool and the peak of each process, and the rest of the peak ("beyond")."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--llama-bench", type=Path, help="path of llama.cpp's llama-bench")
    args = options.parse_args()
    found = engine_info()
    memory = found["memory"]
    weights, pool = memory["weights"], memory["pool"]
    rows = {
        "tiny-llm, loaded": row(memory["peak_at_load"], weights, pool),
        "tiny-llm, one full step": row(memory["peak_in_service"], weights, pool),
        "tiny-llm, 32 requests": row(
            measure_peak([*OURS, "bench", "throughput", "--json"])[0], weights, pool
        ),
    }
    small = engine_info("--num-blocks", str(-(-CONTEXT // 16)))["memory"]
    rows[f"tiny-llm, {CONTEXT} tokens"] = row(small["peak_in_service"], weights, small["pool"])
    if args.llama_bench is not None:
        model = Path(found["model"]["path"])
        lengths = ["-p", "512", "-n", "128", "-r", "1", "-t", str(harness.machine()["threads"])]
        peak, _ = measure_peak([str(args.llama_bench), "-m", str(model), *lengths])
        rows[f"llama.cpp, {CONTEXT} tokens"] = row(peak, model.stat().st_size, small["pool"])
    text = "\n".join(
        f"{name:24}" + "".join(f"{key:>8} {value / MIB:6.1f}" for key, value in figures.items()) + " MiB"
        for name, figures in rows.items()
    )
    harness.show({"benchmark": "memory", "rows": rows}, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
