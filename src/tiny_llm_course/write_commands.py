"""The commands that write a learner's files: start, skip, reset, restore, build-kernels. They parse, call,
print."""

from typing import Annotated

import typer

from . import views
from .arguments import ADay, open_course
from .cpp import build, own_kernels, start_kernels
from .errors import CourseError
from .repo import Repo
from .starter import restore, set_aside, set_aside_kernel, skip, start
from .units import Exercise, Kernel, Unit


def on_start(
    day: ADay,
    again: Annotated[bool, typer.Option("--again", help="Move your files aside and begin anew.")] = False,
    in_cpp: Annotated[bool, typer.Option("--cpp", help="The day's kernel in C++ instead.")] = False,
) -> None:
    """Write a day's modules into src/tiny_llm, exercises blank, and say what there is to do.

    \b
    pdm run start 1.1
    pdm run start 1.1 --again     # your files become attention.py.1.bak
    pdm run start 2.4 --cpp       # a kernel of your own: quantized_matmul.cpp

    A long day has parts, about an evening each. In the files of a part, the exercises of other parts stay as
    you have them; those that you have not are the reference's.

    \b
    pdm run start 3.2             # all parts
    pdm run start 3.2b            # one part
    pdm run start 3.2b --again    # blanks only this part; the files of before are *.bak

    A part that is started already is shown with what is written of it, and nothing is changed.

    Beside your files there are links NAME.pyi for editors: they lead to the reference's files, so
    go-to-definition shows its code, exercises of later days included.

    Any day can come first: what you have not written is the reference's. Nothing is ever overwritten.
    """
    repo, syllabus = open_course()
    chosen = syllabus.to_start(day)
    if in_cpp:
        written = start_kernels(repo, chosen)
        print(f"{chosen.named}: {chosen.title}, in C++. The tasks in Python are not needed for it.")
        print("\n".join(f"wrote {repo.shown(file)}" for file in written))
        print(views.kernel_tasks(repo, chosen.day))
        return
    for file in set_aside(repo, chosen) if again else ():
        print(views.moved_aside(repo, file))
    done = start(repo, chosen)
    print(f"{chosen.named}: {chosen.title}.{f' Afterwards: {chosen.works}.' if chosen.works else ''}")
    print("\n".join(views.start_report(repo, chosen, done)))
    print("\n".join([views.tasks(repo, chosen), *views.restart_advice(repo, chosen, done)]))


def on_skip(
    what: Annotated[
        str, typer.Argument(metavar="DAY|EXERCISE", help="Such as 1.1, the part 3.2b, or only 1.1.2.")
    ],
) -> None:
    """Put the reference's code where your exercises are still blank, to go on with the next.

    \b
    pdm run skip 1.1.2
    pdm run skip 1.1
    pdm run skip 3.2b             # a part; `pdm run start 3.2b` makes it blank again
    pdm run skip 2.4.6            # the option in C++: your file is moved aside, the reference's kernel runs
    """
    repo, syllabus = open_course()
    one = syllabus.exercise(what) if what.count(".") >= 2 else None
    if isinstance(one, Kernel):
        _skip_kernel(repo, one)
        return
    chosen = syllabus.to_start(what).exercises if one is None else (one,)
    unit = syllabus.to_start(what)
    _refuse_unstarted(repo, unit, chosen)
    skipped = skip(repo, unit.day, chosen)
    if not skipped:
        raise CourseError(f"nothing of {what} is blank")
    print("\n".join(f"{e.id} {e.name} is the reference's now" for e in skipped))


def _skip_kernel(repo: Repo, kernel: Kernel) -> None:
    moved = set_aside_kernel(repo, kernel)
    if not moved:
        raise CourseError(
            f"not started: without a file of yours the reference's {kernel.file} runs "
            f"(pdm run start {kernel.day_id} --cpp)"
        )
    print(f"moved aside: {repo.shown(moved[0])}; the reference's {kernel.file} runs")


def _refuse_unstarted(repo: Repo, unit: Unit, exercises: tuple[Exercise, ...]) -> None:
    if not any((repo.overlay / f"{exercise.module}.py").exists() for exercise in exercises):
        raise CourseError(f"not started: pdm run start {unit.id}")


def on_reset(day: ADay) -> None:
    """Go back to the reference for a day: your files are moved aside, never deleted.

    \b
    pdm run reset 1.1             # attention.py becomes attention.py.1.bak
    pdm run restore 1.1           # and is back
    pdm run reset 3.2b            # one part

    A file that holds work of other parts too is copied aside, and in it only the part's exercises become the
    reference's.
    """
    repo, syllabus = open_course()
    unit = syllabus.to_start(day)
    moved = set_aside(repo, unit)
    if not moved:
        raise CourseError(f"{unit.named} is not started: there is nothing to reset")
    print("\n".join([*(views.moved_aside(repo, file) for file in moved), views.after_reset(unit, moved)]))


def on_restore(day: ADay) -> None:
    """Bring back what `reset` or `start --again` has moved aside, the newest of it.

    \b
    pdm run restore 1.1           # attention.py.1.bak becomes attention.py
    pdm run restore 3.2b          # the files of one part, whole: also what they hold of other parts

    A file that is there changes places with it: `restore` once more undoes it.
    """
    repo, syllabus = open_course()
    unit = syllabus.to_start(day)
    restored = restore(repo, unit)
    if not restored:
        raise CourseError(f"nothing of {unit.named} was moved aside")
    print("\n".join(f"restored: {repo.shown(file)}" for file in restored))


def on_build_kernels() -> None:
    """Build your kernels in C++ into a library of your own, which then runs in place of the reference's.

    \b
    pdm run start 2.4 --cpp       # writes src/tiny_llm/quantized_matmul.cpp
    pdm run build-kernels
    pdm run test 2.4

    What you have no file for is the reference's. The first build takes a minute, later ones seconds.
    """
    repo, syllabus = open_course()
    names = ", ".join(kernel.file for kernel in own_kernels(repo, syllabus))
    print(f"building with your {names} ..." if names else "looking for your kernels ...", flush=True)
    print(f"built {repo.shown(build(repo, syllabus))}: it runs in place of the reference's kernels")
