"""Whose fault a failing day or part is: another module of the learner's, or which exercise of today.

Only what failed is run again, in overlays where parts of the learner's code are exchanged for the
reference's. The number of runs grows with the logarithm of the number of suspects, the search ends after
`BUDGET` seconds, and what was found about the same files is remembered.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .outcome import Outcome, task_of
from .progress import State, fingerprint, own_modules, reached, state
from .repo import Repo
from .runs import overlay_of, own_sources, run_suites
from .starter import filled
from .units import Exercise, Unit

BUDGET = 20.0  # seconds
MAX_TESTS = 3  # failing tests that are run again
MAX_RECORDS = 200  # runs
T = TypeVar("T")


class OutOfBudgetError(Exception):
    """The search has taken as long as it may."""


@dataclass(frozen=True)
class Blame:
    """What was found. today: False where the day passes without the learner's other modules.

    module: the other module with which it fails. exercise: with the reference's code in it, `test` passes.
    sometimes: the learner's code has passed now, unchanged. complete: False where the time ran out.
    """

    today: bool
    test: str
    module: str | None = None
    exercise: Exercise | None = None
    sometimes: bool = False
    complete: bool = True


def other_modules(repo: Repo, unit: Unit) -> list[str]:
    """The learner's modules of other days and parts that this unit's tests reach."""
    return sorted((set(own_modules(repo)) & reached(repo, unit)) - set(unit.modules))


def find_blame(repo: Repo, unit: Unit, outcome: Outcome) -> Blame:
    """Why the first of the tests failed that did."""
    first = min(map(task_of, outcome.failed))
    tests = [test for test in outcome.failed if task_of(test) == first][:MAX_TESTS]
    trials = Trials(repo, unit, tests)
    today = own_sources(repo, [module for module in own_modules(repo) if module in unit.modules])
    suspects = other_modules(repo, unit)
    test = tests[0].partition("::")[2]
    is_today = True
    try:
        is_today = not (suspects and trials.passes(today))
        if not is_today and trials.passes(own_sources(repo, own_modules(repo)), again=True):
            return Blame(False, test, sometimes=True)
        if not is_today:
            return Blame(False, test, module=_module(repo, trials, today, suspects))
        return Blame(True, test, exercise=_exercise(repo, unit, trials, today) if first else None)
    except OutOfBudgetError:
        return Blame(is_today, test, complete=False)


def _module(repo: Repo, trials: "Trials", today: dict[str, str], suspects: list[str]) -> str | None:
    """The one other module beside which today's code fails; None where it takes several.

    With all of them it is known to fail.
    """
    if len(suspects) == 1:
        return suspects[0]

    def fails_with(some: Sequence[str]) -> bool:
        return not trials.passes({**today, **own_sources(repo, some)})

    return _bisect(suspects, fails_with)


def _exercise(repo: Repo, unit: Unit, trials: "Trials", today: dict[str, str]) -> Exercise | None:
    """The one exercise that makes the tests pass when the reference's code stands in it.

    The one that the tests are about is asked first, and those of other parts in the same files too. None
    where no single one does.
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
    """The one suspect that shows it, by halving; None where several are needed together, or none does."""
    if not suspects:
        return None
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if shows(half) else suspects[len(half) :]
    return suspects[0] if shows(suspects) else None


class Trials:
    """Runs of a few tests on one exchanged overlay after the other, remembered, and bounded in time."""

    def __init__(self, repo: Repo, unit: Unit, tests: Sequence[str]) -> None:
        self._house, self._day, self._tests = repo, unit.day, list(tests)
        self.task = task_of(tests[0])
        self._until = time.monotonic() + BUDGET
        self._file = repo.records / "trials.json"

    def passes(self, sources: dict[str, str], *, again: bool = False) -> bool:
        """True where the tests pass on these modules; again: run them, whatever is remembered.

        Raises `OutOfBudgetError`.
        """
        with overlay_of(self._house, sources, kernels=bool(self._day.kernels)) as exchanged:
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
            raise OutOfBudgetError
        run = run_suites(exchanged, [], ["-x", "-q", *self._tests], quiet=True, time_limit=left)
        if run.returncode and time.monotonic() > self._until:
            raise OutOfBudgetError  # it may have been stopped
        return run.returncode == 0

    def _key(self, exchanged: Repo) -> str:
        about = json.dumps([fingerprint(exchanged, self._day), self._tests])
        return hashlib.sha256(about.encode()).hexdigest()

    def _known(self) -> dict[str, bool]:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # a lost or broken record says nothing
        return known if isinstance(known, dict) else {}
