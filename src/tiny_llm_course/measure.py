"""One side of `pdm run compare`: a day's workload, run on this process's overlay.

    python -m tiny_llm_course.measure 1.2 work result.npz

runs the workload once without measuring and prints `ready`. For each line on its standard input it runs the
workload again and prints the seconds. At the end of the input it stores the result and MLX's peak memory. The
workload's input is the same every time. The learner's own output goes to standard error.
"""

import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from .days import demonstration
from .errors import CourseError
from .learner import learners_errors
from .repo import Repo

READY = "ready"


def main() -> None:
    """Run the workload that the command line names; an error in the learner's code becomes one line."""
    day, function, target = sys.argv[1:]
    try:
        with learners_errors(Repo.here()):
            _measure(day, function, Path(target))
    except CourseError as error:
        sys.exit(str(error))


def _measure(day: str, function: str, target: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    work = getattr(demonstration(day), function)()
    mx.eval(work())  # the first run includes one-time costs
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out: mx.array | None = None
    print(READY, file=answers, flush=True)
    for _ in sys.stdin:
        out = None  # free the result of the repetition before: the peak includes one result
        start = time.perf_counter()
        out = work()
        mx.eval(out)
        print(time.perf_counter() - start, file=answers, flush=True)
    peak = mx.get_peak_memory() - before
    assert out is not None, "no repetition"
    np.savez(target, out=_as_numpy(out), peak=np.array(peak))


def _as_numpy(out: mx.array) -> np.ndarray:
    """A NumPy array. Integers, such as token ids, stay integers; everything else becomes float32."""
    return np.array(out if mx.issubdtype(out.dtype, mx.integer) else out.astype(mx.float32))


if __name__ == "__main__":
    main()
