"""Reads syllabus.toml, which lists the days with their modules, parts, exercises, hints and chapters."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from .errors import CourseError
from .units import Day, Exercise, Kernel, PartEntry, Unit

HINTS = 3  # a question, a fact, a sketch
_DAY_ID = re.compile(r"[1-9]\.[1-9]")
_PART_ID = re.compile(r"([1-9]\.[1-9])([A-Za-z]+)")
_KEYS = {"id", "title", "works", "chapter", "modules", "remove", "part", "exercise", "kernel", "no_compare"}
_PART_KEYS = {"id", "title", "works", "exercises"}


@dataclass(frozen=True)
class Syllabus:
    """All days in order."""

    days: tuple[Day, ...]

    def day(self, wanted: str) -> Day:
        """The day with that id, or the day of a part, an exercise or a file; see `unit`."""
        return self.unit(wanted).day

    def unit(self, wanted: str) -> Unit:
        """The day with an id such as 1.1, or the part with an id such as 3.2b.

        For an exercise such as 1.1.1, or a module such as attention, attention.py or a path to it: the part
        that contains it, or its day if no single part does. Raises `CourseError` for anything else.
        """
        by_id = {day.id: day for day in self.days}
        if wanted in by_id:
            return by_id[wanted]
        part = _PART_ID.fullmatch(wanted)
        if part is not None and part[1] in by_id:
            return by_id[part[1]].part(part[2])
        if (meant := self._meant(wanted)) is not None:
            return meant
        if not _DAY_ID.fullmatch(part[1] if part else wanted):
            raise CourseError(
                f"{wanted!r} is not a day such as 1.1 or a file of a day: `pdm run map` lists both"
            )
        raise CourseError(f"there is no day {part[1] if part else wanted}: `pdm run map` lists all days")

    def _meant(self, wanted: str) -> Unit | None:
        """The unit that contains an exercise or a module, or None."""
        for day in self.days:
            if any(kernel.id == wanted for kernel in day.kernels):
                return day
            for exercise in day.exercises:
                if exercise.id == wanted:
                    return day.part_of(exercise) or day
        return self.owner(Path(wanted).name.removesuffix(".py"))

    def to_start(self, wanted: str) -> Unit:
        """A day or a part that can be started, see `unit`. Raises `CourseError` for a planned day, too."""
        unit = self.unit(wanted)
        if unit.day.is_planned:
            raise CourseError(
                f"day {unit.day.id} ({unit.day.title}) is planned: the engine has it, the course does not yet"
            )
        return unit

    def whole(self, wanted: str) -> Unit:
        """A day or a part, as `to_start`. Raises `CourseError` for one exercise, too: its file has others."""
        unit = self.to_start(wanted)
        if any(exercise.id == wanted for exercise in unit.exercises):
            raise CourseError(
                f"{wanted} is one exercise; this command takes a day or a part, such as {unit.id}"
            )
        return unit

    def exercise(self, wanted: str) -> Exercise | Kernel:
        """The exercise with an id such as 1.1.2. Raises `CourseError` for an unknown id."""
        by_id: dict[str, Exercise | Kernel] = {}
        for day in self.days:
            by_id |= {exercise.id: exercise for exercise in day.exercises}
            by_id |= {kernel.id: kernel for kernel in day.kernels}
        if wanted in by_id:
            return by_id[wanted]
        unit = self.to_start(".".join(wanted.split(".")[:2]))
        tasks = [*(one.id for one in unit.exercises), *(one.id for one in unit.kernels)]
        raise CourseError(f"there is no exercise {wanted!r}: {unit.named} has {tasks[0]} to {tasks[-1]}")

    def owner(self, module: str) -> Unit | None:
        """The part that a module belongs to, or its day if several parts use it; None if it is in no day."""
        day = next((day for day in self.days if module in day.modules), None)
        if day is None:
            return None
        parts = [part for part in day.parts if module in part.modules]
        return parts[0] if len(parts) == 1 else day

    def after(self, unit: Unit) -> Unit | None:
        """The unit that follows: the day's next part, or the next available day; None at the end."""
        later = self.days[self.days.index(unit.day) + 1 :]
        following = next((candidate for candidate in later if not candidate.is_planned), None)
        return following if isinstance(unit, Day) else next(iter(unit.later), following)


def read_syllabus(path: Path) -> Syllabus:
    """Read syllabus.toml. Raises `CourseError` for an unknown key, a missing entry or a duplicate."""
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
        raise CourseError(f"{path}: {entry['id']!r} is not a day: expected week and day, such as 1.1")
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
        entries=_part_entries(entry, exercises, path),
        kernels=tuple(
            _kernel(f"{entry['id']}.{task}", one, entry, path)
            for task, one in enumerate(entry.get("kernel", ()), start=len(exercises) + 1)
        ),
    )


def _part_entries(
    entry: dict[str, Any], exercises: tuple[Exercise, ...], path: Path
) -> tuple[PartEntry, ...]:
    """The parts of a day. Their letters start at a, and they contain each exercise once, in order."""
    parts = entry.get("part", ())
    for letter, part in zip(ascii_lowercase, parts, strict=False):
        _refuse_part(f"{path}: day {entry['id']}", letter, part)
    tasks = [task for part in parts for task in part["exercises"]]
    if parts and tasks != list(range(1, len(exercises) + 1)):
        raise CourseError(
            f"{path}: the parts of day {entry['id']} have the exercises {', '.join(map(str, tasks))}: "
            f"expected 1 to {len(exercises)}, each once, in order"
        )
    return tuple(
        PartEntry(
            part["id"],
            part["title"],
            part.get("works"),
            tuple(exercises[task - 1] for task in part["exercises"]),
        )
        for part in parts
    )


def _refuse_part(where: str, letter: str, part: dict[str, Any]) -> None:
    """Raise `CourseError` for an invalid part. letter: the id that it must have."""
    if part.get("id") != letter:
        raise CourseError(f"{where} has a part {part.get('id')!r}, expected {letter!r}")
    unknown = part.keys() - _PART_KEYS
    if unknown:
        raise CourseError(f"{where}: part {letter} has the unknown keys {', '.join(sorted(unknown))}")
    if not isinstance(part.get("title"), str):
        raise CourseError(f"{where}: part {letter} has no text 'title'")
    if not isinstance(part.get("works", ""), str):
        raise CourseError(f"{where}: part {letter} has works = {part['works']!r}, expected a text")
    tasks = part.get("exercises")
    if not isinstance(tasks, list) or not tasks or not all(type(task) is int for task in tasks):
        raise CourseError(
            f"{where}: part {letter} has exercises = {tasks!r}, expected numbers of tasks such as [1, 2]"
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
    """A blank's message: the task, and where to find help (the chapter, or the hints if there is none)."""
    task, chapter = exercise_id.rpartition(".")[2], day.get("chapter")
    where = f"book/src/{chapter}#task-{task}" if chapter else f"pdm run hint {exercise_id}"
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
            raise CourseError(f"{path}: {what} {name} is listed twice")
        seen.add(name)
