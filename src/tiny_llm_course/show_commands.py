"""The commands that show: try, hint, diff, compare, progress, map, doctor. They parse, call, print."""

import json
from typing import Annotated

import typer

from . import views
from .arguments import AnExercise, DayId, open_course
from .days import demonstration
from .learner import learners_errors
from .progress import own_modules


def on_try(day: DayId) -> None:
    """See a day's thing run through your modules, on the real model where it can show it, with its number.

    \b
    pdm run try 1.6
    """
    house, syllabus = open_course()
    chosen = syllabus.to_start(day)
    yours = set(own_modules(house))
    whose = (
        f"{m}.py is {'yours' if m in yours else 'the reference' + chr(39) + 's'}" for m in chosen.modules
    )
    print(f"day {chosen.id}, {chosen.title}: {', '.join(whose)}")
    with learners_errors(house):
        for line in demonstration(chosen.id).show():
            print(line, flush=True)


def on_hint(
    exercise: AnExercise, step: Annotated[int, typer.Argument(metavar="[1-3]", help="How far to help.")] = 1
) -> None:
    """Help with an exercise in three steps: a question, a fact, a sketch.

    \b
    pdm run hint 1.1.2
    pdm run hint 1.1.2 3
    """
    house, syllabus = open_course()
    print(views.hint(house, syllabus, syllabus.exercise(exercise), step))


def on_diff(
    day: DayId,
    anyway: Annotated[bool, typer.Option("--anyway", help="Although the day does not pass yet.")] = False,
) -> None:
    """Show what the reference does otherwise, once the day passes.

    \b
    pdm run diff 1.1
    """
    house, syllabus = open_course()
    print(views.difference(house, syllabus.to_start(day), anyway=anyway))


def on_compare(
    day: DayId,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure your code and the reference on the same work, alternating: results, speed, memory.

    Left out on days where both sides do the same: the command then says why.

    \b
    pdm run compare 2.4
    """
    from .compare import as_json_object, as_text, compare

    house, syllabus = open_course()
    chosen = syllabus.to_start(day)
    if chosen.no_compare is not None and not as_json:
        print(f"day {chosen.id} has nothing to compare: {chosen.no_compare}")
        return
    found = compare(house, chosen)
    if as_json:
        print(json.dumps({"day": chosen.id, **as_json_object(found)}))
    else:
        print(as_text(chosen, found))


def on_progress(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a row a day.")] = False,
) -> None:
    """Show how far you are: which exercises are written, and which days pass.

    Read from your files; a day passes when its tests passed on the files as they are now.
    """
    house, syllabus = open_course()
    if as_json:
        print(json.dumps(views.progress(house, syllabus)))
    else:
        print(views.progress_text(house, syllabus))


def on_map() -> None:
    """Show all days, their modules, and which of them are yours."""
    print(views.map_text(*open_course()))


def on_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a finding a row.")] = False,
) -> int:
    """Look whether everything is here: Python, MLX, kernels, the model, and your files against the reference.

    Ends with 1 when something needs mending, and says what to do.
    """
    from .doctor import examine

    findings = list(examine(*open_course()))  # says itself what cannot be imported
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print("\n".join(map(str, findings)))
    return int(not all(finding.ok for finding in findings))
