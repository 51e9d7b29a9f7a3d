"""A complete course of three small days in a temporary checkout, which tests then change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm_course.check import check
from tiny_llm_course.repo import Repo
from tiny_llm_course.syllabus import Syllabus, read_syllabus

ROOT = Path(__file__).parents[1]
HINTS = 'hints = ["Which is larger, 2 or 3?", "The sum of 2 and 3 is 5.", "Take both, and add them up."]'

SYLLABUS = f"""
[[day]]
id = "1.1"
title = "Adding"
works = "sums"
modules = ["adding"]
[[day.exercise]]
name = "adding.add"
{HINTS}

[[day]]
id = "1.2"
title = "Counting"
works = "counters"
modules = ["counting", "doubling"]
remove = ["counting.Counter._next"]
[[day.exercise]]
name = "counting.Counter.count"
{HINTS}
[[day.exercise]]
name = "doubling.double"
{HINTS}

[[day]]
id = "1.3"
title = "Later"
works = "all of it"
"""

ADDING = '''"""Sums."""


def add(one: int, other: int) -> int:
    """The sum of both.

    >>> add(2, 3)
    5
    """
    return sum((one, other))


def given(x: int) -> int:
    """Nothing to do here."""
    return x
'''

COUNTING = '''"""Counters."""

from .adding import add


class Counter:
    """Counts up from 0."""

    def __init__(self) -> None:
        self.value = 0

    def count(self) -> int:
        """Add one and return the value.

        >>> counter = Counter()
        >>> [counter.count(), counter.count()]
        [1, 2]
        """
        # The first time it is 1.
        self.value = self._next()
        return self.value

    def _next(self) -> int:
        return add(self.value, 1)


def given(x: int) -> int:
    """Nothing to do here."""
    return x
'''

DOUBLING = '''"""Twice."""

from .adding import add


def double(x: int) -> int:
    """x and x.

    >>> double(4)
    8
    """
    return add(x, x)
'''

SUITE_1 = '''"""Day 1.1."""

from tiny_llm.adding import add


def test_task_1_two_and_three() -> None:
    """Oracle: by hand."""
    assert add(2, 3) == 5
'''

SUITE_2 = '''"""Day 1.2."""

from tiny_llm.counting import Counter
from tiny_llm.doubling import double


def test_task_1_counts() -> None:
    """Oracle: by hand."""
    counter = Counter()
    assert [counter.count(), counter.count()] == [1, 2]


def test_task_2_doubles() -> None:
    """Oracle: by hand."""
    assert double(4) == 8
'''

# An editable install finds `tiny_llm` with its own finder, whatever the path is; this checkout removes it.
SITE = """import sys

sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__module__.startswith("_editable")]
"""

SOLUTIONS = {
    "week_1_day_1/adding.py": "def add(one, other):\n    return one + other\n",
    "week_1_day_2/counting.py": (
        "class Counter:\n    def __init__(self):\n        self.value = 0\n\n"
        "    def count(self):\n        self.value += 1\n        return self.value\n"
    ),
    "week_1_day_2/doubling.py": "def double(x):\n    return 2 * x\n",
}

API = "__all__ = []\n\n\ndef __getattr__(name):\n    raise AttributeError(name)\n"


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    """A temporary checkout with a complete course."""
    files = {f"tests/second_solutions/{name}": source for name, source in SOLUTIONS.items()}
    files |= {
        "src/tiny_llm_course/syllabus.toml": SYLLABUS,
        "src/sitecustomize.py": SITE,
        "src/tiny_llm_ref/__init__.py": "",
        "src/tiny_llm_ref/api.py": API,
        "src/tiny_llm_ref/adding.py": ADDING,
        "src/tiny_llm_ref/counting.py": COUNTING,
        "src/tiny_llm_ref/doubling.py": DOUBLING,
        "src/tiny_llm/__init__.py": (ROOT / "src/tiny_llm/__init__.py").read_text("utf-8"),
        "tests_refsol/conftest.py": (ROOT / "tests_refsol/conftest.py").read_text("utf-8"),
        "tests_refsol/test_week_1_day_1.py": SUITE_1,
        "tests_refsol/test_week_1_day_2.py": SUITE_2,
        "pyproject.toml": '[project]\ndependencies = ["mlx==0"]\n\n[tool.ruff]\nline-length = 110\n',
    }
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8")
    return Repo(tmp_path, tmp_path / "src" / "tiny_llm")


def syllabus_of(repo: Repo) -> Syllabus:
    return read_syllabus(repo.syllabus)


def write(repo: Repo, module: str, source: str) -> None:
    (repo.overlay / f"{module}.py").write_text(source, "utf-8")


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


def problems_of(repo: Repo) -> list[str]:
    found = check(repo, syllabus_of(repo), lambda what, done, total: None)
    return [str(problem) for problem in found]


def suite(repo: Repo, day: int) -> Path:
    return repo.suites / f"test_week_1_day_{day}.py"


def solution(repo: Repo, module: str) -> Path:
    [file] = repo.root.glob(f"tests/second_solutions/*/{module}.py")
    return file


def run(arguments: list[str], overlay: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tiny_llm_course", *arguments],
        env={**os.environ, "TINY_LLM_OVERLAY": str(overlay)},
        text=True,
        capture_output=True,
        check=False,
    )
