"""How far a learner is, read from the files: which modules are theirs, what is written, what passes.

Nothing is stored but the outcome of test runs, and that counts only while the files that it was about are the
same.
"""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path

from .errors import CourseError
from .house import House
from .source import SKIPPED, body_lines, functions, imported, is_blank, related
from .suite_files import suite_files
from .syllabus import Day, Exercise, Syllabus


class State(Enum):
    """Where an exercise stands."""

    NOT_STARTED = "not started"
    BLANK = "blank"
    MISSING = "missing"  # the file is there, the function is not
    WRITTEN = "written"
    SKIPPED = "skipped"


class Result(Enum):
    """What is known of a day's tests on the files as they are now."""

    UNKNOWN = "not tested"
    STALE = "changed since its tests ran"
    FAILING = "fails"
    PASSING = "passes"


@dataclass(frozen=True)
class Record:
    """The outcome of a day's last test run, and of which files it was."""

    fingerprint: str
    passed: bool
    files: dict[str, str] = field(default_factory=dict)  # the hash of each, by name


HELPERS = "my_*.py"  # files of the learner's own that stand for no module of the reference


def helper_files(house: House) -> list[Path]:
    """The learner's own files beside the modules, which these may import: `from .my_tools import f`."""
    return sorted(house.overlay.glob(HELPERS))


def own_modules(house: House) -> list[str]:
    """The modules in the overlay. Raises `CourseError` for a file that overrides nothing, with a guess."""
    helpers = {file.stem for file in helper_files(house)}
    own = sorted({file.stem for file in house.overlay.glob("*.py")} - {"__init__", *helpers})
    known = {file.stem for file in house.reference.glob("*.py")}
    for name in own:
        if name not in known:
            guess = get_close_matches(name, known, n=1)
            raise CourseError(
                f"{house.shown(house.overlay / name)}.py overrides nothing"
                f"{f'; did you mean {guess[0]}.py?' if guess else ''} (your own helper files are my_*.py)"
            )
    return own


def started_days(house: House, syllabus: Syllabus) -> list[Day]:
    """The days of which the learner has at least one module."""
    own = set(own_modules(house))
    return [day for day in syllabus.days if own & set(day.modules)]


def missing_modules(house: House, day: Day) -> list[str]:
    """The modules of a day that the learner has not."""
    return [module for module in day.modules if not (house.overlay / f"{module}.py").exists()]


def state(house: House, exercise: Exercise) -> State:
    """Where an exercise stands in the overlay. Raises `CourseError` for a file that does not parse."""
    file = house.overlay / f"{exercise.module}.py"
    if not file.exists():
        return State.NOT_STARTED
    source = file.read_text(encoding="utf-8")
    try:
        known = functions(source)
    except SyntaxError as error:
        raise CourseError(f"{house.shown(file)}, line {error.lineno}: {error.msg}") from error
    if exercise.name not in known:
        return State.MISSING
    if is_blank(source, exercise.name):
        return State.BLANK
    skipped = any(line.strip() == SKIPPED for line in body_lines(source, exercise.name))
    return State.SKIPPED if skipped else State.WRITTEN


def fingerprint(house: House, day: Day) -> str:
    """A hash of what a day's tests depend on: see `file_hashes`."""
    return hashlib.sha256(json.dumps(file_hashes(house, day)).encode()).hexdigest()


def file_hashes(house: House, day: Day) -> dict[str, str]:
    """The hash of each file that a day's tests depend on: the suite, its modules, and whatever these import.

    Of each module the learner's file where there is one. What the day does not reach makes no difference.
    """
    names = [f"{module}.py" for module in sorted(reached(house, day))]
    files = [own if (own := house.overlay / name).exists() else house.reference / name for name in names]
    files += [house.overlay / kernel.file for kernel in day.kernels]
    named = {file.name: file for file in files if file.exists()}
    named |= {str(file.relative_to(house.suites)): file for file in suite_files(house.suites / day.suite)}
    whose = {name: "yours " if file.parent == house.overlay else "" for name, file in named.items()}
    return {
        name: f"{whose[name]}{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
        for name, file in named.items()
    }


def changed_files(house: House, day: Day) -> list[str]:
    """The files that are not as they were when the day's tests ran last."""
    record = _records(house).get(day.id)
    before, now = record.files if record else {}, file_hashes(house, day)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def reached(house: House, day: Day) -> set[str]:
    """The day's modules, those that its suite imports, and all that these import, directly or not."""
    reached: set[str] = set()
    waiting = [*day.modules, *_tested(house, day)]
    while waiting:
        module = waiting.pop()
        own = house.overlay / f"{module}.py"
        file = own if own.exists() else house.reference / own.name
        if module in reached or not file.exists():
            continue
        reached.add(module)
        waiting += related(file.read_text(encoding="utf-8"))
    return reached


def _tested(house: House, day: Day) -> list[str]:
    """The modules behind the names that a day's suite imports."""
    public, files = public_names(house), suite_files(house.suites / day.suite)
    imports = [name for file in files for name in imported(file.read_text(encoding="utf-8"))]
    found = [module.partition("tiny_llm.")[2] or public.get(name, "") for module, name in imports]
    return [module for module in found if module]


def public_names(house: House) -> dict[str, str]:
    """The module behind each name that `from tiny_llm import NAME` gives."""
    api = house.reference / "api.py"
    if not api.exists():
        return {}
    for node in ast.parse(api.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_MODULE_OF" for target in node.targets
        ):
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    return {}


def result(house: House, day: Day) -> Result:
    """What the day's last test run says about the files as they are."""
    record = _records(house).get(day.id)
    if record is None:
        return Result.UNKNOWN
    if record.fingerprint != fingerprint(house, day):
        return Result.STALE
    return Result.PASSING if record.passed else Result.FAILING


def remember(house: House, day: Day, passed: bool) -> None:
    """Record the outcome of a test run of the files as they are."""
    record = Record(fingerprint(house, day), passed, file_hashes(house, day))
    records = {**_records(house), day.id: record}
    house.records.mkdir(exist_ok=True)
    text = json.dumps({day_id: asdict(record) for day_id, record in sorted(records.items())}, indent=1)
    _file(house).write_text(text + "\n", encoding="utf-8")


def _records(house: House) -> dict[str, Record]:
    try:
        found = json.loads(_file(house).read_text(encoding="utf-8"))
        return {day_id: Record(**record) for day_id, record in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # a lost or broken record says nothing


def _file(house: House) -> Path:
    return house.records / "results.json"
