"""A learner's progress, read from their files: their modules, the state of each exercise, test results.

Only the outcomes of test runs are stored. An outcome is valid as long as the files that it depends on are
unchanged.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from tiny_llm_checkpoints.suggestions import closest

from .errors import CourseError
from .repo import Repo
from .source import SKIPPED, body_lines, functions, imported, is_blank, sibling_modules, with_blank
from .suite_files import suite_files
from .syllabus import Syllabus
from .units import Day, Exercise, Kernel, Part, Unit


class State(Enum):
    """The state of an exercise."""

    NOT_STARTED = "not started"
    BLANK = "blank"
    MISSING = "missing"  # the file exists, the function does not
    WRITTEN = "written"
    SKIPPED = "skipped"


class Result(Enum):
    """The test result of a day or a part for the files as they are now."""

    UNKNOWN = "not tested"
    STALE = "changed since its tests ran"
    FAILING = "fails"
    PASSING = "passes"


@dataclass(frozen=True)
class Record:
    """The outcome of the last test run of a day or a part, and the files that it depends on."""

    fingerprint: str
    passed: bool
    files: dict[str, str] = field(default_factory=dict)  # hash by file name


FIRST_TO_FIX = "first_to_fix.txt"  # in the folder of records
HELPERS = "my_*.py"  # the learner's additional files, which replace no module of the reference


def helper_files(repo: Repo) -> list[Path]:
    """The learner's additional files, which their modules may import: `from .my_tools import f`."""
    return sorted(repo.overlay.glob(HELPERS))


def own_modules(repo: Repo) -> list[str]:
    """The learner's modules. Raises `CourseError` for a file that the reference has no module for.

    Files of editors, such as `.#attention.py`, do not count.
    """
    helpers = {file.stem for file in helper_files(repo)}
    files = {file.stem for file in repo.overlay.glob("*.py") if not file.name.startswith((".", "#"))}
    own = sorted(files - {"__init__", *helpers})
    known = {file.stem for file in repo.reference.glob("*.py")}
    for name in own:
        if name not in known:
            meant = closest(name, sorted(known))
            hint = f"; did you mean {meant[0]}.py?" if meant else ""
            raise CourseError(
                f"{repo.shown(repo.overlay / name)}.py does not replace any module of the engine{hint} "
                "(name your own helper files my_*.py)"
            )
    return own


def started_days(repo: Repo, syllabus: Syllabus) -> list[Day]:
    """The days for which the learner has at least one module."""
    own = set(own_modules(repo))
    return [day for day in syllabus.days if own & set(day.modules)]


def started_units(repo: Repo, syllabus: Syllabus) -> list[Unit]:
    """The days that are started; if only some parts of a day are, those parts instead of the day."""
    return [
        unit
        for day in started_days(repo, syllabus)
        for unit in ([day] if not day.parts or not missing_modules(repo, day) else _started_parts(repo, day))
    ]


def _started_parts(repo: Repo, day: Day) -> list[Part]:
    """The parts that the learner works on, and the first blank one; if all are skipped, all of them."""
    there = [part for part in day.parts if not missing_modules(repo, part)]
    blank = [part for part in there if is_untouched(repo, part)]
    return [part for part in there if is_started(repo, part) and part not in blank[1:]] or there


def is_started(repo: Repo, unit: Unit) -> bool:
    """Whether all files of a unit exist. A part must also contain more than the reference's code."""
    if missing_modules(repo, unit):
        return False
    return isinstance(unit, Day) or {state(repo, one) for one in unit.exercises} != {State.SKIPPED}


def is_untouched(repo: Repo, unit: Unit) -> bool:
    """Whether all exercises of a unit are blank."""
    return {state(repo, exercise) for exercise in unit.exercises} == {State.BLANK}


def missing_modules(repo: Repo, unit: Unit) -> list[str]:
    """The modules of a unit for which the learner has no file."""
    return [module for module in unit.modules if not (repo.overlay / f"{module}.py").exists()]


def state(repo: Repo, exercise: Exercise) -> State:
    """The state of an exercise in the overlay. Raises `CourseError` for a file that does not parse."""
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
    """The exercise with an id such as 3.2.4; for a part such as 3.2b, the first that is not written."""
    if not wanted[-1:].isalpha() or wanted.count(".") != 1:
        return syllabus.exercise(wanted)
    exercises = syllabus.to_start(wanted).exercises
    written = (State.WRITTEN, State.SKIPPED)
    return next((one for one in exercises if state(repo, one) not in written), exercises[0])


def refuse_missing(repo: Repo, exercises: Iterable[Exercise]) -> None:
    """Raise `CourseError` if an exercise's file does not define its function."""
    for exercise in exercises:
        if state(repo, exercise) is State.MISSING:
            file = repo.shown(repo.overlay / f"{exercise.module}.py")
            raise CourseError(
                f"{file} does not define {exercise.name} (exercise {exercise.id}); do not rename it"
            )


def fingerprint(repo: Repo, unit: Unit) -> str:
    """A hash of all files that a unit's tests depend on; see `file_hashes`."""
    return _fingerprint(file_hashes(repo, unit))


def _fingerprint(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def file_hashes(repo: Repo, unit: Unit) -> dict[str, str]:
    """The hash of each file that a unit's tests depend on: its suite, its modules, and all that these import.

    A module's file is the learner's if it exists, otherwise the reference's. Exercises of later parts are
    left out of the hash, because a part passes while these are blank.
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
    """A file's text without the bodies of exercises of later parts."""
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
    """The files that have changed since the unit's tests ran."""
    record = _records(repo).get(unit.id)
    before, now = record.files if record else {}, file_hashes(repo, unit)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def reached(repo: Repo, unit: Unit) -> set[str]:
    """The unit's modules, those that its suite imports, and all that these import, directly or indirectly.

    Modules that belong only to later parts are left out.
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
    """The modules that a day's suite imports, or imports names from."""
    public, files = public_names(repo), suite_files(repo.suites / day.suite)
    imports = [name for file in files for name in imported(file.read_text(encoding="utf-8"))]
    found = [module.partition("tiny_llm.")[2] or public.get(name, "") for module, name in imports]
    return [module for module in found if module]


def public_names(repo: Repo) -> dict[str, str]:
    """The module of each public name, as in `from tiny_llm import NAME`."""
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
    """The test result of a unit for the files as they are now.

    A day also passes if all of its parts pass, and a part if its day passes.
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
    """Record the outcome of a test run on the current files."""
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
        return {}  # a missing or damaged record counts as none


def note_first_to_fix(repo: Repo, exercise_id: str | None) -> None:
    """Store the exercise that a test run says to fix first; None if there is none."""
    repo.records.mkdir(exist_ok=True)
    (repo.records / FIRST_TO_FIX).write_text(exercise_id or "", encoding="utf-8")


def noted_first_to_fix(repo: Repo) -> str | None:
    """The exercise that the last test run said to fix first, or None."""
    file = repo.records / FIRST_TO_FIX
    return (file.read_text(encoding="utf-8") or None) if file.exists() else None


def _file(repo: Repo) -> Path:
    return repo.records / "results.json"
