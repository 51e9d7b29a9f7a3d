"""Measures a day's work on the overlay of this process: one side of what `pdm run compare` shows.

    python -m tiny_llm_course.measure 1.1 result.npz

writes what came out, the seconds of each repetition, and the most memory that MLX held.
Inputs are the same every time.
"""

import sys
import time

import mlx.core as mx
import numpy as np

from .days import demonstration

REPEAT_SECONDS = 1.0
MOST_REPETITIONS = 50


def main() -> None:
    """Run the work named on the command line and store what came of it."""
    day, target = sys.argv[1:]
    work = demonstration(day).work()
    out = work()
    mx.eval(out)  # the first run pays for what is made once
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < REPEAT_SECONDS and len(seconds) < MOST_REPETITIONS):
        start = time.perf_counter()
        out = work()
        mx.eval(out)
        seconds.append(time.perf_counter() - start)
    peak = mx.get_peak_memory() - before
    np.savez(target, out=np.array(out.astype(mx.float32)), seconds=np.array(seconds), peak=np.array(peak))


if __name__ == "__main__":
    main()
