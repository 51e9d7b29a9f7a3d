"""What the course shows of a day or a part as text: its tasks, hints, and how the reference differs."""

import difflib
from pathlib import Path

from .cpp import RULE, job, sources
from .errors import CourseError
from .interfaces import Interface
from .legend import legend
from .may_use import may_use, unit_may_use
from .progress import Result, State, is_untouched, result, state
from .repo import Repo
from .source import STAND_INS, functions, names_in, with_blank, without
from .starter import StartResult
from .syllabus import Syllabus
from .units import Day, Exercise, Kernel, Part, Unit

STEPS = ("a question", "a fact", "a sketch")
LINKS = (
    "links NAME.pyi for editors: they lead to the reference's files; go-to-definition shows its code, "
    "exercises of later days included"
)
_STAND_INS = (
    "@accelerated, _fused, _compiled in the reference: faster code that runs in place of the function below. "
    "Yours always runs itself, and needs none of it."
)


def start_report(repo: Repo, unit: Unit, done: StartResult) -> list[str]:
    """What a start has written, made blank again, or left as it was; links for editors where they are new."""
    if done.changed_nothing:
        return [
            "it is there already, blank"
            if is_untouched(repo, unit)
            else f"{unit.named} is started already: nothing was changed"
        ]
    lines = [f"wrote {repo.shown(file)}" for file in done.files]
    lines += [
        f"blank again in {repo.shown(repo.overlay / e.module)}.py: {e.id} {e.name}" for e in done.blanked
    ]
    if isinstance(unit, Part):
        kept = [e for e in unit.exercises if state(repo, e) in (State.WRITTEN, State.SKIPPED)]
        lines += [f"stays as it is: {e.id} {e.name}" for e in kept]
    return [*lines, *([LINKS] if done.links else [])]


def restart_advice(repo: Repo, unit: Unit, done: StartResult) -> list[str]:
    """How to begin anew with what is started already; nothing where it was not, or is blank."""
    if not done.changed_nothing or is_untouched(repo, unit):
        return []
    return [f"anew:    pdm run start {unit.id} --again (copies your files aside first)"]


def moved_aside(repo: Repo, file: Path) -> str:
    """What was set aside: a file, or the copy of one that stays for its other parts."""
    name = _name_before(file)
    if file.with_name(name).exists():
        return f"copied aside: {repo.shown(file)}; {name} keeps what is of other parts"
    return f"moved aside: {repo.shown(file)}"


def after_reset(unit: Unit, moved: list[Path]) -> str:
    """What is the reference's again: files, or of a file that stays the exercises of the unit."""
    names = {_name_before(file): file.with_name(_name_before(file)).exists() for file in moved}
    whole = [name for name, stays in names.items() if not stays]
    some = [
        f"{exercise.id} in {name}"
        for name, stays in names.items()
        for exercise in (unit.of_module(name.removesuffix(".py")) if stays else ())
    ]
    return f"the reference's again: {', '.join(whole + some)}"


def _name_before(file: Path) -> str:
    """`norm.py` of `norm.py.1.bak`."""
    return file.name.partition(f"{file.suffixes[0]}.")[0] + file.suffixes[0]


def tasks(repo: Repo, unit: Unit) -> str:
    """The exercises of a day or a part, its chapter and its test command.

    Where something of it is written, each exercise says whether it is.
    """
    letters = legend(repo, unit)
    chapter = f"book/src/{unit.day.chapter}" if unit.day.chapter else "to come; the docstrings say all"
    return "\n".join(
        [
            *_exercises(repo, unit),
            *([f"shapes:  {', '.join(letters)}"] if letters else []),
            *_usable(unit_may_use(repo, unit)),
            f"chapter: {chapter}",
            *_tests(unit),
            f"hints:   pdm run hint {unit.exercises[0].id}",
            *(
                f"option:  {k.id}, if you like: {k.file} in C++: pdm run start {unit.id} --cpp, then "
                f"build-kernels; hints: pdm run hint {k.id}"
                for k in unit.kernels
            ),
        ]
    )


def _exercises(repo: Repo, unit: Unit) -> list[str]:
    """A line for each exercise, under a heading where the day has parts."""
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
        f"parts:   {first} to {last}, about an evening each: pdm run start {first} shows only that one",
        f"test:    pdm run test {first}; pdm run test {unit.id} tests all parts",
    ]


def _usable(interfaces: list[Interface]) -> list[str]:
    """What may be used from other files, a line each; nothing where there is none."""
    if not interfaces:
        return []
    return ["you may use, from other files (pdm run hint EXERCISE says which for what):", *_lines(interfaces)]


def _lines(interfaces: list[Interface]) -> list[str]:
    return [f"  {one}" for one in interfaces]


def kernel_tasks(repo: Repo, day: Day) -> str:
    """A day's option in C++: what to write, what to read first, and the commands."""
    lines = [f"  {k.id}  {k.file}  {', '.join(k.functions)}" for k in day.kernels]
    jobs = ", ".join(job(repo, kernel) for kernel in day.kernels)
    return "\n".join(
        [
            *lines,
            f"read:    {repo.shown(sources(repo) / 'kernels.h')}: {jobs}; vec.h beside it",
            f"rule:    {RULE}",
            "build:   pdm run build-kernels",
            f"test:    pdm run test {day.id}",
            f"hints:   pdm run hint {day.kernels[0].id}",
        ]
    )


def hint(repo: Repo, syllabus: Syllabus, exercise: Exercise | Kernel, step: int) -> str:
    """One of the three steps of help; with the first, what the exercise may use."""
    if not 1 <= step <= len(exercise.hints):
        raise CourseError(f"there is no hint {step} of {exercise.id}: 1 is a question, 2 a fact, 3 a sketch")
    text = f"{exercise.id} {exercise.name}, {STEPS[step - 1]}:\n  {exercise.hints[step - 1]}"
    if step == 1 and isinstance(exercise, Exercise):
        usable = may_use(repo, syllabus.day(exercise.day_id), exercise)
        text = "\n".join([text, *(["you may use, from other files:", *_lines(usable)] if usable else [])])
    if step < len(exercise.hints):
        return f"{text}\nmore: pdm run hint {exercise.id} {step + 1}"
    if isinstance(exercise, Kernel):
        return (
            f"{text}\nno more hints: pdm run diff {exercise.day_id} --anyway shows the reference's kernel, "
            f"pdm run skip {exercise.id} runs it instead of yours"
        )
    return f"{text}\nno more hints: pdm run skip {exercise.id} puts the reference's code there"


def difference(repo: Repo, unit: Unit, *, anyway: bool) -> str:
    """How the reference differs from the learner's modules. Raises `CourseError` before the unit passes.

    Of a module with exercises of other parts these are left out.
    """
    modules = [module for module in unit.modules if (repo.overlay / f"{module}.py").exists()]
    kernels = [kernel for kernel in unit.kernels if (repo.overlay / kernel.file).exists()]
    if not modules and not kernels:
        raise CourseError(f"not started: pdm run start {unit.id}")
    found = result(repo, unit)
    if not anyway and found is not Result.PASSING:
        raise CourseError(f"{unit.named} {found.value}: `pdm run test {unit.id}` first, or add --anyway")
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
    """The learner's and the reference's source of a module, what is of other parts blank in both."""
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
    """`(x, mask)`: the names of a function's parameters, as a reminder."""
    node = functions((repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8"))[exercise.name]
    names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs] if argument.arg != "self"]
    return f"({', '.join(names)})"
