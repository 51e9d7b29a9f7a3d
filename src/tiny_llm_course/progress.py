"""How far a learner is, read from the files: which modules are theirs, what is written, what passes.

Nothing is stored but the outcome of test runs, and that counts only while the files that it was about are the
same.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path

from .errors import CourseError
from .repo import Repo
from .source import SKIPPED, body_lines, functions, imported, is_blank, sibling_modules, with_blank
from .suite_files import suite_files
from .syllabus import Syllabus
from .units import Day, Exercise, Kernel, Part, Unit


class State(Enum):
    """Where an exercise stands."""

    NOT_STARTED = "not started"
    BLANK = "blank"
    MISSING = "missing"  # the file is there, the function is not
    WRITTEN = "written"
    SKIPPED = "skipped"


class Result(Enum):
    """What is known of the tests of a day or a part on the files as they are now."""

    UNKNOWN = "not tested"
    STALE = "changed since its tests ran"
    FAILING = "fails"
    PASSING = "passes"


@dataclass(frozen=True)
class Record:
    """The outcome of the last test run of a day or a part, and of which files it was."""

    fingerprint: str
    passed: bool
    files: dict[str, str] = field(default_factory=dict)  # the hash of each, by name


HELPERS = "my_*.py"  # files of the learner's own that stand for no module of the reference


def helper_files(repo: Repo) -> list[Path]:
    """The learner's own files beside the modules, which these may import: `from .my_tools import f`."""
    return sorted(repo.overlay.glob(HELPERS))


def own_modules(repo: Repo) -> list[str]:
    """The modules in the overlay. Raises `CourseError` for a file that overrides nothing, with a guess."""
    helpers = {file.stem for file in helper_files(repo)}
    own = sorted({file.stem for file in repo.overlay.glob("*.py")} - {"__init__", *helpers})
    known = {file.stem for file in repo.reference.glob("*.py")}
    for name in own:
        if name not in known:
            guess = get_close_matches(name, known, n=1)
            raise CourseError(
                f"{repo.shown(repo.overlay / name)}.py overrides nothing"
                f"{f'; did you mean {guess[0]}.py?' if guess else ''} (your own helper files are my_*.py)"
            )
    return own


def started_days(repo: Repo, syllabus: Syllabus) -> list[Day]:
    """The days of which the learner has at least one module."""
    own = set(own_modules(repo))
    return [day for day in syllabus.days if own & set(day.modules)]


def started_units(repo: Repo, syllabus: Syllabus) -> list[Unit]:
    """The days that the learner has, and of days that are there in part the parts that are."""
    return [
        unit
        for day in started_days(repo, syllabus)
        for unit in ([day] if not day.parts or not missing_modules(repo, day) else _started_parts(repo, day))
    ]


def _started_parts(repo: Repo, day: Day) -> list[Part]:
    """The parts with something of the learner's, and the first blank one; where all is skipped, all."""
    there = [part for part in day.parts if not missing_modules(repo, part)]
    blank = [part for part in there if is_untouched(repo, part)]
    return [part for part in there if is_started(repo, part) and part not in blank[1:]] or there


def is_started(repo: Repo, unit: Unit) -> bool:
    """Whether the files of a unit are there, and of a part not all of it is the reference's."""
    if missing_modules(repo, unit):
        return False
    return isinstance(unit, Day) or {state(repo, one) for one in unit.exercises} != {State.SKIPPED}


def is_untouched(repo: Repo, unit: Unit) -> bool:
    """Whether a unit is there, and all of it is blank."""
    return {state(repo, exercise) for exercise in unit.exercises} == {State.BLANK}


def missing_modules(repo: Repo, unit: Unit) -> list[str]:
    """The modules of a day or a part that the learner has not."""
    return [module for module in unit.modules if not (repo.overlay / f"{module}.py").exists()]


def state(repo: Repo, exercise: Exercise) -> State:
    """Where an exercise stands in the overlay. Raises `CourseError` for a file that does not parse."""
    file = repo.overlay / f"{exercise.module}.py"
    if not file.exists():
        return State.NOT_STARTED
    source = file.read_text(encoding="utf-8")
    try:
        known = functions(source)
    except SyntaxError as error:
        raise CourseError(f"{repo.shown(file)}, line {error.lineno}: {error.msg}") from error
    if exercise.name not in known:
        return State.MISSING
    if is_blank(source, exercise.name):
        return State.BLANK
    skipped = any(line.strip() == SKIPPED for line in body_lines(source, exercise.name))
    return State.SKIPPED if skipped else State.WRITTEN


def first_unfinished(repo: Repo, syllabus: Syllabus, wanted: str) -> Exercise | Kernel:
    """The exercise of an id such as 3.2.4, or of a part such as 3.2b the first that is not written."""
    if not wanted[-1:].isalpha() or wanted.count(".") != 1:
        return syllabus.exercise(wanted)
    exercises = syllabus.to_start(wanted).exercises
    written = (State.WRITTEN, State.SKIPPED)
    return next((one for one in exercises if state(repo, one) not in written), exercises[0])


def refuse_missing(repo: Repo, exercises: Iterable[Exercise]) -> None:
    """Raise `CourseError` for an exercise that is not in its file under its name."""
    for exercise in exercises:
        if state(repo, exercise) is State.MISSING:
            file = repo.shown(repo.overlay / f"{exercise.module}.py")
            raise CourseError(
                f"{file} has no {exercise.name} (exercise {exercise.id}): it must keep its name"
            )


def fingerprint(repo: Repo, unit: Unit) -> str:
    """A hash of what a unit's tests depend on: see `file_hashes`."""
    return _fingerprint(file_hashes(repo, unit))


def _fingerprint(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def file_hashes(repo: Repo, unit: Unit) -> dict[str, str]:
    """The hash of each file that a unit's tests depend on: the suite, its modules, and whatever these import.

    Of each module the learner's file where there is one. What the unit does not reach makes no difference,
    and neither do the exercises of later parts: a part passes while these are blank.
    """
    names = [f"{module}.py" for module in sorted(reached(repo, unit))]
    files = [own if (own := repo.overlay / name).exists() else repo.reference / name for name in names]
    files += [repo.overlay / kernel.file for kernel in unit.kernels]
    named = {file.name: file for file in files if file.exists()}
    named |= {str(file.relative_to(repo.suites)): file for file in suite_files(repo.suites / unit.suite)}
    whose = {name: "yours " if file.parent == repo.overlay else "" for name, file in named.items()}
    return {
        name: f"{whose[name]}{hashlib.sha256(_needed(file, unit).encode()).hexdigest()[:16]}"
        for name, file in named.items()
    }


def _needed(file: Path, unit: Unit) -> str:
    """The text of a file, without the bodies of exercises of later parts."""
    text = file.read_text(encoding="utf-8")
    later = [one for part in _later(unit) for one in part.of_module(file.stem)]
    try:
        known = functions(text) if later else {}
    except SyntaxError:
        return text
    for exercise in later:
        text = with_blank(text, exercise.name, "") if exercise.name in known else text
    return text


def _later(unit: Unit) -> tuple[Part, ...]:
    return unit.later if isinstance(unit, Part) else ()


def changed_files(repo: Repo, unit: Unit) -> list[str]:
    """The files that are not as they were when the unit's tests ran last."""
    record = _records(repo).get(unit.id)
    before, now = record.files if record else {}, file_hashes(repo, unit)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def reached(repo: Repo, unit: Unit) -> set[str]:
    """The unit's modules, those that its suite imports, and all that these import, directly or not.

    Without the modules of later parts only.
    """
    later = {module for part in _later(unit) for module in part.modules}
    needed = {module for part in set(unit.day.parts) - set(_later(unit)) for module in part.modules}
    skipped = later - needed
    reached: set[str] = set()
    waiting = [*unit.modules, *_tested(repo, unit.day)]
    while waiting:
        module = waiting.pop()
        own = repo.overlay / f"{module}.py"
        file = own if own.exists() else repo.reference / own.name
        if module in reached | skipped or not file.exists():
            continue
        reached.add(module)
        waiting += sibling_modules(file.read_text(encoding="utf-8"))
    return reached


def _tested(repo: Repo, day: Day) -> list[str]:
    """The modules behind the names that a day's suite imports."""
    public, files = public_names(repo), suite_files(repo.suites / day.suite)
    imports = [name for file in files for name in imported(file.read_text(encoding="utf-8"))]
    found = [module.partition("tiny_llm.")[2] or public.get(name, "") for module, name in imports]
    return [module for module in found if module]


def public_names(repo: Repo) -> dict[str, str]:
    """The module behind each name that `from tiny_llm import NAME` gives."""
    api = repo.reference / "api.py"
    if not api.exists():
        return {}
    for node in ast.parse(api.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_MODULE_OF" for target in node.targets
        ):
            found: dict[str, str] = ast.literal_eval(node.value)
            return {name: module.removeprefix(".") for name, module in found.items()}
    return {}


def result(repo: Repo, unit: Unit) -> Result:
    """What the last test runs say about the files as they are.

    A day passes too where all of its parts do, and a part where its day does.
    """
    found = _recorded(repo, unit)
    if found is Result.PASSING or not unit.day.parts:
        return found
    others: tuple[Unit, ...] = unit.parts if isinstance(unit, Day) else (unit.day,)
    passing = all(_recorded(repo, other) is Result.PASSING for other in others)
    return Result.PASSING if passing else found


def _recorded(repo: Repo, unit: Unit) -> Result:
    record = _records(repo).get(unit.id)
    if record is None:
        return Result.UNKNOWN
    if record.fingerprint != fingerprint(repo, unit):
        return Result.STALE
    return Result.PASSING if record.passed else Result.FAILING


def remember(repo: Repo, unit: Unit, passed: bool) -> None:
    """Record the outcome of a test run of the files as they are."""
    hashes = file_hashes(repo, unit)
    record = Record(_fingerprint(hashes), passed, hashes)
    records = {**_records(repo), unit.id: record}
    repo.records.mkdir(exist_ok=True)
    text = json.dumps({unit_id: asdict(record) for unit_id, record in sorted(records.items())}, indent=1)
    _file(repo).write_text(text + "\n", encoding="utf-8")


def _records(repo: Repo) -> dict[str, Record]:
    try:
        found = json.loads(_file(repo).read_text(encoding="utf-8"))
        return {unit_id: Record(**record) for unit_id, record in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # a lost or broken record says nothing


def _file(repo: Repo) -> Path:
    return repo.records / "results.json"
