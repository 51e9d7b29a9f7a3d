"""A starter imports what its given code uses, and the project's own names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm_course.imports import with_imports, without_unused_imports
from tiny_llm_course.repo import Repo
from tiny_llm_course.source import blanked
from tiny_llm_course.starter import skip, start, starter
from tiny_llm_course.syllabus import Syllabus, read_syllabus

WHOLE = '''"""M."""

import heapq
from collections import Counter, OrderedDict
from itertools import chain

import mlx.core as mx

from .own import helper


def given(rows: OrderedDict, counts: "Counter") -> None:
    """Nothing to do here."""


def f(x: mx.array) -> list[int]:
    """F."""
    return helper(heapq.merge(chain([1], x)), Counter, OrderedDict)
'''


def test_a_starter_lacks_standard_library_imports_of_blank_bodies() -> None:
    """Names in annotations count as used, also in quoted ones; the project's names always stay."""
    head = blanked(WHOLE, {"f": "m"}).partition("\n\n\n")[0]
    assert head == (
        '"""M."""\n\nfrom collections import Counter, OrderedDict\n\nimport mlx.core as mx\n\n'
        "from .own import helper"
    )


def test_only_the_unused_names_of_an_import_are_removed() -> None:
    whole = WHOLE.replace("rows: OrderedDict, ", "")
    blank = blanked(whole, {"f": "m"})
    assert "from collections import Counter\n" in blank
    assert with_imports(blank.replace('raise NotImplementedError("m")', "f(OrderedDict)"), whole).count(
        "from collections import Counter, OrderedDict\n"
    )


def test_an_import_that_was_unused_before_is_kept() -> None:
    own = "import heapq\nimport math\n\nx = 1\n"
    assert without_unused_imports(own, own + "heapq.merge\n") == "import math\n\nx = 1\n"


@pytest.mark.parametrize("annotated", ["rows: OrderedDict, ", "rows: OrderedDict, counts: 'Counter'"])
def test_a_filled_exercise_has_its_imports_again(annotated: str) -> None:
    """Whether all imports of a group were removed or only some, the file is as before."""
    whole = WHOLE.replace('rows: OrderedDict, counts: "Counter"', annotated if "Counter" in annotated else "")
    blank = blanked(whole, {"f": "m"})
    assert "itertools" not in blank
    body = whole[whole.index("    return helper") :]
    filled = blank.replace('    raise NotImplementedError("m")\n', body)
    assert with_imports(filled, whole) == whole


def test_an_existing_import_is_not_repeated() -> None:
    own = WHOLE.replace("import heapq\n", "import heapq, math\n")
    assert with_imports(own, WHOLE) == own
    mine = "from .mine import chain\n\nx = chain(heapq)\n"
    assert with_imports(mine, WHOLE) == "import heapq\n\n" + mine


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    """The real course, with an empty overlay."""
    return Repo.here().with_overlay(tmp_path)


def syllabus_of(repo: Repo) -> Syllabus:
    return read_syllabus(repo.root / "src" / "tiny_llm_course" / "syllabus.toml")


def test_a_starter_lacks_the_solutions_imports_and_skip_adds_them(repo: Repo) -> None:
    day = syllabus_of(repo).day("3.3")
    start(repo, day)
    file = repo.overlay / "slot_mapping.py"
    assert "itertools" not in file.read_text("utf-8")
    skip(repo, day, day.of_module("slot_mapping"))
    assert "from itertools import chain\n\nimport mlx" in file.read_text("utf-8")


def test_a_part_that_starts_again_has_no_unused_imports(repo: Repo) -> None:
    """Exercises of other parts have the reference's code, with the imports that it needs."""
    syllabus = syllabus_of(repo)
    later, first = syllabus.unit("3.4b"), syllabus.unit("3.4a")
    start(repo, later)
    file = repo.overlay / "prefix_cache.py"
    assert "from array import array\n" in file.read_text("utf-8")
    start(repo, first)
    assert "from array import array\n" not in file.read_text("utf-8")
    skip(repo, first.day, first.exercises)
    assert "from array import array\n" in file.read_text("utf-8")


def test_what_hints_and_chapters_call_imported_is_imported_by_the_starter(repo: Repo) -> None:
    found = 0
    for day in syllabus_of(repo).days:
        if day.is_planned:
            continue
        starters = [starter(repo, module, day) for module in day.modules]
        names = {alias.asname or alias.name for one in starters for alias in aliases(one)}
        chapter = (repo.root / "book" / "src" / day.chapter).read_text("utf-8") if day.chapter else ""
        text = "\n".join([chapter, *(hint for exercise in day.exercises for hint in exercise.hints)])
        said = set(re.findall(r"`(\w+)`(?:, which)?\s+is\s+imported", text))
        assert said <= names, f"day {day.id}"
        found += len(said)
    assert found


def aliases(source: str) -> list[ast.alias]:
    """Every name that a module's imports bind."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [alias for node in nodes for alias in node.names]


def test_unused_imports_in_starters_are_only_of_the_projects_names(repo: Repo) -> None:
    """Oracle: ruff. `mx` may be unused too."""
    for day in syllabus_of(repo).days:
        for unit in () if day.is_planned else (day, *day.parts):
            folder = repo.overlay / unit.id
            folder.mkdir()
            for module in unit.modules:
                (folder / f"{module}.py").write_text(starter(repo, module, unit), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select=F",
        "--output-format=concise",
    ]
    found = subprocess.run([*command, str(repo.overlay)], text=True, capture_output=True, check=False).stdout
    idle = re.findall(r"F\d+ .*", found)
    assert idle
    assert [one for one in idle if not re.match(r"F401 \S* ?`(\.|tiny_llm|mlx)", one)] == []
