"""`pdm run course-check`: checks that syllabus, starters, suites and docstrings are consistent.

`rules` checks everything that can be read from the files. This module runs the rest, each check in a separate
process and overlay:

- the reference passes all suites, and so do the second solutions;
- if one exercise is blank, its day fails, with the exercise's message;
- the starter files of each day and part can be imported and are formatted;
- each day passes while all later days are blank, and each part while all later parts are, so no test needs
  later code;
- the examples in the docstrings are correct.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cpp
from .examples import failing_examples
from .problem import Problem, last_lines
from .repo import Repo
from .rules import static_problems
from .runs import overlay_of, run_python, run_suites, tests_of
from .second_solutions import failing_solutions
from .source import blanked
from .starter import starter
from .syllabus import Syllabus
from .units import Day, Exercise, Kernel, Part, Unit

Check = Callable[[], list[Problem]]


def check(
    repo: Repo,
    syllabus: Syllabus,
    report: Callable[[str, int, int], None],
    *,
    static_only: bool = False,
    only: Collection[Day] = (),
) -> list[Problem]:
    """Find everything that is wrong with the course.

    report: called after each check with its name, the number of checks done, and the total. static_only: only
    read the files and run the examples. only: the days to run, empty for all; the files of all days are read.
    """
    found = static_problems(repo, syllabus)
    report("syllabus, starters and suites", 0, 0)
    if found:
        return found
    days = [day for day in syllabus.days if not day.is_planned]
    checks = list(_example_checks(repo, syllabus))
    if not static_only:
        checks += _checks(repo, days, [day for day in days if not only or day in only])
    done = 0

    def run(named: tuple[str, Check]) -> list[Problem]:
        nonlocal done
        problems = named[1]()
        done += 1
        report(named[0], done, len(checks))
        return problems

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for problems in pool.map(run, checks):
            found += problems
    return found


def _example_checks(repo: Repo, syllabus: Syllabus) -> Iterator[tuple[str, Check]]:
    """The examples, with compiled kernels and without."""
    yield "examples", lambda: failing_examples(repo, syllabus)
    off = {"TINY_LLM_KERNELS": "off"}
    yield "examples without compiled kernels", lambda: failing_examples(repo, syllabus, off)


def _checks(repo: Repo, days: Sequence[Day], only: Sequence[Day]) -> Iterator[tuple[str, Check]]:
    yield "second solutions", lambda: failing_solutions(repo, only)
    for day in only:
        yield f"{day.id} starters", lambda d=day: _starter_problems(repo, d)  # type: ignore[misc]
        if later := days[days.index(day) + 1 :]:
            yield f"{day.id}, later days blank", lambda d=day, after=later: _later_blank(repo, d, after)  # type: ignore[misc]
        yield from _checks_of_parts(repo, day, later)
        yield f"{day.id} on the reference", lambda d=day: _reference_passes(repo, d)  # type: ignore[misc]
        for exercise in day.exercises:
            yield (
                f"{exercise.id} {exercise.name} blank",
                lambda d=day, e=exercise: _exercise_blank(repo, d, e),  # type: ignore[misc]
            )
        for kernel in day.kernels:
            yield f"{kernel.id} {kernel.file} blank", lambda k=kernel: _kernel_blank(repo, k)  # type: ignore[misc]


def _checks_of_parts(repo: Repo, day: Day, later: Sequence[Day]) -> Iterator[tuple[str, Check]]:
    """The checks of a day's parts that the day's own checks do not include.

    Starter files that equal the whole day's are checked with the day. The last part needs no run with later
    code blank, because the day has the same run.
    """
    for part in day.parts:
        if any(starter(repo, module, part) != starter(repo, module, day) for module in part.modules):
            yield f"{part.id} starters", lambda p=part: _starter_problems(repo, p)  # type: ignore[misc]
        if part.later:
            after = [*part.later, *later]
            yield f"{part.id}, later parts blank", lambda p=part, a=after: _later_blank(repo, p, a)  # type: ignore[misc]


def _reference_passes(repo: Repo, day: Day) -> list[Problem]:
    with overlay_of(repo, {}) as reference:
        run = run_suites(reference, [repo.suites / day.suite], ["-q"], quiet=True)
    if run.returncode == 0:
        return []
    return [Problem("reference", day.suite, f"fails on the reference\n{last_lines(run.stdout)}")]


def _exercise_blank(repo: Repo, day: Day, exercise: Exercise) -> list[Problem]:
    """With one exercise blank and everything else the reference's, its unit fails with its message."""
    source = (repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
    source = blanked(source, {exercise.name: exercise.message})
    unit = day.part_of(exercise) or day
    with overlay_of(repo, {exercise.module: source}) as blank:
        run = run_suites(blank, [repo.suites / day.suite], ["-q", "-x", *tests_of(unit)], quiet=True)
    if run.returncode == 0:
        what = day.suite if isinstance(unit, Day) else unit.named
        return [Problem("blank", exercise.id, f"{what} passes although {exercise.name} is blank")]
    if exercise.message not in run.stdout:
        return [
            Problem(
                "blank", exercise.id, f"fails, but without the exercise's message\n{last_lines(run.stdout)}"
            )
        ]
    return []


def _kernel_blank(repo: Repo, kernel: Kernel) -> list[Problem]:
    """A kernel compiles as it is; if it is blank, the compiler stops with its message."""
    source = (cpp.sources(repo) / kernel.file).read_text(encoding="utf-8")
    whole, stopped = cpp.compiles(repo, source), cpp.compiles(repo, cpp.starter(repo, kernel))
    if whole.returncode:
        return [Problem("reference", kernel.file, f"does not compile\n{last_lines(whole.stderr)}")]
    if not stopped.returncode or kernel.message not in stopped.stderr:
        return [
            Problem(
                "blank",
                kernel.id,
                f"does not stop the compiler with the kernel's message\n{last_lines(stopped.stderr)}",
            )
        ]
    return []


def _starter_problems(repo: Repo, unit: Unit) -> list[Problem]:
    """The starter files of a day or a part can be imported and are formatted."""
    sources = {module: starter(repo, module, unit) for module in unit.modules}
    found = []
    with overlay_of(repo, sources) as with_starters:
        modules = sorted(file.stem for file in repo.reference.glob("*.py") if file.stem != "__init__")
        run = run_python(with_starters, ["-c", "; ".join(f"import tiny_llm.{module}" for module in modules)])
        if run.returncode:
            found.append(Problem("starter", unit.id, f"cannot be imported\n{last_lines(run.stderr)}"))
        found += _formatted(repo, with_starters.overlay, unit)
    return found


def _later_blank(repo: Repo, unit: Unit, later: Sequence[Unit]) -> list[Problem]:
    """The tests of a day or a part pass while everything after it is blank."""
    modules = {module for one in later for module in one.modules}
    sources = {module: starter(repo, module, *later) for module in sorted(modules)}
    with overlay_of(repo, sources) as with_starters:
        run = run_suites(with_starters, [repo.suites / unit.suite], ["-q", "-x", *tests_of(unit)], quiet=True)
    if run.returncode == 0:
        return []
    rule, what = ("later part", "parts") if isinstance(unit, Part) else ("later day", "days")
    return [Problem(rule, unit.id, f"fails while the {what} after it are blank\n{last_lines(run.stdout)}")]


def _formatted(repo: Repo, folder: Path, unit: Unit) -> list[Problem]:
    config = repo.root / "pyproject.toml"
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--check",
        "--no-cache",
        "--config",
        str(config),
        str(folder),
    ]
    run = subprocess.run(command, text=True, capture_output=True, check=False)
    if run.returncode == 0:
        return []
    return [Problem("starter", unit.id, f"is not formatted\n{last_lines(run.stdout + run.stderr)}")]
