"""`pdm run compare`: measures the learner's modules and the reference's on the same workload.

Each side runs in its own process. They alternate, one repetition at a time, so that other load on the machine
affects both.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from .cpp import is_blank, refuse_stale
from .days import function_name, function_of
from .errors import CourseError
from .progress import missing_modules, own_modules
from .repo import Repo
from .runs import overlay_of, own_sources, start_python
from .source import stand_ins
from .syllabus import Syllabus
from .units import Kernel, Unit

SECONDS = 2.0  # of repetitions, both sides together; the measurement then stops
MAX_REPETITIONS = 50
WORK, KERNEL_WORK = "work", "kernel_work"  # the functions of a day's file: its modules', its kernel's


class Measured(NamedTuple):
    """One side's figures: median, minimum and maximum seconds of a repetition, and peak bytes."""

    seconds: float
    least: float
    most: float
    peak_bytes: int


class Comparison(NamedTuple):
    """Both sides' figures, and how their results differ.

    differing: how many of the `total` numbers differ; None if the shapes differ. largest_difference: the
    largest absolute difference of floats; None for integers such as token ids, whose distance means nothing.
    """

    own: Measured
    reference: Measured
    differing: int | None
    total: int
    largest_difference: float | None


def works_of(repo: Repo, unit: Unit) -> list[str]:
    """The workloads to measure: `WORK` if the unit's modules are there, `KERNEL_WORK` if its kernel is.

    Raises `CourseError` if the unit is not started, or if its kernel is not built.
    """
    kernels = [kernel for kernel in own_kernels_of(repo, unit) if not is_blank(repo, kernel)]
    works = [*([] if missing_modules(repo, unit) else [WORK]), *([KERNEL_WORK] if kernels else [])]
    if works != [WORK]:
        refuse_stale(repo, Syllabus((unit.day,)))
    if not works:
        raise CourseError(f"{unit.named} is not started: pdm run start {unit.id}")
    return works


def own_kernels_of(repo: Repo, unit: Unit) -> list[Kernel]:
    """The unit's kernels for which the learner has a file."""
    return [kernel for kernel in unit.kernels if (repo.overlay / kernel.file).exists()]


def compare(repo: Repo, unit: Unit, work: str = WORK) -> Comparison:
    """Run a unit's workload on the learner's modules of its day and on the reference, alternating.

    work: `WORK`, or `KERNEL_WORK` for the learner's kernel. Raises `CourseError` if the day has no
    comparison, is not started, or its workload fails.
    """
    import numpy as np

    day = unit.day
    if day.no_compare is not None:
        raise CourseError(f"day {day.id} has no comparison: {day.no_compare}")
    if work not in works_of(repo, unit):
        raise CourseError(f"{unit.named} is not started: pdm run start {unit.id}")
    own = own_sources(repo, [module for module in own_modules(repo) if module in day.modules])
    with (
        overlay_of(repo, own, kernels=bool(day.kernels)) as mine,
        overlay_of(repo, {}) as theirs,
        _started_side(mine, unit, work, f"your {unit.named}", repo) as first,
        _started_side(theirs, unit, work, "the reference", theirs) as second,
    ):
        while first.total + second.total < SECONDS and len(first.seconds) < MAX_REPETITIONS:
            first.repeat()
            second.repeat()
        own_side, reference_side = first.end(), second.end()
        outs = [np.asarray(first.out), np.asarray(second.out)]
    if outs[0].shape != outs[1].shape:
        return Comparison(own_side, reference_side, None, outs[1].size, None)
    is_whole = all(np.issubdtype(out.dtype, np.integer) for out in outs)
    largest = None if is_whole else float(np.abs(outs[0] - outs[1]).max())
    differing = int((outs[0] != outs[1]).sum())
    return Comparison(own_side, reference_side, differing, outs[1].size, largest)


def as_text(repo: Repo, unit: Unit, found: Comparison, work: str = WORK) -> str:
    """A table of both sides' figures, and a note on the code that ran on each side."""
    own, reference = found.own, found.reference
    times = [f"{1e3 * s.seconds:.2f} ({1e3 * s.least:.2f}-{1e3 * s.most:.2f})" for s in (own, reference)]
    return "\n".join(
        [
            f"{unit.named}, {unit.title}: {function_of(unit, work).__doc__}",
            f"{'':30}  {'yours':>24}  {'reference':>24}",
            f"{'milliseconds (fastest-slowest)':30}  {times[0]:>24}  {times[1]:>24}",
            f"{'peak memory in MLX, KiB':30}  {own.peak_bytes >> 10:>24,}  {reference.peak_bytes >> 10:>24,}",
            _results(found),
            "memory: the peak of a run, without weights and inputs",
            *(_what_runs(repo, unit) if work == WORK else _which_kernel(repo, unit)),
        ]
    )


def _what_runs(repo: Repo, unit: Unit) -> list[str]:
    """Which modules differ, and for which exercises the reference runs faster code."""
    own = [f"{module}.py" for module in unit.day.modules if (repo.overlay / f"{module}.py").exists()]
    own += [kernel.file for kernel in own_kernels_of(repo, unit)]
    lines = [
        f"only {', '.join(own)} {'differs' if len(own) == 1 else 'differ'}; "
        "all other modules are the reference's on both sides"
    ]
    for exercise in unit.exercises:
        kinds = stand_ins((repo.reference / f"{exercise.module}.py").read_text("utf-8"), exercise.name)
        fast = "a compiled kernel" if "compiled" in kinds and compiled_runs() else "MLX's own operator"
        if "fused" in kinds or fast == "a compiled kernel":
            lines.append(f"{exercise.id} {exercise.name}: your Python code against {fast}")
    return lines


def _which_kernel(repo: Repo, unit: Unit) -> list[str]:
    """Which kernel is measured against which."""
    return [
        f"{kernel.id} {kernel.file}: your kernel in C++ against the reference's; no module in Python differs"
        for kernel in own_kernels_of(repo, unit)
    ]


def compiled_runs() -> bool:
    """Whether the reference's compiled kernels run: they are built, and MLX uses the CPU."""
    import mlx.core as mx

    import tiny_llm_kernels

    return tiny_llm_kernels.available() and mx.default_device() == mx.Device(mx.cpu)


def as_json_object(found: Comparison) -> dict[str, object]:
    """The figures as a JSON object."""
    sides = {"own": found.own, "reference": found.reference}
    figures = {name: {"seconds": s.seconds, "peak_bytes": s.peak_bytes} for name, s in sides.items()}
    same = {"differing": found.differing, "total": found.total}
    return {**figures, **same, "largest_difference": found.largest_difference}


def _results(found: Comparison) -> str:
    if found.differing is None:
        return "results: the shapes differ, so one side is wrong"
    if found.largest_difference is not None:
        return f"results: largest difference {found.largest_difference:.2g}"
    if found.differing:
        return f"results: {found.differing} of {found.total} numbers differ"
    return f"results: all {found.total} numbers are equal"


class _Side:
    """A process that repeats the workload on request."""

    def __init__(
        self, process: subprocess.Popen[str], whose: str, folder: Path, shown: tuple[str, str]
    ) -> None:
        self.seconds: list[float] = []
        self.out: object = None
        self._process, self._whose, self._shown = process, whose, shown
        self._target = folder / "result.npz"

    @property
    def total(self) -> float:
        """Total seconds of all repetitions."""
        return sum(self.seconds)

    def wait_until_ready(self) -> None:
        """Wait until the process is ready."""
        self._answer()

    def repeat(self) -> None:
        """Run one repetition."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.seconds.append(float(self._answer()))

    def end(self) -> Measured:
        """End the process and return its figures."""
        import numpy as np

        _, said = self._process.communicate()
        if self._process.returncode:
            self._refuse(said)
        with np.load(self._target) as stored:
            self.out, peak = stored["out"], int(stored["peak"])
        return Measured(median(self.seconds), min(self.seconds), max(self.seconds), peak)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._refuse(self._process.communicate()[1])
        return line.strip()

    def _refuse(self, said: str) -> None:
        last = (said.strip().splitlines() or ["no message"])[-1].replace(*self._shown)
        raise CourseError(f"{self._whose} fails: {last}")


@contextmanager
def _started_side(overlaid: Repo, unit: Unit, work: str, whose: str, shown: Repo) -> Iterator[_Side]:
    """Start a side on this overlay, and kill it at the end. Its errors show file names as in `shown`."""
    with TemporaryDirectory(prefix="tiny-llm-compare-") as folder:
        arguments = [
            "-m",
            "tiny_llm_course.measure",
            unit.day.id,
            function_name(unit, work),
            str(Path(folder, "result.npz")),
        ]
        with start_python(overlaid, arguments) as process:
            paths = (str(overlaid.overlay), shown.shown(shown.overlay))
            side = _Side(process, whose, Path(folder), paths)
            try:
                side.wait_until_ready()
                yield side
            finally:
                process.kill()
