"""Runs suites in a process of their own, through a given overlay, and finds whose fault a failure is."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .cpp import libraries
from .house import House
from .outcome import OUTCOME_FILE, Outcome, read_outcome
from .progress import own_modules
from .syllabus import Day

NO_TESTS = 5  # pytest's exit code where nothing was collected


@contextmanager
def overlay_of(house: House, modules: Iterable[str], *, kernels: bool = False) -> Iterator[House]:
    """The house through an overlay that holds copies of these modules of the learner's, and no others.

    With `kernels`, their library goes with it.
    """
    with TemporaryDirectory(prefix="tiny-llm-overlay-") as folder:
        for module in modules:
            shutil.copy(house.overlay / f"{module}.py", folder)
        for library in libraries(house) if kernels else ():
            shutil.copy(library, folder)
        yield house.with_overlay(Path(folder))


def run_suites(
    house: House,
    suites: Iterable[Path],
    arguments: Sequence[str] = (),
    *,
    about: str = "",
    quiet: bool = False,
    outcome: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run test files on the engine as this house's overlay has it; the output is kept where `quiet`.

    outcome: where the run stores what it came to.
    """
    command = [sys.executable, "-m", "pytest", "-p", "tiny_llm_course.provenance", "-o", "addopts="]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "--no-header" if quiet else "--tb=short"]
    paths = [os.path.relpath(suite, house.root) for suite in suites]
    return subprocess.run(
        [*command, *arguments, *paths],
        cwd=house.root,
        env={**_environment(house, about), OUTCOME_FILE: str(outcome or "")},
        text=True,
        check=False,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )


def run_suite_of(house: House, day: Day, arguments: Sequence[str], about: str) -> Outcome:
    """Run one day's suite before the learner's eyes; what it came to."""
    with TemporaryDirectory(prefix="tiny-llm-outcome-") as folder:
        stored = Path(folder, "outcome.json")
        run = run_suites(house, [house.suites / day.suite], arguments, about=about, outcome=stored)
        return read_outcome(stored, run.returncode)


def run_python(house: House, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python on the engine as this house's overlay has it, and keep what it prints."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=house.root,
        env=_environment(house, ""),
        text=True,
        capture_output=True,
        check=False,
    )


def passes(house: House, suites: Iterable[Path]) -> bool:
    """True where the suites pass."""
    return run_suites(house, suites, ["-x", "-q"], quiet=True).returncode == 0


def passes_alone(house: House, day: Day) -> bool:
    """True where the day's modules pass on the reference, without the learner's others."""
    own = [module for module in own_modules(house) if module in day.modules]
    with overlay_of(house, own, kernels=bool(day.kernels)) as alone:
        return passes(alone, [house.suites / day.suite])


def culprits(house: House, day: Day) -> list[str]:
    """The learner's other modules with which the day's suite fails although it passes alone.

    Each is tried by itself beside the day's modules; empty where only several together make it fail.
    """
    own = own_modules(house)
    today = [module for module in own if module in day.modules]
    found = []
    for module in own:
        if module in today:
            continue
        with overlay_of(house, [*today, module], kernels=bool(day.kernels)) as pair:
            if not passes(pair, [house.suites / day.suite]):
                found.append(module)
    return found


def _environment(house: House, about: str) -> dict[str, str]:
    sources = [str(house.root / "src"), str(Path(__file__).resolve().parents[1])]
    path = os.pathsep.join([*dict.fromkeys(sources), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "TINY_LLM_OVERLAY": str(house.overlay),
        "TINY_LLM_COURSE_RUN": about,
        "PYTHONPATH": path,
    }
