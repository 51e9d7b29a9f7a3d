"""`pdm run progress` and `pdm run map`: the learner's progress over all days."""

from collections import Counter
from typing import Any

from .cpp import build_of, is_blank, own_kernels
from .progress import (
    Result,
    State,
    changed_files,
    is_started,
    missing_modules,
    own_modules,
    result,
    state,
)
from .repo import Repo
from .syllabus import Syllabus
from .units import Day, Unit, exercise_range

_MARKS = {
    State.NOT_STARTED: "-",
    State.BLANK: ".",
    State.MISSING: "?",
    State.WRITTEN: "x",
    State.SKIPPED: "s",
}
_LEGEND = "x written   . blank   s skipped   ? function missing   - file missing"


def progress(repo: Repo, syllabus: Syllabus) -> list[dict[str, Any]]:
    """A row for each available day: the state of its exercises, its test results, and a row for each part."""
    own_modules(repo)
    return [
        {"day": day.id, **_row(repo, day), "parts": [{"part": p.id, **_row(repo, p)} for p in day.parts]}
        for day in syllabus.days
        if not day.is_planned
    ]


def _own_kernels(repo: Repo, unit: Unit) -> dict[str, State]:
    """The state of each of the unit's kernels for which the learner has a file."""
    own = own_kernels(repo, Syllabus((unit.day,))) if isinstance(unit, Day) else []
    return {kernel.id: State.BLANK if is_blank(repo, kernel) else State.WRITTEN for kernel in own}


def _kernels_text(repo: Repo, unit: Unit, kernels: dict[str, State]) -> str:
    """The result of a day for which the learner has only kernels: `only 2.4.6: passes`."""
    outcome = result(repo, unit)
    text = State.BLANK.value if State.BLANK in kernels.values() else _tests_text(repo, unit, outcome)
    return f"only {', '.join(kernels)}: {text}"


def _row(repo: Repo, unit: Unit) -> dict[str, Any]:
    kernels = _own_kernels(repo, unit)
    states = {exercise.id: state(repo, exercise) for exercise in unit.exercises}
    started = len(missing_modules(repo, unit)) < len(unit.modules)
    outcome = result(repo, unit) if started else Result.UNKNOWN
    return {
        "title": unit.title,
        "started": started,
        "written": sum(s in (State.WRITTEN, State.SKIPPED) for s in states.values()),
        "exercises": {exercise_id: found.value for exercise_id, found in states.items()},
        "kernels": {kernel_id: found.value for kernel_id, found in kernels.items()},
        "tests": _kernels_text(repo, unit, kernels)
        if kernels and not started
        else _unwritten_text(list(states.values())) or _tests_text(repo, unit, outcome),
        "done": started and outcome is Result.PASSING,
    }


def _unwritten_text(states: list[State]) -> str:
    """`blank`, or `2 blank, 1 skipped`, if no exercise has the learner's code; empty if the tests matter."""
    counts = Counter(states)
    if State.BLANK not in counts or counts.keys() - {State.BLANK, State.SKIPPED}:
        return ""
    if State.SKIPPED not in counts:
        return State.BLANK.value
    return ", ".join(f"{counts[one]} {one.value}" for one in (State.BLANK, State.SKIPPED))


def _tests_text(repo: Repo, unit: Unit, outcome: Result) -> str:
    """The test result; if it is out of date, also the file that changed and the command to run."""
    changed = changed_files(repo, unit) if outcome is Result.STALE else []
    if not changed:
        return outcome.value
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{changed[0]}{more} changed since its tests ran: pdm run test {unit.id}"


def progress_text(repo: Repo, syllabus: Syllabus) -> str:
    """The rows of `progress` as a table, and the next command; parts are listed for started days."""
    rows = progress(repo, syllabus)
    lines = _table(repo, syllabus, rows)
    done = sum(bool(row["done"]) for row in rows)
    lines += ["", _LEGEND, f"{done} of {len(rows)} days pass."]
    following = _next_unit(repo, syllabus, rows)
    if following is not None:
        lines.append(f"next: {_command(repo, following)}{_gap_note(repo, syllabus, rows, following)}")
    return "\n".join(lines)


def _command(repo: Repo, unit: Unit) -> str:
    return f"pdm run {'test' if is_started(repo, unit) else 'start'} {unit.id}"


def _gap_note(repo: Repo, syllabus: Syllabus, rows: list[dict[str, Any]], following: Unit) -> str:
    """A note on the first day that was left out, if a later day passes; otherwise empty."""
    first = next(row for row in rows if not row["done"])
    day = syllabus.day(first["day"])
    if day == following.day or not any(row["done"] for row in rows[rows.index(first) :]):
        return ""
    return f" (you left out day {day.id}: {_command(repo, _next_part(repo, day) or day)})"


def _table(repo: Repo, syllabus: Syllabus, rows: list[dict[str, Any]]) -> list[str]:
    shown: list[tuple[str, Unit, dict[str, Any]]] = []
    for row in rows:
        day = syllabus.day(row["day"])
        shown.append(("", day, row))
        if row["started"]:
            shown += [("  ", part, one) for part, one in zip(day.parts, row["parts"], strict=True)]
    marks = [f"[{_marks(repo, unit)}]" for _, unit, _ in shown]
    names = [f"{indent}{unit.id}" for indent, unit, _ in shown]
    tests = [row["tests"] if row["started"] or row["kernels"] else "not started" for _, _, row in shown]
    first, second, third = (max(map(len, column)) for column in (names, marks, tests))
    return [
        f"{name:{first}}  {mark:{second}}  {test:{third}}  {unit.title}"
        for name, mark, test, (_, unit, _) in zip(names, marks, tests, shown, strict=True)
    ]


def _marks(repo: Repo, unit: Unit) -> str:
    """A mark for each exercise, and one for each kernel for which the learner has a file."""
    exercises = [state(repo, exercise) for exercise in unit.exercises]
    return "".join(_MARKS[one] for one in [*exercises, *_own_kernels(repo, unit).values()])


def _next_unit(repo: Repo, syllabus: Syllabus, rows: list[dict[str, Any]]) -> Unit | None:
    """The unit to do next: in a day that is started, or else in the first day after the last one done."""
    under_way = [row for row in rows if row["started"] and not row["done"]]
    last = max((place for place, row in enumerate(rows) if row["done"]), default=-1)
    later = [*under_way, *rows[last + 1 :], *rows]
    row = next((row for row in later if not row["done"]), None)
    if row is None:
        return None
    day = syllabus.day(row["day"])
    return _next_part(repo, day) or day


def _next_part(repo: Repo, day: Day) -> Unit | None:
    """The part of a day to do next: the first that is started, or else the first after the last that passes.

    None if the day has no parts, or all of them pass.
    """
    open_parts = [part for part in day.parts if result(repo, part) is not Result.PASSING]
    under_way = [part for part in open_parts if is_started(repo, part)]
    passing = [place for place, part in enumerate(day.parts) if part not in open_parts]
    later = [part for part in day.parts[max(passing, default=-1) + 1 :] if part in open_parts]
    return next(iter([*under_way, *later, *open_parts]), None)


def map_text(repo: Repo, syllabus: Syllabus) -> str:
    """List all days with their modules, the learner's in brackets, and all parts with their test results.

    A kernel in C++ is listed if the learner has a file for it.
    """
    own = set(own_modules(repo))
    kernels = {kernel: build_of(repo, kernel) for kernel in own_kernels(repo, syllabus)}
    lines = []
    for day in syllabus.days:
        if day.id.endswith(".1"):
            lines += ["", f"week {day.id[0]}"]
        modules = (
            "  ".join(f"[{m}.py]" if m in own else f"{m}.py" for m in day.modules) or "not available yet"
        )
        modules += "".join(f"  [{k.file}, {kernels[k].value}]" for k in day.kernels if k in kernels)
        lines.append(f"  {day.id}  {day.title:38}  {modules}")
        for part in day.parts:
            row = _row(repo, part)
            tests = row["tests"] if row["started"] else "not started"
            lines.append(f"    {part.id}  {part.title:35}  {exercise_range(part.exercises)}: {tests}")
    return "\n".join([*lines[1:], "", "[in brackets]: your modules; all others are the reference's"])
