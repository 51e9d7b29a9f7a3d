"""The commands that only show something: try, hint, diff, compare, progress, map, doctor.

They parse arguments, call other modules and print.
"""

import json
from collections.abc import Iterable
from typing import Annotated

import typer

from . import overview, views
from .arguments import ADay, AnExercise, open_course
from .cpp import refuse_outdated, whose_kernels
from .days import function_of, has_own
from .learner import blanks_of_others, learners_errors
from .progress import first_unfinished, own_modules
from .slow import leave_out, slow_modules


def on_try(day: ADay) -> None:
    """Run a day's demonstration on your code and the real model.

    \b
    pdm run try 1.6
    pdm run try 3.2b              # the part's demonstration, or the day's if the part has none

    Some demonstrations are simulations without the model; they say so. Your quantize.py runs only on day 2.4,
    because it is slow: it unpacks every matrix in each forward pass.
    """
    repo, syllabus = open_course()
    chosen = syllabus.to_start(day)
    refuse_outdated(repo, syllabus)
    print(f"{chosen.named}, {chosen.title}: {_whose(chosen.modules, own_modules(repo))}")
    if not has_own(chosen, "show"):
        print(f"part {chosen.id} has no demonstration of its own; this is the one of day {chosen.day.id}")
    left_out, lines = slow_modules(repo, syllabus, chosen)
    lines = [*whose_kernels(repo, syllabus), *lines]
    print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    with blanks_of_others(repo, syllabus, chosen), learners_errors(repo):
        for module in left_out:
            leave_out(repo, module)
        for line in function_of(chosen, "show")():
            print(line, flush=True)


def _whose(modules: Iterable[str], yours: Iterable[str]) -> str:
    """Which of these modules are the learner's, and which are the reference's, in words."""
    is_yours = {module: module in yours for module in modules}
    files = {
        owner: ", ".join(f"{module}.py" for module, own in is_yours.items() if own is wanted)
        for owner, wanted in (("your", True), ("the reference's", False))
    }
    return "; ".join(f"{owner} {names}" for owner, names in files.items() if names)


def on_hint(
    exercise: AnExercise,
    step: Annotated[
        int, typer.Argument(metavar="[1-3]", help="1 is a question, 2 a fact, 3 a sketch in words.")
    ] = 1,
) -> None:
    """Show one of three hints for an exercise.

    \b
    pdm run hint 1.1.2            # a question to think about, and the interfaces that you may use
    pdm run hint 1.1.2 2          # the answer, and a fact
    pdm run hint 1.1.2 3          # a sketch of the solution in words
    pdm run hint 3.2b             # the part's first exercise that is not written yet
    """
    repo, syllabus = open_course()
    print(views.hint(repo, syllabus, first_unfinished(repo, syllabus, exercise), step))


def on_diff(
    day: ADay,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Show it even if the tests do not pass yet.")
    ] = False,
) -> None:
    """Compare your code with the reference's, line by line.

    \b
    pdm run diff 1.1
    pdm run diff 3.2b             # one part

    The day or the part must pass its tests first, because the diff shows the solution.
    """
    repo, syllabus = open_course()
    print(views.difference(repo, syllabus.to_start(day), anyway=anyway))


def on_compare(
    day: ADay,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare speed, memory and results with the reference's.

    \b
    pdm run compare 2.4
    pdm run compare 3.2b          # the part's workload, or the day's if the part has none

    Your code and the reference alternate on the same workload. Only this day's modules differ; all other
    modules are the reference's on both sides. Memory is the peak of a run, without weights and inputs, which
    are the same on both sides.

    A kernel that you wrote in C++ is measured separately, against the reference's kernel. With --json its
    figures are under "kernel".

    Some days have no comparison because both sides do the same work; the command then says so.
    """
    from .compare import KERNEL_WORK, WORK, as_json_object, as_text, compare, works_of

    repo, syllabus = open_course()
    chosen = syllabus.to_start(day)
    if chosen.day.no_compare is not None and not as_json:
        print(f"day {chosen.day.id} has no comparison: {chosen.day.no_compare}")
        return
    refuse_outdated(repo, syllabus)
    works = [WORK] if chosen.day.no_compare is not None else works_of(repo, chosen)
    found = {work: compare(repo, chosen, work) for work in works}
    if as_json:
        figures = as_json_object(found[WORK]) if WORK in found else {}
        kernel = {"kernel": as_json_object(found[KERNEL_WORK])} if KERNEL_WORK in found else {}
        print(json.dumps({"day": chosen.id, **figures, **kernel}))
    else:
        print("\n\n".join(as_text(repo, chosen, one, work) for work, one in found.items()))


def on_progress(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with one entry per day.")
    ] = False,
) -> None:
    """Show which exercises are written and which days pass.

    A day passes if its tests, or the tests of all its parts, passed on the files as they are now. The parts
    of a day (3.2a, 3.2b and so on) are listed once you have started it. A kernel in C++ has a mark of its
    own, after the exercises, if you have a file for it.
    """
    repo, syllabus = open_course()
    if as_json:
        print(json.dumps(overview.progress(repo, syllabus)))
    else:
        print(overview.progress_text(repo, syllabus))


def on_map() -> None:
    """List all days and their modules; yours are marked.

    Long days also list their parts, such as 3.2b, with the results of their tests.
    """
    print(overview.map_text(*open_course()))


def on_doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with one entry per check.")
    ] = False,
) -> int:
    """Check Python, MLX, the kernels, the model and your files.

    A failed check is marked `!!`, with advice on how to fix it; the advice may be a command for a day (1.1)
    or a part (3.2b). If any check fails, the exit code is 1.
    """
    from .doctor import examine

    findings = list(examine(*open_course()))  # reports import errors as findings
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print("\n".join(map(str, findings)))
    return int(not all(finding.ok for finding in findings))
