"""Finds the cause of a failing day or part: a kernel in C++, an exercise, or another module of the learner's.

A few failing tests run again, in overlays where some of the learner's code is replaced by the reference's.
The search is a bisection and caches the results of its runs. Its time limit depends on how long the tests
took in the first place, so that a slow machine has more time.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .cpp import libraries, running_kernels
from .outcome import Outcome, task_of
from .progress import State, fingerprint, own_modules, reached, state
from .repo import Repo
from .runs import overlay_of, own_sources, run_suites
from .starter import filled
from .syllabus import Syllabus
from .units import Exercise, Kernel, Unit

RUNS = 5  # the search may take as long as this many runs like the one that failed ...
SHORTEST, LONGEST = 20.0, 120.0  # ... within these limits, in seconds
MAX_TESTS = 3  # failing tests that run again
MAX_RECORDS = 200  # cached runs
T = TypeVar("T")


class OutOfSearchTimeError(Exception):
    """The search has exceeded its time limit."""


@dataclass(frozen=True)
class Blame:
    """The cause that was found.

    today: False if the unit passes when the reference replaces the learner's other modules. module: the
    one of these modules that makes it fail. exercise: `test` passes if this exercise has the reference's
    code. kernels: `test` passes with the reference's compiled kernels instead of these of the learner's.
    sometimes: the unchanged code passed when it ran again. stopped_after: the search's time limit in seconds
    if it ran out of time, else None.
    """

    today: bool
    test: str
    module: str | None = None
    exercise: Exercise | None = None
    kernels: tuple[Kernel, ...] = ()
    sometimes: bool = False
    stopped_after: float | None = None


def time_for(outcome: Outcome) -> float:
    """Seconds that the search may take after this run."""
    return min(max(SHORTEST, RUNS * outcome.seconds), LONGEST)


def other_modules(repo: Repo, unit: Unit) -> list[str]:
    """The learner's modules of other days and parts that this unit's tests reach."""
    return sorted((set(own_modules(repo)) & reached(repo, unit)) - set(unit.modules))


def find_blame(repo: Repo, syllabus: Syllabus, unit: Unit, outcome: Outcome) -> Blame:
    """Find the cause of the first failing task."""
    first = min(map(task_of, outcome.failed))
    tests = [test for test in outcome.failed if task_of(test) == first][:MAX_TESTS]
    limit = time_for(outcome)
    trials = Trials(repo, unit, tests, limit)
    today = own_sources(repo, [module for module in own_modules(repo) if module in unit.modules])
    suspects = other_modules(repo, unit)
    test = tests[0].partition("::")[2]
    kernels = running_kernels(repo, syllabus)
    is_today = True
    try:
        if kernels and trials.passes(own_sources(repo, own_modules(repo)), kernels=False):
            if trials.passes(own_sources(repo, own_modules(repo)), again=True):
                return Blame(False, test, sometimes=True)
            return Blame(False, test, kernels=_tested(unit, first, kernels))
        is_today = not (suspects and trials.passes(today))
        if not is_today and trials.passes(own_sources(repo, own_modules(repo)), again=True):
            return Blame(False, test, sometimes=True)
        if not is_today:
            return Blame(False, test, module=_module(repo, trials, today, suspects))
        return Blame(True, test, exercise=_exercise(repo, unit, trials, today) if first else None)
    except OutOfSearchTimeError:
        return Blame(is_today, test, stopped_after=limit)


def _tested(unit: Unit, task: int, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """The kernel that a task is about if it is the learner's; otherwise all of theirs."""
    about = tuple(kernel for kernel in kernels if kernel.id == f"{unit.day.id}.{task}")
    return about or tuple(kernels)


def _module(repo: Repo, trials: "Trials", today: dict[str, str], suspects: list[str]) -> str | None:
    """The suspect that makes today's code fail; None if only several suspects together do.

    The caller knows that today's code fails with all suspects.
    """
    if len(suspects) == 1:
        return suspects[0]

    def fails_with(some: Sequence[str]) -> bool:
        return not trials.passes({**today, **own_sources(repo, some)})

    return _bisect(suspects, fails_with)


def _exercise(repo: Repo, unit: Unit, trials: "Trials", today: dict[str, str]) -> Exercise | None:
    """The exercise whose replacement by the reference's makes the tests pass; None if no single one does.

    The exercise that the tests are about is tried first; exercises of other parts in the same files are tried
    too.
    """
    there = (State.WRITTEN, State.SKIPPED)
    in_files = [exercise for module in unit.modules for exercise in unit.day.of_module(module)]
    written = [exercise for exercise in in_files if state(repo, exercise) in there]

    def passes_without(some: Sequence[Exercise]) -> bool:
        return trials.passes({**today, **filled(repo, unit.day, some)})

    about = [exercise for exercise in written if exercise.task == trials.task]
    if about and passes_without(about):
        return about[0]
    return _bisect([exercise for exercise in written if exercise not in about], passes_without)


def _bisect(suspects: Sequence[T], shows: Callable[[Sequence[T]], bool]) -> T | None:
    """Find by bisection the suspect for which `shows` is true; None if no single one is enough."""
    if not suspects:
        return None
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if shows(half) else suspects[len(half) :]
    return suspects[0] if shows(suspects) else None


class Trials:
    """Runs a few tests on different overlays, with a cache and a limit in seconds for all runs together."""

    def __init__(self, repo: Repo, unit: Unit, tests: Sequence[str], limit: float) -> None:
        self._repo, self._day, self._tests = repo, unit.day, list(tests)
        self.task = task_of(tests[0])
        self._until = time.monotonic() + limit
        self._file = repo.records / "trials.json"

    def passes(self, sources: dict[str, str], *, again: bool = False, kernels: bool = True) -> bool:
        """Whether the tests pass with these modules.

        again: ignore the cache. kernels: with the learner's library, if there is one. Raises
        `OutOfSearchTimeError`.
        """
        with overlay_of(self._repo, sources, kernels=kernels) as exchanged:
            known = self._known()
            key = self._key(exchanged)
            if again or key not in known:
                known = {**known, key: self._run(exchanged)}
                self._file.parent.mkdir(exist_ok=True)
                self._file.write_text(json.dumps(dict(list(known.items())[-MAX_RECORDS:])), encoding="utf-8")
            return known[key]

    def _run(self, exchanged: Repo) -> bool:
        left = self._until - time.monotonic()
        if left <= 0:
            raise OutOfSearchTimeError
        run = run_suites(exchanged, [], ["-x", "-q", *self._tests], quiet=True, time_limit=left)
        if run.returncode and time.monotonic() > self._until:
            raise OutOfSearchTimeError  # it may have failed because it was stopped
        return run.returncode == 0

    def _key(self, exchanged: Repo) -> str:
        built = [hashlib.sha256(file.read_bytes()).hexdigest() for file in libraries(exchanged)]
        about = json.dumps([fingerprint(exchanged, self._day), built, self._tests])
        return hashlib.sha256(about.encode()).hexdigest()

    def _known(self) -> dict[str, bool]:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # a missing or damaged cache counts as empty
        return known if isinstance(known, dict) else {}
