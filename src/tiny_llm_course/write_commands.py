"""The commands that write a learner's files: start, skip, reset, restore, build-kernels.

They parse arguments, call other modules and print.
"""

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
    again: Annotated[bool, typer.Option("--again", help="Move your files aside and start over.")] = False,
    in_cpp: Annotated[bool, typer.Option("--cpp", help="Write the day's kernel in C++ instead.")] = False,
) -> None:
    """Write a day's files into src/tiny_llm and list its tasks.

    \b
    pdm run start 1.1
    pdm run start 1.1 --again     # start over: your attention.py moves to src/tiny_llm/.backups
    pdm run start 2.4 --cpp       # write a kernel in C++: quantized_matmul.cpp

    In these files the exercises are blank: their bodies raise NotImplementedError. Everything else is the
    reference's code. You can start with any day, because the reference's modules run until you write your
    own. Your work is never overwritten.

    A long day has parts, each about an evening's work. If you start one part in a new file, the exercises of
    earlier parts contain the reference's code, and those of later parts are blank. Exercises that you have
    written keep your code.

    \b
    pdm run start 3.2             # all parts
    pdm run start 3.2b            # one part
    pdm run start 3.2b --again    # blank only this part; your old files are kept in .backups

    If the part has already been started, the command changes nothing and lists which exercises are written.
    A whole day that has already been started is an error.

    The command also creates links NAME.pyi for your editor. They point to the reference's files, so
    go-to-definition shows the reference's code, including solutions of later days.
    """
    repo, syllabus = open_course()
    chosen = syllabus.whole(day) if again else syllabus.to_start(day)
    if in_cpp:
        written = start_kernels(repo, chosen)
        print(f"{chosen.named}: {chosen.title}, in C++. You do not need the tasks in Python for it.")
        print("\n".join(f"wrote {repo.shown(file)}" for file in written))
        print(views.kernel_tasks(repo, chosen.day))
        return
    for file in set_aside(repo, chosen) if again else ():
        print(views.moved_aside(repo, file))
    done = start(repo, chosen)
    print(f"{chosen.named}: {chosen.title}.{f' Goal: {chosen.works}.' if chosen.works else ''}")
    print("\n".join(views.start_report(repo, chosen, done)))
    print("\n".join([views.tasks(repo, chosen), *views.restart_advice(repo, chosen, done)]))


def on_skip(
    what: Annotated[
        str,
        typer.Argument(metavar="DAY|EXERCISE", help="A day (1.1), a part (3.2b) or an exercise (1.1.2)."),
    ],
) -> None:
    """Put the reference's code into exercises that are blank.

    \b
    pdm run skip 1.1.2            # one exercise
    pdm run skip 1.1              # every blank exercise of a day
    pdm run skip 3.2b             # every blank exercise of a part; `pdm run start 3.2b` blanks them again
    pdm run skip 2.4.6            # the kernel in C++: moves your file to .backups; the reference's runs

    Exercises that you have written stay as they are.
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
        raise CourseError(f"no exercise of {what} is blank")
    print("\n".join(f"{e.id} {e.name} now has the reference's code" for e in skipped))


def _skip_kernel(repo: Repo, kernel: Kernel) -> None:
    moved = set_aside_kernel(repo, kernel)
    if not moved:
        raise CourseError(
            f"{kernel.file} is not started: the reference's kernel runs (to write yours: "
            f"pdm run start {kernel.day_id} --cpp)"
        )
    print(f"moved your file to {repo.shown(moved[0])}; the reference's {kernel.file} runs now")


def _refuse_unstarted(repo: Repo, unit: Unit, exercises: tuple[Exercise, ...]) -> None:
    if not any((repo.overlay / f"{exercise.module}.py").exists() for exercise in exercises):
        raise CourseError(f"{unit.named} is not started: pdm run start {unit.id}")


def on_reset(day: ADay) -> None:
    """Go back to the reference for a day; your files are kept.

    \b
    pdm run reset 1.1             # attention.py moves to src/tiny_llm/.backups/attention.py.1.bak
    pdm run restore 1.1           # and back again
    pdm run reset 3.2b            # one part

    The folder .backups keeps the five newest versions of each file; older ones are deleted.

    If a file also contains work of other parts, it is copied instead, and only the exercises of this part get
    the reference's code.
    """
    repo, syllabus = open_course()
    unit = syllabus.whole(day)
    moved = set_aside(repo, unit)
    if not moved:
        raise CourseError(f"{unit.named} is not started: there is nothing to reset")
    print("\n".join([*(views.moved_aside(repo, file) for file in moved), views.after_reset(unit, moved)]))


def on_restore(day: ADay) -> None:
    """Bring back the files that `reset` or `start --again` moved.

    \b
    pdm run restore 1.1           # the newest src/tiny_llm/.backups/attention.py.N.bak
    pdm run restore 3.2b          # whole files, including exercises of other parts

    The newest version comes back. It swaps places with the current file, so a second `restore` undoes the
    first. The folder .backups keeps the five newest versions of each file.
    """
    repo, syllabus = open_course()
    unit = syllabus.whole(day)
    restored = restore(repo, unit)
    if not restored:
        raise CourseError(f"{unit.named} has no files that were moved aside")
    print("\n".join(f"restored: {repo.shown(file)}" for file in restored))


def on_build_kernels() -> None:
    """Compile your C++ kernels; the engine then uses them.

    \b
    pdm run start 2.4 --cpp       # writes src/tiny_llm/quantized_matmul.cpp
    pdm run build-kernels
    pdm run test 2.4

    The library contains the reference's version of each kernel for which you have no file. The first build
    compiles every kernel, for each instruction set, and takes a few minutes; later builds take seconds. The
    command prints the steps that are done.
    """
    repo, syllabus = open_course()
    names = ", ".join(kernel.file for kernel in own_kernels(repo, syllabus))
    print(f"building with your {names} ..." if names else "looking for your kernels ...", flush=True)
    library = repo.shown(build(repo, syllabus))
    print(f"built {library}; the engine now uses it instead of the reference's kernels")
