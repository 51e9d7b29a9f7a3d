"""The learner's commands, and the maintainers' check. Each is thin: it parses, calls, prints."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_group

from . import views
from .check import check
from .compare import as_json_object, as_text, compare
from .cpp import build, own_kernels, start_kernels
from .doctor import examine
from .errors import CourseError
from .house import House
from .learner import learners_errors
from .progress import own_modules
from .starter import set_aside, skip, start
from .syllabus import Day, Exercise, Syllabus, read_syllabus
from .testing import run_day, run_reference, run_started, saves, watch

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The course: start a day, write it, test it, see it run.",
)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
DayId = Annotated[str, typer.Argument(metavar="DAY", help="A week and a day, such as 1.1.")]
AnExercise = Annotated[str, typer.Argument(metavar="EXERCISE", help="Week, day and task, such as 1.1.2.")]


def command() -> TyperGroup:
    """All commands."""
    return get_group(app)


def _open() -> tuple[House, Syllabus]:
    house = House.here()
    return house, read_syllabus(house.syllabus)


@app.command("start")
def on_start(
    day: DayId,
    again: Annotated[bool, typer.Option("--again", help="Move your files aside and begin anew.")] = False,
    in_cpp: Annotated[bool, typer.Option("--cpp", help="The day's kernel in C++ instead.")] = False,
) -> None:
    """Write a day's modules into src/tiny_llm, exercises blank, and say what there is to do.

    \b
    pdm run start 1.1
    pdm run start 1.1 --again     # your files become attention.py.1.bak
    pdm run start 2.4 --cpp       # a kernel of your own: quantized_matmul.cpp

    Any day can come first: what you have not written is the reference's. Nothing is ever overwritten.
    """
    house, syllabus = _open()
    chosen = syllabus.to_start(day)
    if in_cpp:
        written = start_kernels(house, chosen)
        print("\n".join(f"wrote {house.shown(file)}" for file in written))
        print(f"build:   pdm run build-kernels\ntest:    pdm run test {chosen.id}")
        print(f"hints:   pdm run hint {chosen.kernels[0].id}")
        return
    moved = set_aside(house, chosen) if again else []
    written = start(house, chosen)
    for file in moved:
        print(f"moved aside: {house.shown(file)}")
    print(f"day {chosen.id}: {chosen.title}. Afterwards: {chosen.works}.")
    print("\n".join(f"wrote {house.shown(file)}" for file in written))
    print(views.tasks(house, chosen))


@app.command("test", context_settings=PASSED_ON)
def on_test(
    context: typer.Context,
    day: Annotated[
        str | None,
        typer.Argument(metavar="[DAY]", help="Such as 1.1; without it, all days that you started."),
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Today's modules alone, on the reference.")
    ] = False,
    watched: Annotated[bool, typer.Option("--watch", help="Test again after every save.")] = False,
    week: Annotated[int | None, typer.Option(help="With --day: another way to name a day.")] = None,
    day_number: Annotated[int | None, typer.Option("--day", help="With --week.")] = None,
) -> int:
    """Run a day's tests on your code; what stands behind the day goes to pytest.

    \b
    pdm run test 1.1
    pdm run test 1.1 -x           # stop at the first failure; -l shows the values of its variables
    pdm run test 1.1.2            # one task
    pdm run test --week 1 --day 1
    pdm run test

    The header says which modules are yours. When a day fails although its own code is right, the run finds
    which of your other modules is the reason.
    """
    house, syllabus = _open()
    arguments = list(context.args)
    if day is not None and day.startswith("-"):
        arguments.insert(0, day)
        day = None
    arguments, isolated, watched = _own_options(arguments, isolated, watched)
    if week is not None or day_number is not None:
        if week is None or day_number is None:
            raise CourseError("--week and --day go together: pdm run test --week 1 --day 1")
        day = f"{week}.{day_number}"
    if day is None:
        return run_started(house, syllabus, arguments)
    if day.count(".") == 2:
        task = syllabus.exercise(day).id
        day, arguments = task.rpartition(".")[0], ["-k", f"test_task_{task.rpartition('.')[2]}_", *arguments]
    chosen = syllabus.to_start(day)
    if watched:
        return watch(house, syllabus, chosen, arguments, saves(house))
    return run_day(house, syllabus, chosen, arguments, isolated=isolated)


@app.command("test-refsol", context_settings=PASSED_ON)
def on_test_refsol(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(metavar="[DAY|FILE]", help="Such as 1.1, or tests_refsol/test_week_1_day_1.py."),
    ] = None,
) -> int:
    """Run the course's tests on the reference; what stands behind goes to pytest.

    \b
    pdm run test-refsol
    pdm run test-refsol 1.1
    pdm run test-refsol tests_refsol/test_week_1_day_1.py -k softmax
    """
    house, syllabus = _open()
    arguments = list(context.args)
    if what is not None and what.startswith("-"):
        arguments.insert(0, what)
        what = None
    if what is None:
        return run_reference(house, [house.suites], arguments)
    if Path(what.partition("::")[0]).exists():
        return run_reference(house, [], [*arguments, what])
    return run_reference(house, [house.suites / syllabus.to_start(what).suite], arguments)


@app.command("hint")
def on_hint(
    exercise: AnExercise, step: Annotated[int, typer.Argument(metavar="[1-3]", help="How far to help.")] = 1
) -> None:
    """Help with an exercise in three steps: a question, a fact, a sketch.

    \b
    pdm run hint 1.1.2
    pdm run hint 1.1.2 3
    """
    _, syllabus = _open()
    print(views.hint(syllabus.exercise(exercise), step))


@app.command("build-kernels")
def on_build_kernels() -> None:
    """Build your kernels in C++ into a library of your own, which then runs in place of the reference's.

    \b
    pdm run start 2.4 --cpp       # writes src/tiny_llm/quantized_matmul.cpp
    pdm run build-kernels
    pdm run test 2.4

    What you have no file for is the reference's. The first build takes a minute, later ones seconds.
    """
    house, syllabus = _open()
    names = ", ".join(kernel.file for kernel in own_kernels(house, syllabus))
    print(f"building with your {names} ..." if names else "looking for your kernels ...", flush=True)
    print(f"built {house.shown(build(house, syllabus))}: it runs in place of the reference's kernels")


@app.command("diff")
def on_diff(
    day: DayId,
    anyway: Annotated[bool, typer.Option("--anyway", help="Although the day does not pass yet.")] = False,
) -> None:
    """Show what the reference does otherwise, once the day passes.

    \b
    pdm run diff 1.1
    """
    house, syllabus = _open()
    print(views.difference(house, syllabus.to_start(day), anyway=anyway))


@app.command("progress")
def on_progress(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a row a day.")] = False,
) -> None:
    """Show how far you are: which exercises are written, and which days pass.

    Read from your files; a day passes when its tests passed on the files as they are now.
    """
    house, syllabus = _open()
    if as_json:
        print(json.dumps(views.progress(house, syllabus)))
    else:
        print(views.progress_text(house, syllabus))


@app.command("map")
def on_map() -> None:
    """Show all days, their modules, and which of them are yours."""
    print(views.map_text(*_open()))


@app.command("reset")
def on_reset(day: DayId) -> None:
    """Go back to the reference for a day: your files are moved aside, never deleted.

    \b
    pdm run reset 1.1             # attention.py becomes attention.py.1.bak
    """
    house, syllabus = _open()
    moved = set_aside(house, syllabus.to_start(day))
    if not moved:
        raise CourseError(f"day {day} is not started: there is nothing to reset")
    print("\n".join(f"moved aside: {house.shown(file)}" for file in moved))


@app.command("skip")
def on_skip(
    what: Annotated[str, typer.Argument(metavar="DAY|EXERCISE", help="Such as 1.1, or 1.1.2 alone.")],
) -> None:
    """Put the reference's code where your exercises are still blank, to go on with the next.

    \b
    pdm run skip 1.1.2
    pdm run skip 1.1
    """
    house, syllabus = _open()
    chosen = _exercises(syllabus, what)
    _refuse_unstarted(house, syllabus.to_start(chosen[0].day_id), chosen)
    skipped = skip(house, chosen)
    if not skipped:
        raise CourseError(f"nothing of {what} is blank")
    print("\n".join(f"{e.id} {e.name} is the reference's now" for e in skipped))


def _exercises(syllabus: Syllabus, what: str) -> tuple[Exercise, ...]:
    """One exercise in Python, or all of a day."""
    if what.count(".") < 2:
        return syllabus.to_start(what).exercises
    exercise = syllabus.exercise(what)
    if not isinstance(exercise, Exercise):
        raise CourseError(f"{what} is the option in C++: without a file of yours the reference's kernel runs")
    return (exercise,)


def _refuse_unstarted(house: House, day: Day, exercises: tuple[Exercise, ...]) -> None:
    if not any((house.overlay / f"{exercise.module}.py").exists() for exercise in exercises):
        raise CourseError(f"not started: pdm run start {day.id}")


def _own_options(arguments: list[str], isolated: bool, watched: bool) -> tuple[list[str], bool, bool]:
    """Options of ours that were written behind the day, where everything else is pytest's."""
    isolated |= "--isolated" in arguments
    watched |= "--watch" in arguments
    return [a for a in arguments if a not in ("--isolated", "--watch")], isolated, watched


@app.command("course-check")
def on_course_check(
    static_only: Annotated[
        bool, typer.Option("--static", help="Only what can be read from the files: seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list of problems.")] = False,
) -> int:
    """Prove that the course holds together: for maintainers, and for CI. A few minutes.

    Every blank exercise makes a test of its day fail, with its own message; every starter imports, is
    formatted and leaks no line of its solution; no test needs a later day, looks into private names or
    asserts block ids; the reference passes all.
    """
    house, syllabus = _open()

    def report(what: str, done: int, total: int) -> None:
        if not as_json:
            print(f"[{done}/{total}] {what}" if total else what, flush=True)

    problems = check(house, syllabus, report, static_only=static_only)
    if as_json:
        print(json.dumps([problem._asdict() for problem in problems]))
    else:
        print("\n".join(map(str, problems)) or "the course holds together")
    return int(bool(problems))


@app.command("try")
def on_try(day: DayId) -> None:
    """See a day's thing run through your modules, on the real model where it can show it, with its number.

    \b
    pdm run try 1.6
    """
    from .tries import TRIES

    house, syllabus = _open()
    chosen = syllabus.to_start(day)
    yours = set(own_modules(house))
    whose = (
        f"{m}.py is {'yours' if m in yours else 'the reference' + chr(39) + 's'}" for m in chosen.modules
    )
    print(f"day {chosen.id}, {chosen.title}: {', '.join(whose)}")
    with learners_errors(house):
        for line in TRIES[chosen.id]():
            print(line, flush=True)


@app.command("compare")
def on_compare(
    day: DayId,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure your code and the reference on the same work: results, speed, memory.

    \b
    pdm run compare 2.4
    """
    house, syllabus = _open()
    chosen = syllabus.to_start(day)
    found = compare(house, chosen)
    if as_json:
        print(json.dumps({"day": chosen.id, **as_json_object(found)}))
    else:
        print(as_text(chosen, found))


@app.command("doctor")
def on_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a finding a row.")] = False,
) -> int:
    """Look whether everything is here: Python, MLX, kernels, the model, and your files against the reference.

    Ends with 1 when something needs mending, and says what to do.
    """
    findings = list(examine(*_open()))  # says itself what cannot be imported
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print("\n".join(map(str, findings)))
    return int(not all(finding.ok for finding in findings))
