"""`pdm run compare`: the learner's modules and the reference's on the same work, side by side."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from .cpp import libraries
from .days import demonstration
from .errors import CourseError
from .house import House
from .progress import missing_modules, own_modules
from .runs import overlay_of, own_sources, run_python
from .syllabus import Day


class Measured(NamedTuple):
    """One side's work: median, least and most seconds, bytes at the peak, and its numbers (an array)."""

    seconds: float
    least: float
    most: float
    peak_bytes: int
    out: object


class Comparison(NamedTuple):
    """Both sides, and the largest difference between their numbers; None where shapes differ."""

    own: Measured
    reference: Measured
    largest_difference: float | None


def compare(house: House, day: Day) -> Comparison:
    """Run a day's work on the learner's modules of that day, then on the plain reference.

    Raises `CourseError` where the day is not started, or its work does not run.
    """
    import numpy as np

    if missing_modules(house, day) and not (day.kernels and libraries(house)):
        raise CourseError(f"not started: pdm run start {day.id}")
    own = [module for module in own_modules(house) if module in day.modules]
    sources = own_sources(house, own)
    with overlay_of(house, sources, kernels=bool(day.kernels)) as mine, overlay_of(house, {}) as theirs:
        sides = [_measure(mine, day, "your code"), _measure(theirs, day, "the reference")]
    first, second = (np.asarray(side.out) for side in sides)
    difference = float(np.abs(first - second).max()) if first.shape == second.shape else None
    return Comparison(sides[0], sides[1], difference)


def as_text(day: Day, found: Comparison) -> str:
    """A table of both sides."""
    own, reference = found.own, found.reference
    same = f"{found.largest_difference:.2g}"
    if found.largest_difference is None:
        same = "their shapes differ, so one of them is wrong"
    times = [f"{1e3 * s.seconds:.2f} ({1e3 * s.least:.2f}-{1e3 * s.most:.2f})" for s in (own, reference)]
    return "\n".join(
        [
            f"day {day.id}, {day.title}: {demonstration(day.id).work.__doc__}",
            f"{'':28}{'yours':>22}{'reference':>22}",
            f"{'milliseconds (fastest-slowest)':28}{times[0]:>20}{times[1]:>22}",
            f"{'peak memory in MLX, KiB':30}{own.peak_bytes >> 10:>20,}{reference.peak_bytes >> 10:>22,}",
            f"largest difference of the results: {same}",
            "the reference runs compiled kernels where it has them; yours is what you wrote",
        ]
    )


def as_json_object(found: Comparison) -> dict[str, object]:
    """The figures without the numbers that came out."""
    sides = {"own": found.own, "reference": found.reference}
    figures = {name: {"seconds": s.seconds, "peak_bytes": s.peak_bytes} for name, s in sides.items()}
    return {**figures, "largest_difference": found.largest_difference}


def _measure(house: House, day: Day, whose: str) -> Measured:
    import numpy as np

    with _target() as target:
        run = run_python(house, ["-m", "tiny_llm_course.measure", day.id, str(target)])
        if run.returncode:
            said = run.stderr.strip().splitlines()[-4:] or ["no message"]
            raise CourseError(f"{whose} does not run the work of day {day.id}\n" + "\n".join(said))
        with np.load(target) as stored:
            seconds = stored["seconds"].tolist()
            return Measured(median(seconds), min(seconds), max(seconds), int(stored["peak"]), stored["out"])


@contextmanager
def _target() -> Iterator[Path]:
    with TemporaryDirectory(prefix="tiny-llm-compare-") as folder:
        yield Path(folder, "result.npz")
