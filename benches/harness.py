"""What every benchmark shares: a clock, the machine's description, and one way to print a result."""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny_llm_kernels


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; its description is the module's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.add_argument("--repetitions", type=positive, default=5, help="timed repetitions (default: 5)")
    return made


def positive(text: str) -> int:
    """An argument that counts something: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on")
    return int(text)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest: these machines are shared, so a single figure says little."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def interval(values: Sequence[float], samples: int = 2000) -> tuple[float, float]:
    """A 95% interval for the median, by bootstrap: medians of samples drawn from the values."""
    numbers = random.Random(0)
    medians = sorted(statistics.median(numbers.choices(values, k=len(values))) for _ in range(samples))
    return medians[samples // 40], medians[-1 - samples // 40]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    kernels = tiny_llm_kernels
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "kernels": kernels.instruction_set() if kernels.available() else "none",
        "threads": kernels.num_threads() if kernels.available() else None,
    }


def show(result: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print the result, as JSON with the machine's description or as text for people."""
    print(json.dumps({**result, "machine": machine()}, indent=2) if as_json else text)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
