"""The course of `toy_course` with four exercises on day 1.2, in three parts that share a module."""

import pytest

from tiny_llm_course.progress import State, state
from tiny_llm_course.repo import Repo
from tiny_llm_course.source import with_blank
from tiny_llm_course.units import Part
from toy_course import HINTS, suite, syllabus_of

PARTS = f"""
[[day.part]]
id = "a"
title = "Upwards"
works = "counters that go up"
exercises = [1]
[[day.part]]
id = "b"
title = "Faster"
exercises = [2, 3]
[[day.part]]
id = "c"
title = "And back"
works = "counters that go down"
exercises = [4]
[[day.exercise]]
name = "counting.Counter.count"
{HINTS}
[[day.exercise]]
name = "counting.Counter.leap"
{HINTS}
[[day.exercise]]
name = "doubling.double"
{HINTS}
[[day.exercise]]
name = "counting.Counter.back"
{HINTS}
"""

COUNTING = '''"""Counters."""

from .adding import add


class Counter:
    """Counts up from 0."""

    def __init__(self) -> None:
        self.value = 0

    def count(self) -> int:
        """Add one and return the value.

        >>> Counter().count()
        1
        """
        self.value = self._next()
        return self.value

    def leap(self, steps: int) -> int:
        """Count as often as `steps` says, and return the value.

        >>> Counter().leap(3)
        3
        """
        for _ in range(steps):
            self.count()
        return self.value

    def back(self) -> int:
        """Take one away and return the value.

        >>> Counter().back()
        -1
        """
        self.value = self._before()
        return self.value

    def _next(self) -> int:
        return add(self.value, 1)

    def _before(self) -> int:
        return add(self.value, -1)


def given(x: int) -> int:
    """Nothing to do here."""
    return x
'''

SUITE = '''"""Day 1.2."""

from tiny_llm.counting import Counter
from tiny_llm.doubling import double


def test_task_1_counts() -> None:
    """Oracle: by hand."""
    counter = Counter()
    assert [counter.count(), counter.count()] == [1, 2]


def test_task_2_leaps() -> None:
    """Oracle: by hand."""
    assert Counter().leap(3) == 3


def test_task_3_doubles() -> None:
    """Oracle: by hand."""
    assert double(4) == 8


def test_task_4_goes_back() -> None:
    """Oracle: by hand."""
    assert Counter().back() == -1
'''


def solved(source: str, name: str, body: str) -> str:
    """The source with a learner's body in a function."""
    return with_blank(source, name, "mine").replace('        raise NotImplementedError("mine")', body)


COUNT, LEAP, BACK = (
    "        self.value += 1\n        return self.value",
    "        self.value += steps\n        return self.value",
    "        self.value -= 1\n        return self.value",
)


@pytest.fixture
def course(repo: Repo) -> Repo:
    """The checkout of `toy_course`, with day 1.2 divided into parts."""
    text = repo.syllabus.read_text("utf-8")
    first, rest = text.split('remove = ["counting.Counter._next"]')
    removed = 'remove = ["counting.Counter._next", "counting.Counter._before"]'
    later = rest[rest.index('[[day]]\nid = "1.3"') :]
    text = f"{first}{removed}{PARTS}\n{later}"
    repo.syllabus.write_text(text, "utf-8")
    (repo.reference / "counting.py").write_text(COUNTING, "utf-8")
    suite(repo, 2).write_text(SUITE, "utf-8")
    second = COUNTING
    for name, body in (("count", COUNT), ("leap", LEAP), ("back", BACK)):
        second = solved(second, f"Counter.{name}", body)
    (repo.root / "tests/second_solutions/week_1_day_2/counting.py").write_text(second, "utf-8")
    return repo


def part(repo: Repo, letter: str) -> Part:
    return syllabus_of(repo).day("1.2").part(letter)


def own(repo: Repo, module: str = "counting") -> str:
    return (repo.overlay / f"{module}.py").read_text("utf-8")


def states(repo: Repo) -> list[State]:
    return [state(repo, exercise) for exercise in syllabus_of(repo).day("1.2").exercises]
