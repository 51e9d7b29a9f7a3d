"""The nouns of the course: a day, a part of one, an exercise, a kernel in C++.

A unit is what a command works on: a whole day, or one part of it, which is one sitting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import CourseError


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

    @property
    def task(self) -> int:
        """Its number within the day, which the names of its tests begin with: `test_task_2_...`."""
        return int(self.id.rpartition(".")[2])


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
class PartEntry:
    """A part as the syllabus has it, without its day. works: what works afterwards, where it says so."""

    letter: str
    title: str
    works: str | None
    exercises: tuple[Exercise, ...]


@dataclass(frozen=True)
class Day:
    """A day: the modules that it owns and, of these, what is written by the learner.

    works: what works afterwards. chapter: its file in the book; None while it is to come. removed:
    functions that would give the solution away, as `module.name`; the starter is without them. no_compare:
    why the day's code is not measured beside the reference's. A day without modules is to come as a whole.
    entries: where its parts are; a day that is one sitting has none.
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
        """Itself: the day of a unit."""
        return self

    @property
    def named(self) -> str:
        """`day 3.2`."""
        return f"day {self.id}"

    @property
    def parts(self) -> tuple["Part", ...]:
        """Its parts in order; none where the day is one sitting."""
        return tuple(Part(self, entry) for entry in self.entries)

    @property
    def suite(self) -> str:
        """The name of its test file."""
        week, day = self.id.split(".")
        return f"test_week_{week}_day_{day}.py"

    @property
    def is_planned(self) -> bool:
        """True where the day cannot be started yet."""
        return not self.modules

    def part(self, letter: str) -> "Part":
        """One of its parts. Raises `CourseError` for one that there is not."""
        for part in self.parts:
            if part.entry.letter == letter:
                return part
        ids = [part.id for part in self.parts]
        has = f"it has {ids[0]} to {ids[-1]}" if ids else "it has no parts"
        raise CourseError(f"{self.id}{letter} is no part of day {self.id}: {has}")

    def part_of(self, exercise: Exercise) -> "Part | None":
        """The part that an exercise belongs to; None where the day has no parts."""
        return next((part for part in self.parts if exercise in part.exercises), None)

    def of_module(self, module: str) -> tuple[Exercise, ...]:
        """The exercises in one of its modules."""
        return tuple(exercise for exercise in self.exercises if exercise.module == module)

    def removed_from(self, module: str) -> tuple[str, ...]:
        """The functions that a starter of that module is without."""
        return tuple(name.partition(".")[2] for name in self.removed if name.partition(".")[0] == module)


@dataclass(frozen=True)
class Part:
    """One sitting of a day: some of its exercises, and the modules that these are in. id: `3.2b`.

    A module may hold exercises of several parts. Earlier parts may be used by its tests, later ones not.
    """

    day: Day
    entry: PartEntry

    @property
    def id(self) -> str:
        """The day and a letter."""
        return f"{self.day.id}{self.entry.letter}"

    @property
    def named(self) -> str:
        """`part 3.2b`."""
        return f"part {self.id}"

    @property
    def title(self) -> str:
        """What it is about."""
        return self.entry.title

    @property
    def works(self) -> str | None:
        """What works afterwards, where the syllabus says so."""
        return self.entry.works

    @property
    def exercises(self) -> tuple[Exercise, ...]:
        """Its exercises in order."""
        return self.entry.exercises

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that its exercises are in, in the day's order."""
        own = {exercise.module for exercise in self.exercises}
        return tuple(module for module in self.day.modules if module in own)

    @property
    def suite(self) -> str:
        """The name of its day's test file."""
        return self.day.suite

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """None: an option in C++ belongs to the whole day."""
        return ()

    @property
    def later(self) -> tuple["Part", ...]:
        """The parts of its day after it."""
        parts = self.day.parts
        return parts[parts.index(self) + 1 :]

    def of_module(self, module: str) -> tuple[Exercise, ...]:
        """Its exercises in one module."""
        return tuple(exercise for exercise in self.exercises if exercise.module == module)


Unit = Day | Part


def exercise_range(exercises: Sequence[Exercise]) -> str:
    """`3.2.4 to 3.2.5`, or only one id."""
    first, last = exercises[0].id, exercises[-1].id
    return first if first == last else f"{first} to {last}"
