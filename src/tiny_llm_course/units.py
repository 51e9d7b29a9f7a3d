"""The nouns of the course: day, part, exercise, and kernel in C++.

A unit is a day or a part of one. Most commands work on a unit; a part is one sitting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import CourseError


@dataclass(frozen=True)
class Exercise:
    """A whole function that the learner writes.

    id: week, day and task, such as `1.1.2`. name: `function` or `Class.method`. message: the text of the
    NotImplementedError in a blank, which names the task and where to find help. may_use: interfaces that it
    may use in addition to those found in the reference's code, as `module.name`.
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

    @property
    def task(self) -> int:
        """Its number within the day. The names of its tests start with it: `test_task_2_...`."""
        return int(self.id.rpartition(".")[2])


@dataclass(frozen=True)
class Kernel:
    """A day's optional kernel in C++: its file, the functions to write, and the solution's helpers.

    removed: the helpers, which the starter does not contain. message: the compiler's error for a blank.
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
        """The name of its file, in the overlay and in the reference's sources."""
        return f"{self.name}.cpp"


@dataclass(frozen=True)
class PartEntry:
    """A part as listed in the syllabus, without its day. works: what works when it is done, or None."""

    letter: str
    title: str
    works: str | None
    exercises: tuple[Exercise, ...]


@dataclass(frozen=True)
class Day:
    """A day: the modules that it owns, and the exercises in them.

    works: what works when it is done. chapter: its file in the book, None if not written yet. removed:
    helpers that would give a solution away, as `module.name`; starters do not contain them. no_compare: why
    there is no comparison with the reference, None if there is one. entries: its parts; a day of one sitting
    has none. A day without modules is planned.
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
    entries: tuple[PartEntry, ...] = ()

    @property
    def day(self) -> "Day":
        """The day itself, so that every unit has a `day`."""
        return self

    @property
    def named(self) -> str:
        """Its name in messages, such as `day 3.2`."""
        return f"day {self.id}"

    @property
    def parts(self) -> tuple["Part", ...]:
        """Its parts in order; empty for a day of one sitting."""
        return tuple(Part(self, entry) for entry in self.entries)

    @property
    def chapter_address(self) -> str | None:
        """Its chapter under book/src, None if not written yet."""
        return self.chapter

    @property
    def suite(self) -> str:
        """The name of its test file."""
        week, day = self.id.split(".")
        return f"test_week_{week}_day_{day}.py"

    @property
    def is_planned(self) -> bool:
        """True if the day cannot be started yet."""
        return not self.modules

    def part(self, letter: str) -> "Part":
        """One of its parts. Raises `CourseError` for an unknown letter."""
        for part in self.parts:
            if part.entry.letter == letter:
                return part
        ids = [part.id for part in self.parts]
        has = f"it has {ids[0]} to {ids[-1]}" if ids else "it has no parts"
        raise CourseError(f"day {self.id} has no part {letter!r}: {has}")

    def part_of(self, exercise: Exercise) -> "Part | None":
        """The part that an exercise belongs to; None if the day has no parts."""
        return next((part for part in self.parts if exercise in part.exercises), None)

    def of_module(self, module: str) -> tuple[Exercise, ...]:
        """The exercises in one of its modules."""
        return tuple(exercise for exercise in self.exercises if exercise.module == module)

    def removed_from(self, module: str) -> tuple[str, ...]:
        """The functions that the module's starter does not contain."""
        return tuple(name.partition(".")[2] for name in self.removed if name.partition(".")[0] == module)


@dataclass(frozen=True)
class Part:
    """One sitting of a day: some of its exercises, and the modules that contain them. id: `3.2b`.

    A module may contain exercises of several parts. A part's tests may use earlier parts, but not later ones.
    """

    day: Day
    entry: PartEntry

    @property
    def id(self) -> str:
        """The day's id and a letter."""
        return f"{self.day.id}{self.entry.letter}"

    @property
    def named(self) -> str:
        """Its name in messages, such as `part 3.2b`."""
        return f"part {self.id}"

    @property
    def title(self) -> str:
        """Its title."""
        return self.entry.title

    @property
    def works(self) -> str | None:
        """What works when it is done, or None."""
        return self.entry.works

    @property
    def exercises(self) -> tuple[Exercise, ...]:
        """Its exercises in order."""
        return self.entry.exercises

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that contain its exercises, in the day's order."""
        own = {exercise.module for exercise in self.exercises}
        return tuple(module for module in self.day.modules if module in own)

    @property
    def chapter_address(self) -> str | None:
        """Its section of the day's chapter, such as `week-3/day-2.md#part-b`; None if not written yet."""
        return self.day.chapter and f"{self.day.chapter}#part-{self.entry.letter}"

    @property
    def suite(self) -> str:
        """The name of its day's test file."""
        return self.day.suite

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Always empty: a kernel in C++ belongs to the whole day."""
        return ()

    @property
    def later(self) -> tuple["Part", ...]:
        """The later parts of its day."""
        parts = self.day.parts
        return parts[parts.index(self) + 1 :]

    def of_module(self, module: str) -> tuple[Exercise, ...]:
        """Its exercises in one module."""
        return tuple(exercise for exercise in self.exercises if exercise.module == module)


Unit = Day | Part


def exercise_range(exercises: Sequence[Exercise]) -> str:
    """The first and last id, such as `3.2.4 to 3.2.5`; one id for a single exercise."""
    first, last = exercises[0].id, exercises[-1].id
    return first if first == last else f"{first} to {last}"
