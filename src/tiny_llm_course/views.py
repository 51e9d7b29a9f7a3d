"""Texts about a day or a part: its tasks, its hints, and the difference from the reference."""

import difflib
import shutil
from pathlib import Path
from textwrap import fill

from .backups import FOLDER, original
from .cpp import RULE, job, sources
from .errors import CourseError
from .interfaces import Interface
from .labs import labs_after
from .legend import legend
from .may_use import may_use, unit_may_use
from .progress import Result, State, is_untouched, noted_first_to_fix, result, state
from .repo import Repo
from .source import STAND_INS, functions, names_in, with_blank, without
from .starter import StartResult
from .syllabus import Syllabus
from .units import Day, Exercise, Kernel, Part, Unit

WIDTH = 100  # of a hint
STEPS = ("a question", "a fact", "a sketch")
LINKS = (
    "created links NAME.pyi for your editor: they point to the reference's files, so go-to-definition shows "
    "its code, including solutions of later days"
)
_STAND_INS = (
    "@accelerated, _fused and _compiled in the reference select faster code that replaces the decorated "
    "function. Your code does not need them: it always runs as you wrote it."
)


def start_report(repo: Repo, unit: Unit, done: StartResult) -> list[str]:
    """The lines that report a start: files written, exercises blanked or kept, and new editor links."""
    if done.changed_nothing:
        return [
            "already started; all of it is still blank"
            if is_untouched(repo, unit)
            else f"{unit.named} has already been started: nothing was changed"
        ]
    lines = [f"wrote {repo.shown(file)}" for file in done.files]
    lines += [f"blanked in {repo.shown(repo.overlay / e.module)}.py: {e.id} {e.name}" for e in done.blanked]
    if isinstance(unit, Part):
        kept = [e for e in unit.exercises if state(repo, e) in (State.WRITTEN, State.SKIPPED)]
        lines += [f"kept as you have it: {e.id} {e.name}" for e in kept]
    return [*lines, *([LINKS] if done.links else [])]


def restart_advice(repo: Repo, unit: Unit, done: StartResult) -> list[str]:
    """How to start over, as a list of at most one line.

    Empty if `start` has just written something, or if all exercises of the unit are blank.
    """
    if not done.changed_nothing or is_untouched(repo, unit):
        return []
    return [f"restart: pdm run start {unit.id} --again (keeps your files in {FOLDER}/)"]


def moved_aside(repo: Repo, file: Path) -> str:
    """The line about a file that was moved aside, or copied because it contains work of other parts."""
    before = original(file)
    if before.exists():
        return f"copied {before.name} to {repo.shown(file)}; {before.name} keeps your work of other parts"
    return f"moved {before.name} to {repo.shown(file)}"


def after_reset(unit: Unit, moved: list[Path]) -> str:
    """The line about what now runs the reference's code: whole files, or exercises in a file that stays."""
    names = {original(file).name: original(file).exists() for file in moved}
    whole = [name for name, stays in names.items() if not stays]
    some = [
        f"{exercise.id} in {name}"
        for name, stays in names.items()
        for exercise in (unit.of_module(name.removesuffix(".py")) if stays else ())
    ]
    return f"back to the reference: {', '.join(whole + some)}"


def tasks(repo: Repo, unit: Unit) -> str:
    """List the exercises of a day or a part, the interfaces they may use, the chapter and the commands.

    If any exercise is written, each line shows the exercise's state.
    """
    letters = legend(repo, unit)
    return "\n".join(
        [
            *_exercises(repo, unit),
            *([f"shapes:  {', '.join(letters)}"] if letters else []),
            *_usable(unit_may_use(repo, unit)),
            f"chapter: {_chapter(unit)}",
            *_tests(unit),
            f"hints:   pdm run hint {unit.exercises[0].id}",
            *(f"lab:     pdm run lab {name}" for name in labs_after(repo, unit)),
            *(
                f"option:  {k.id}, {k.file} in C++: pdm run start {unit.id} --cpp, then "
                f"pdm run build-kernels; hints: pdm run hint {k.id}"
                for k in unit.kernels
            ),
        ]
    )


def _chapter(unit: Unit) -> str:
    """Where the unit's chapter is, as a file and in a browser."""
    if unit.chapter_address is None:
        return "not written yet; the docstrings are complete"
    return f"book/src/{unit.chapter_address}, in a browser: pdm run book serve {unit.id}"


def _exercises(repo: Repo, unit: Unit) -> list[str]:
    """A line for each exercise; if the day has parts, under a heading for each part."""
    if isinstance(unit, Day) and unit.parts:
        return [
            line
            for part in unit.parts
            for line in (f"{part.id}  {part.title}", *(f"  {one}" for one in _exercises(repo, part)))
        ]
    states = {e: state(repo, e) for e in unit.exercises}
    is_new = set(states.values()) <= {State.BLANK, State.NOT_STARTED}
    return [
        f"  {e.id}  {e.module}.py  {e.name}{_parameters(repo, e)}{'' if is_new else f': {found.value}'}"
        for e, found in states.items()
    ]


def _tests(unit: Unit) -> list[str]:
    if isinstance(unit, Part) or not unit.parts:
        return [f"test:    pdm run test {unit.id}"]
    first, last = unit.parts[0].id, unit.parts[-1].id
    return [
        f"parts:   {first} to {last}, each about an evening; pdm run start {first} lists only that part",
        f"test:    pdm run test {first} for one part, pdm run test {unit.id} for all",
    ]


def _usable(interfaces: list[Interface]) -> list[str]:
    """The interfaces of other files that may be used, a line each, under a heading; empty without any."""
    if not interfaces:
        return []
    return [
        "you may use from other files (`pdm run hint EXERCISE` lists those of one exercise):",
        *_lines(interfaces),
    ]


def _lines(interfaces: list[Interface]) -> list[str]:
    return [f"  {one}" for one in interfaces]


def kernel_tasks(repo: Repo, day: Day) -> str:
    """A day's optional kernels in C++: what to write, what to read first, and the commands."""
    lines = [f"  {k.id}  {k.file}  {', '.join(k.functions)}" for k in day.kernels]
    jobs = ", ".join(job(repo, kernel) for kernel in day.kernels)
    return "\n".join(
        [
            *lines,
            f"read:    {jobs} in {repo.shown(sources(repo) / 'kernels.h')}, and vec.h in the same folder",
            f"rule:    {RULE}",
            "build:   pdm run build-kernels",
            f"test:    pdm run test {day.id}",
            f"hints:   pdm run hint {day.kernels[0].id}",
        ]
    )


def hint(repo: Repo, syllabus: Syllabus, exercise: Exercise | Kernel, step: int) -> str:
    """One of an exercise's three hints; the first also lists the interfaces that it may use.

    Raises `CourseError` for a step that is not 1, 2 or 3.
    """
    if not 1 <= step <= len(exercise.hints):
        raise CourseError(f"{exercise.id} has no hint {step}: 1 is a question, 2 a fact, 3 a sketch")
    text = f"{exercise.id} {exercise.name}, {STEPS[step - 1]}:\n{_wrapped(exercise.hints[step - 1])}"
    if step == 1 and isinstance(exercise, Exercise):
        usable = may_use(repo, syllabus.day(exercise.day_id), exercise)
        text = "\n".join([text, *(["you may use from other files:", *_lines(usable)] if usable else [])])
    if step < len(exercise.hints):
        return f"{text}\nnext hint: pdm run hint {exercise.id} {step + 1}"
    if isinstance(exercise, Kernel):
        return (
            f"{text}\nlast hint; pdm run diff {exercise.day_id} --anyway shows the reference's kernel, "
            f"pdm run skip {exercise.id} runs it instead of yours"
        )
    return f"{text}\nlast hint; pdm run skip {exercise.id} fills in the reference's code"


def _wrapped(text: str) -> str:
    """A paragraph, indented, in lines of at most `WIDTH` characters, or fewer on a narrow terminal."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    return fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


class NextHint:
    """Prints the next hint of the exercise that the last test run says to fix first."""

    def __init__(self, repo: Repo, syllabus: Syllabus) -> None:
        self._repo, self._syllabus = repo, syllabus
        self._exercise_id, self._step = "", 0

    def __call__(self) -> None:
        """Print the exercise's first hint, or its next one if the previous call was about it too."""
        exercise_id = noted_first_to_fix(self._repo)
        if exercise_id is None:
            print("no exercise to fix: the last run did not name one", flush=True)
            return
        self._step = min(self._step + 1, len(STEPS)) if exercise_id == self._exercise_id else 1
        self._exercise_id = exercise_id
        exercise = self._syllabus.exercise(exercise_id)
        print(hint(self._repo, self._syllabus, exercise, self._step), flush=True)


def difference(repo: Repo, unit: Unit, *, anyway: bool) -> str:
    """A unified diff from the learner's modules to the reference's.

    Exercises of other parts in the same modules are left out. Raises `CourseError` if the unit does not pass
    yet, unless `anyway` is True.
    """
    modules = [module for module in unit.modules if (repo.overlay / f"{module}.py").exists()]
    kernels = [kernel for kernel in unit.kernels if (repo.overlay / kernel.file).exists()]
    if not modules and not kernels:
        raise CourseError(f"{unit.named} is not started: pdm run start {unit.id}")
    found = result(repo, unit)
    if not anyway and found is not Result.PASSING:
        raise CourseError(
            f"{unit.named} must pass its tests first ({found.value}): run `pdm run test {unit.id}`, or add "
            f"--anyway"
        )
    pairs = [_of_unit(repo, unit, module) for module in modules]
    pairs += [(_text(repo.overlay / k.file), _text(sources(repo) / k.file)) for k in kernels]
    names = [f"{module}.py" for module in modules] + [kernel.file for kernel in kernels]
    theirs = [repo.reference] * len(modules) + [sources(repo)] * len(kernels)
    parts = [_STAND_INS] if any(_has_stand_ins(reference) for _, reference in pairs) else []
    for name, folder, (own, reference) in zip(names, theirs, pairs, strict=True):
        lines = difflib.unified_diff(
            own.splitlines(),
            reference.splitlines(),
            repo.shown(repo.overlay / name),
            repo.shown(folder / name),
            lineterm="",
        )
        parts.append("\n".join(lines) or f"{name}: no difference")
    return "\n\n".join(parts)


def _of_unit(repo: Repo, unit: Unit, module: str) -> tuple[str, str]:
    """The learner's and the reference's source of a module, exercises of other parts blank in both."""
    own, reference = _text(repo.overlay / f"{module}.py"), _text(repo.reference / f"{module}.py")
    others = [one for one in unit.day.of_module(module) if one not in unit.exercises]
    if not others:
        return own, reference
    states = {exercise: state(repo, exercise) for exercise in others}
    for exercise in others:
        if states[exercise] is not State.MISSING:
            own = with_blank(own, exercise.name, exercise.message)
        reference = with_blank(reference, exercise.name, exercise.message)
    for helper in unit.day.removed_from(module):
        if not any(helper.rpartition(".")[2] in names_in(reference, name) for name in functions(reference)):
            reference = without(reference, helper)
            own = without(own, helper) if helper in functions(own) else own
    return own, reference


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _has_stand_ins(reference: str) -> bool:
    return any(f"@{name}(" in reference for name in STAND_INS)


def _parameters(repo: Repo, exercise: Exercise) -> str:
    """The names of a function's parameters, such as `(x, mask)`."""
    node = functions((repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8"))[exercise.name]
    names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs] if argument.arg != "self"]
    return f"({', '.join(names)})"
