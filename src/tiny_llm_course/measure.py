"""One side of `pdm run compare`: a day's work on the overlay of this process, a repetition each time it is
asked.

    python -m tiny_llm_course.measure 1.2 work result.npz

makes one run that is not measured and writes `ready`. For each line that it reads it repeats the work and
writes the seconds. When its input ends it stores what came out, and the most memory that MLX held. Inputs
are the same every time. What the learner's code prints goes to the standard error.
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
    """Measure what the command line names; what goes wrong in the learner's code is one line."""
    day, function, target = sys.argv[1:]
    try:
        with learners_errors(Repo.here()):
            _measure(day, function, Path(target))
    except CourseError as error:
        sys.exit(str(error))


def _measure(day: str, function: str, target: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    work = getattr(demonstration(day), function)()
    out = work()
    mx.eval(out)  # the first run pays for what is made once
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    print(READY, file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        out = work()
        mx.eval(out)
        print(time.perf_counter() - start, file=answers, flush=True)
    peak = mx.get_peak_memory() - before
    np.savez(target, out=_as_numpy(out), peak=np.array(peak))


def _as_numpy(out: mx.array) -> np.ndarray:
    """Whole numbers stay whole: a token id is no measured quantity."""
    return np.array(out if mx.issubdtype(out.dtype, mx.integer) else out.astype(mx.float32))


if __name__ == "__main__":
    main()
