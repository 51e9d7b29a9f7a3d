"""What the course shows of itself as text: a day's tasks, hints, progress, the map, the difference."""

import difflib
from pathlib import Path

from .cpp import RULE, build_of, job, own_kernels, sources
from .errors import CourseError
from .house import House
from .legend import legend
from .may_use import Interface, day_may_use, may_use
from .progress import Result, State, changed_files, missing_modules, own_modules, result, state
from .source import STAND_INS, functions
from .syllabus import Day, Exercise, Kernel, Syllabus

STEPS = ("a question", "a fact", "a sketch")
_MARKS = {
    State.NOT_STARTED: "-",
    State.BLANK: ".",
    State.MISSING: "?",
    State.WRITTEN: "x",
    State.SKIPPED: "s",
}
_LEGEND = "x written   . blank   s skipped   ? its function is missing   - its file is not there"
_STAND_INS = (
    "@accelerated, _fused, _compiled in the reference: faster code that runs in place of the function below. "
    "Yours always runs itself, and needs none of it."
)


def tasks(house: House, day: Day) -> str:
    """A day's exercises, its chapter and its test command."""
    lines = [f"  {e.id}  {e.module}.py  {e.name}{_parameters(house, e)}" for e in day.exercises]
    letters = legend(house, day)
    chapter = f"book/src/{day.chapter}" if day.chapter else "to come; the docstrings say what each must do"
    return "\n".join(
        [
            *lines,
            *([f"shapes:  {', '.join(letters)}"] if letters else []),
            *_usable(day_may_use(house, day)),
            f"chapter: {chapter}",
            f"test:    pdm run test {day.id}",
            f"hints:   pdm run hint {day.exercises[0].id}",
            *(
                f"option:  {k.file} in C++: pdm run start {day.id} --cpp, then build-kernels"
                for k in day.kernels
            ),
        ]
    )


def _usable(interfaces: list[Interface]) -> list[str]:
    """What may be used from other files, a line each; nothing where there is none."""
    if not interfaces:
        return []
    return ["you may use, from other files (pdm run hint EXERCISE says which for what):", *_lines(interfaces)]


def _lines(interfaces: list[Interface]) -> list[str]:
    return [f"  {one}" for one in interfaces]


def kernel_tasks(house: House, day: Day) -> str:
    """A day's option in C++: what to write, what to read first, and the commands."""
    lines = [f"  {k.id}  {k.file}  {', '.join(k.functions)}" for k in day.kernels]
    jobs = ", ".join(job(house, kernel) for kernel in day.kernels)
    return "\n".join(
        [
            *lines,
            f"read:    {house.shown(sources(house) / 'kernels.h')}: {jobs}; vec.h beside it",
            f"rule:    {RULE}",
            "build:   pdm run build-kernels",
            f"test:    pdm run test {day.id}",
            f"hints:   pdm run hint {day.kernels[0].id}",
        ]
    )


def hint(house: House, syllabus: Syllabus, exercise: Exercise | Kernel, step: int) -> str:
    """One of the three steps of help; with the first, what the exercise may use."""
    if not 1 <= step <= len(exercise.hints):
        raise CourseError(f"there is no hint {step} of {exercise.id}: 1 is a question, 2 a fact, 3 a sketch")
    text = f"{exercise.id} {exercise.name}, {STEPS[step - 1]}:\n  {exercise.hints[step - 1]}"
    if step == 1 and isinstance(exercise, Exercise):
        usable = may_use(house, syllabus.day(exercise.day_id), exercise)
        text = "\n".join([text, *(["you may use, from other files:", *_lines(usable)] if usable else [])])
    if step < len(exercise.hints):
        return f"{text}\nmore: pdm run hint {exercise.id} {step + 1}"
    if isinstance(exercise, Kernel):
        return (
            f"{text}\nno more hints: pdm run diff {exercise.day_id} --anyway shows the reference's kernel, "
            f"pdm run skip {exercise.id} runs it instead of yours"
        )
    return f"{text}\nno more hints: pdm run skip {exercise.id} puts the reference's code there"


def progress(house: House, syllabus: Syllabus) -> list[dict[str, object]]:
    """One row a day that can be started: its exercises by state, and what its tests say."""
    own_modules(house)
    rows: list[dict[str, object]] = []
    for day in syllabus.days:
        if day.is_to_come:
            continue
        states = {exercise.id: state(house, exercise) for exercise in day.exercises}
        started = len(missing_modules(house, day)) < len(day.modules)
        outcome = result(house, day) if started else Result.UNKNOWN
        all_blank = set(states.values()) == {State.BLANK}
        rows.append(
            {
                "day": day.id,
                "title": day.title,
                "started": started,
                "written": sum(s in (State.WRITTEN, State.SKIPPED) for s in states.values()),
                "exercises": {exercise_id: found.value for exercise_id, found in states.items()},
                "tests": State.BLANK.value if all_blank else _told(house, day, outcome),
                "done": started and outcome is Result.PASSING,
            }
        )
    return rows


def _told(house: House, day: Day, outcome: Result) -> str:
    """What the tests say; of tests that are out of date also the file that has changed."""
    changed = changed_files(house, day) if outcome is Result.STALE else []
    if not changed:
        return outcome.value
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{changed[0]}{more} changed since its tests ran"


def progress_text(house: House, syllabus: Syllabus) -> str:
    """The same as a table, with what to do next."""
    rows = progress(house, syllabus)
    marks = {
        day.id: f"[{''.join(_MARKS[state(house, exercise)] for exercise in day.exercises)}]"
        for day in syllabus.days
    }
    width = max(len(mark) for mark in marks.values())
    tests = max(len(str(row["tests"])) for row in rows)
    lines = [
        f"{row['day']}  {marks[str(row['day'])]:{width}}  "
        f"{row['tests'] if row['started'] else 'not started':{tests}}  {row['title']}"
        for row in rows
    ]
    done = sum(bool(row["done"]) for row in rows)
    following = _following(rows)
    lines += ["", _LEGEND, f"{done} of {len(rows)} days pass."]
    if following is not None:
        verb = "test" if following["started"] else "start"
        lines.append(f"next: pdm run {verb} {following['day']}")
    return "\n".join(lines)


def _following(rows: list[dict[str, object]]) -> dict[str, object] | None:
    """The day to do next: one that is under way, or else the first after the last that is done."""
    under_way = [row for row in rows if row["started"] and not row["done"]]
    if under_way:
        return under_way[0]
    last = max((place for place, row in enumerate(rows) if row["done"]), default=-1)
    return next((row for row in [*rows[last + 1 :], *rows] if not row["done"]), None)


def map_text(house: House, syllabus: Syllabus) -> str:
    """Every day with its modules and whose they are; a kernel in C++ where it is the learner's."""
    own = set(own_modules(house))
    kernels = {kernel: build_of(house, kernel) for kernel in own_kernels(house, syllabus)}
    lines = []
    for day in syllabus.days:
        if day.id.endswith(".1"):
            lines += ["", f"week {day.id[0]}"]
        modules = "  ".join(f"[{m}.py]" if m in own else f"{m}.py" for m in day.modules) or "to come"
        modules += "".join(f"  [{k.file}, {kernels[k].value}]" for k in day.kernels if k in kernels)
        lines.append(f"  {day.id}  {day.title:38}  {modules}")
    return "\n".join([*lines[1:], "", "[in brackets]: yours; every other module is the reference's"])


def difference(house: House, day: Day, *, anyway: bool) -> str:
    """How the reference differs from the learner's modules. Raises `CourseError` before the day passes."""
    pairs = [(house.overlay / f"{module}.py", house.reference / f"{module}.py") for module in day.modules]
    pairs += [(house.overlay / kernel.file, sources(house) / kernel.file) for kernel in day.kernels]
    pairs = [(own, reference) for own, reference in pairs if own.exists()]
    if not pairs:
        raise CourseError(f"not started: pdm run start {day.id}")
    if not anyway and result(house, day) is not Result.PASSING:
        raise CourseError(
            f"day {day.id} {result(house, day).value}: `pdm run test {day.id}` first, or add --anyway"
        )
    parts = [_STAND_INS] if any(_has_stand_ins(reference) for _, reference in pairs) else []
    for own, reference in pairs:
        lines = difflib.unified_diff(
            own.read_text(encoding="utf-8").splitlines(),
            reference.read_text(encoding="utf-8").splitlines(),
            house.shown(own),
            house.shown(reference),
            lineterm="",
        )
        parts.append("\n".join(lines) or f"{own.name}: no difference")
    return "\n\n".join(parts)


def _has_stand_ins(reference: Path) -> bool:
    text = reference.read_text(encoding="utf-8")
    return any(f"@{name}(" in text for name in STAND_INS)


def _parameters(house: House, exercise: Exercise) -> str:
    """`(x, mask)`: the names of a function's parameters, as a reminder."""
    node = functions((house.reference / f"{exercise.module}.py").read_text(encoding="utf-8"))[exercise.name]
    names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs] if argument.arg != "self"]
    return f"({', '.join(names)})"
