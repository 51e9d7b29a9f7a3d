"""Helpers for all benchmarks: options, timing, statistics, the machine's description, output."""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny_llm_kernels


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share; `doc` is its description."""
    made = argparse.ArgumentParser(
        prog=f"pdm run bench {Path(sys.argv[0]).stem}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    made.add_argument(
        "--repetitions", type=positive, default=5, help="timed repetitions (default: %(default)s)"
    )
    return made


def peers_parser(doc: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that also measures other engines."""
    made = parser(doc)
    made.add_argument(
        "--peers",
        type=Path,
        default=Path(".peers"),
        help="folder of the other engines' environments (default: .peers)",
    )
    made.add_argument("--llama-server", type=Path, help="path of llama-server (default: in --peers)")
    return made


def positive(text: str) -> int:
    """Parse a command-line count. Raises `ArgumentTypeError` unless it is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def timed(work: Callable[[], object]) -> float:
    """Run `work` once and return the seconds it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum: the machine is shared with other work, so one figure says little."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def interval(values: Sequence[float], samples: int = 2000) -> tuple[float, float]:
    """The 95% confidence interval of the median, by bootstrap with `samples` resamples."""
    numbers = random.Random(0)
    medians = sorted(statistics.median(numbers.choices(values, k=len(values))) for _ in range(samples))
    return medians[samples // 40], medians[-1 - samples // 40]


def machine() -> dict[str, Any]:
    """Describe the processor, the Python and MLX versions, the kernels and their number of threads."""
    kernels = tiny_llm_kernels
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "kernels": kernels.instruction_set() if kernels.available() else "none",
        "threads": kernels.num_threads() if kernels.available() else None,
    }


def print_progress(text: str) -> None:
    """Print to stderr what is running, for benchmarks whose rounds take minutes."""
    print(text, file=sys.stderr, flush=True)


def show(result: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print `result` as JSON, together with the machine's description, or print `text`."""
    print(json.dumps({**result, "machine": machine()}, indent=2) if as_json else text)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
