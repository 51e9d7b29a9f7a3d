"""The commands that show: try, hint, diff, compare, progress, map, doctor. They parse, call, print."""

import json
from typing import Annotated

import typer

from . import overview, views
from .arguments import ADay, AnExercise, open_course
from .days import function_of, has_own
from .learner import blanks_of_others, learners_errors
from .progress import first_unfinished, own_modules
from .slow import leave_out, slow_modules


def on_try(day: ADay) -> None:
    """See a day's thing run through your modules, on the real model where it can show it, with its number.

    \b
    pdm run try 1.6
    pdm run try 3.2b              # a part's own, where it has one; otherwise the day's

    Your quantize.py runs in day 2.4 only: it unpacks every matrix in each pass.
    """
    repo, syllabus = open_course()
    chosen = syllabus.to_start(day)
    yours = set(own_modules(repo))
    whose = (
        f"{m}.py is {'yours' if m in yours else 'the reference' + chr(39) + 's'}" for m in chosen.modules
    )
    print(f"{chosen.named}, {chosen.title}: {', '.join(whose)}")
    if not has_own(chosen, "show"):
        print(
            f"part {chosen.id} has nothing of its own to show: this is day {chosen.day.id}'s, for all parts"
        )
    left_out, lines = slow_modules(repo, syllabus, chosen)
    print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    with blanks_of_others(repo, syllabus, chosen), learners_errors(repo):
        for module in left_out:
            leave_out(repo, module)
        for line in function_of(chosen, "show")():
            print(line, flush=True)


def on_hint(
    exercise: AnExercise, step: Annotated[int, typer.Argument(metavar="[1-3]", help="How far to help.")] = 1
) -> None:
    """Help with an exercise in three steps: a question, a fact, a sketch.

    \b
    pdm run hint 1.1.2
    pdm run hint 1.1.2 3
    pdm run hint 3.2b             # the first exercise of the part that is not written
    """
    repo, syllabus = open_course()
    print(views.hint(repo, syllabus, first_unfinished(repo, syllabus, exercise), step))


def on_diff(
    day: ADay,
    anyway: Annotated[bool, typer.Option("--anyway", help="Although it does not pass yet.")] = False,
) -> None:
    """Show what the reference does otherwise, once the day or the part passes.

    \b
    pdm run diff 1.1
    pdm run diff 3.2b             # one part, once it passes
    """
    repo, syllabus = open_course()
    print(views.difference(repo, syllabus.to_start(day), anyway=anyway))


def on_compare(
    day: ADay,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure your code and the reference on the same work, alternating: results, speed, memory.

    Only this day's modules are exchanged; the others are the reference's on both sides. Memory is the most
    that a run needs: weights and inputs, which both have, are not counted.

    Left out on days where both sides do the same: the command then says why.

    \b
    pdm run compare 2.4
    pdm run compare 3.2b          # a part's own work, where it has one; otherwise the day's
    """
    from .compare import as_json_object, as_text, compare

    repo, syllabus = open_course()
    chosen = syllabus.to_start(day)
    if chosen.day.no_compare is not None and not as_json:
        print(f"day {chosen.day.id} has nothing to compare: {chosen.day.no_compare}")
        return
    found = compare(repo, chosen)
    if as_json:
        print(json.dumps({"day": chosen.id, **as_json_object(found)}))
    else:
        print(as_text(repo, chosen, found))


def on_progress(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a row a day.")] = False,
) -> None:
    """Show how far you are: which exercises are written, and which days pass.

    Read from your files; a day passes when its tests passed on the files as they are now, or those of all its
    parts, which are listed once the day is started: 3.2a, 3.2b and so on.
    """
    repo, syllabus = open_course()
    if as_json:
        print(json.dumps(overview.progress(repo, syllabus)))
    else:
        print(overview.progress_text(repo, syllabus))


def on_map() -> None:
    """Show all days, their modules, which of them are yours, and the parts of long days, such as 3.2b."""
    print(overview.map_text(*open_course()))


def on_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, a finding a row.")] = False,
) -> int:
    """Look whether everything is here: Python, MLX, kernels, the model, and your files against the reference.

    Ends with 1 when something needs mending, and says what to do, for which day, or for which part: 3.2b.
    """
    from .doctor import examine

    findings = list(examine(*open_course()))  # says itself what cannot be imported
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print("\n".join(map(str, findings)))
    return int(not all(finding.ok for finding in findings))
