"""The days of the course as syllabus.toml lists them: modules, exercises, hints, chapters."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CourseError

HINTS = 3  # a question, a fact, a sketch
_DAY_ID = re.compile(r"[1-9]\.[1-9]")
_KEYS = {"id", "title", "works", "chapter", "modules", "remove", "exercise", "kernel", "no_compare"}


@dataclass(frozen=True)
class Exercise:
    """A whole function that the learner writes. id: `1.1.2`, week, day and task; name: `Class.method`.

    message: what a blank raises: which task it is, and where it is explained. may_use: interfaces that it may
    use and that cannot be read from the reference, as `module.name`.
    """

    id: str
    module: str
    name: str
    hints: tuple[str, ...]
    message: str
    may_use: tuple[str, ...] = ()

    @property
    def day_id(self) -> str:
        """The day that it belongs to."""
        return self.id.rpartition(".")[0]


@dataclass(frozen=True)
class Kernel:
    """A day's option in C++: a kernel's file, the functions to write, those that would give them away.

    message: what the compiler says where it is blank.
    """

    id: str
    name: str
    functions: tuple[str, ...]
    removed: tuple[str, ...]
    hints: tuple[str, ...]
    message: str

    @property
    def day_id(self) -> str:
        """The day that it belongs to."""
        return self.id.rpartition(".")[0]

    @property
    def file(self) -> str:
        """The name of its file, in the overlay as in the kernels' sources."""
        return f"{self.name}.cpp"


@dataclass(frozen=True)
class Day:
    """A day: the modules that it owns and, of these, what is written by the learner.

    works: what works afterwards. chapter: its file in the book; None while it is to come. removed:
    functions that would give the solution away, as `module.name`; the starter is without them. no_compare:
    why the day's code is not measured beside the reference's. A day without modules is to come as a whole.
    """

    id: str
    title: str
    works: str
    chapter: str | None
    modules: tuple[str, ...]
    exercises: tuple[Exercise, ...]
    removed: tuple[str, ...]
    kernels: tuple[Kernel, ...] = ()
    no_compare: str | None = None

    @property
    def suite(self) -> str:
        """The name of its test file."""
        week, day = self.id.split(".")
        return f"test_week_{week}_day_{day}.py"

    @property
    def is_to_come(self) -> bool:
        """True where the day cannot be started yet."""
        return not self.modules

    def of_module(self, module: str) -> tuple[Exercise, ...]:
        """The exercises in one of its modules."""
        return tuple(exercise for exercise in self.exercises if exercise.module == module)

    def removed_from(self, module: str) -> tuple[str, ...]:
        """The functions that a starter of that module is without."""
        return tuple(name.partition(".")[2] for name in self.removed if name.partition(".")[0] == module)


@dataclass(frozen=True)
class Syllabus:
    """All days in their order."""

    days: tuple[Day, ...]

    def day(self, wanted: str) -> Day:
        """The day of an id such as 1.1, of one of its exercises, or of one of its files.

        Raises `CourseError` for one that there is not.
        """
        by_id = {day.id: day for day in self.days}
        if wanted in by_id:
            return by_id[wanted]
        if (meant := self._meant(wanted)) is not None:
            return meant
        if not _DAY_ID.fullmatch(wanted):
            raise CourseError(f"{wanted!r} is no day such as 1.1: `pdm run map` shows all")
        raise CourseError(f"there is no day {wanted}: `pdm run map` shows all")

    def _meant(self, wanted: str) -> Day | None:
        """The day of an exercise such as 1.1.1, or of a module such as attention, attention.py or a path to
        it."""
        for day in self.days:
            tasks: tuple[Exercise | Kernel, ...] = (*day.exercises, *day.kernels)
            if any(one.id == wanted for one in tasks):
                return day
        return self.owner(Path(wanted).name.removesuffix(".py"))

    def to_start(self, wanted: str) -> Day:
        """A day that can be started; raises `CourseError` for one that is to come."""
        day = self.day(wanted)
        if day.is_to_come:
            raise CourseError(f"day {day.id} ({day.title}) is to come: the engine has it, the course not yet")
        return day

    def exercise(self, wanted: str) -> Exercise | Kernel:
        """The exercise of an id such as 1.1.2. Raises `CourseError`, with a guess."""
        by_id: dict[str, Exercise | Kernel] = {}
        for day in self.days:
            by_id |= {exercise.id: exercise for exercise in day.exercises}
            by_id |= {kernel.id: kernel for kernel in day.kernels}
        if wanted in by_id:
            return by_id[wanted]
        day = self.to_start(".".join(wanted.split(".")[:2]))
        of_day = [exercise_id for exercise_id in by_id if exercise_id.startswith(f"{day.id}.")]
        raise CourseError(f"there is no exercise {wanted!r}: day {day.id} has {of_day[0]} to {of_day[-1]}")

    def owner(self, module: str) -> Day | None:
        """The day that a module belongs to; None for a given one."""
        return next((day for day in self.days if module in day.modules), None)

    def after(self, day: Day) -> Day | None:
        """The next day that can be started."""
        later = self.days[self.days.index(day) + 1 :]
        return next((candidate for candidate in later if not candidate.is_to_come), None)


def read_syllabus(path: Path) -> Syllabus:
    """Read syllabus.toml. Raises `CourseError` for anything that is misspelled, missing or there twice."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CourseError(f"{path}: {error}") from error
    days = tuple(_day(entry, path) for entry in found.get("day", ()))
    _refuse_twice((day.id for day in days), "day", path)
    _refuse_twice((module for day in days for module in day.modules), "module", path)
    names = (f"{exercise.module}.{exercise.name}" for day in days for exercise in day.exercises)
    _refuse_twice(names, "exercise", path)
    return Syllabus(days)


def _day(entry: dict[str, Any], path: Path) -> Day:
    unknown = entry.keys() - _KEYS
    if unknown:
        raise CourseError(f"{path}: day {entry.get('id')} has the unknown keys {', '.join(sorted(unknown))}")
    for key in ("id", "title", "works"):
        if not isinstance(entry.get(key), str):
            raise CourseError(f"{path}: day {entry.get('id')} has no text {key!r}")
    if not _DAY_ID.fullmatch(entry["id"]):
        raise CourseError(f"{path}: {entry['id']!r} is no day, expected a week and a day such as 1.1")
    modules = tuple(entry.get("modules", ()))
    exercises = tuple(
        _exercise(f"{entry['id']}.{task}", one, entry, path)
        for task, one in enumerate(entry.get("exercise", ()), start=1)
    )
    without = set(modules) - {exercise.module for exercise in exercises}
    if without:
        raise CourseError(f"{path}: day {entry['id']} has no exercise in {', '.join(sorted(without))}")
    return Day(
        id=entry["id"],
        title=entry["title"],
        works=entry["works"],
        chapter=entry.get("chapter"),
        modules=modules,
        exercises=exercises,
        removed=tuple(entry.get("remove", ())),
        no_compare=entry.get("no_compare"),
        kernels=tuple(
            _kernel(f"{entry['id']}.{task}", one, entry, path)
            for task, one in enumerate(entry.get("kernel", ()), start=len(exercises) + 1)
        ),
    )


def _kernel(kernel_id: str, entry: dict[str, Any], day: dict[str, Any], path: Path) -> Kernel:
    name, functions = entry.get("name"), tuple(entry.get("functions", ()))
    if not isinstance(name, str) or not functions:
        raise CourseError(f"{path}: kernel {kernel_id} needs a name and the functions to write")
    message = _message(kernel_id, f"{name}.cpp", day)
    removed = tuple(entry.get("remove", ()))
    return Kernel(kernel_id, name, functions, removed, _hints(kernel_id, entry, path), message)


def _exercise(exercise_id: str, entry: dict[str, Any], day: dict[str, Any], path: Path) -> Exercise:
    module, _, name = str(entry.get("name", "")).partition(".")
    if module not in day.get("modules", ()) or not name:
        raise CourseError(
            f"{path}: exercise {exercise_id} is {entry.get('name')!r}, expected MODULE.FUNCTION of its day"
        )
    hints = _hints(exercise_id, entry, path)
    return Exercise(
        exercise_id, module, name, hints, _message(exercise_id, name, day), tuple(entry.get("may_use", ()))
    )


def _message(exercise_id: str, name: str, day: dict[str, Any]) -> str:
    """Which task a blank is, and where there is help: in the book, or while that is to come in the hints."""
    number, task = exercise_id.rsplit(".", 1)
    week, of_week = number.split(".")
    where = f"book, week {week} day {of_week}, task {task}"
    if not day.get("chapter"):
        where = f"pdm run hint {exercise_id}"
    return f"{exercise_id} {name}: {where}"


def _hints(exercise_id: str, entry: dict[str, Any], path: Path) -> tuple[str, ...]:
    hints = tuple(entry.get("hints", ()))
    if len(hints) != HINTS or not all(isinstance(hint, str) and hint for hint in hints):
        raise CourseError(f"{path}: exercise {exercise_id} has {len(hints)} hints, expected {HINTS}")
    return hints


def _refuse_twice(names: Iterable[str], what: str, path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CourseError(f"{path}: {what} {name} is there twice")
        seen.add(name)
