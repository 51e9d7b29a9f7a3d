"""The rules that `course-check` checks by reading files: syllabus, starters and suites are consistent."""

import ast
import builtins
import re
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from . import cpp
from .chapters import chapter_problems
from .errors import CourseError
from .examples import missing_examples
from .may_use import may_use
from .outcome import task_of
from .problem import Problem
from .progress import public_names
from .repo import Repo
from .second_solutions import missing_solutions, unsound_solutions
from .source import (
    Function,
    body_lines,
    find,
    functions,
    imported,
    imported_by,
    names_in,
    own_names,
    reachable_modules,
)
from .starter import starter
from .suite_files import CONFTEST, SHARED, folder_of, imported_files, parts_of, suite_files
from .syllabus import Syllabus
from .units import Day

SHORT = 12  # characters of a line that many functions share, such as `return out`
ALLOWED_IMPORTS = {"tiny_llm", "tiny_llm_checkpoints", "mlx", "numpy", "pytest", "hypothesis"}
ALLOWED_IMPORTS |= sys.stdlib_module_names
ORDER_FREE_CALLS = {"len", "set", "sorted"}
PUBLIC = {"_replace", "_fields", "_asdict", "_make"}  # of a NamedTuple
QUOTED = re.compile(r"`([^`]+)`")
COMMON = {name for kind in (str, bytes, int, float, list, dict, set, tuple, deque) for name in dir(kind)}
COMMON |= {name for kind in (Future, OrderedDict, array) for name in dir(kind)} | set(dir(builtins))
BLOCK_IDS = {"blocks", "physical_indices", "alloc_blocks", "allocate"}


def static_problems(repo: Repo, syllabus: Syllabus) -> list[Problem]:
    """Find everything that is wrong, without running any code."""
    startable = [day for day in syllabus.days if not day.is_planned]
    found = [problem for day in startable for problem in _syllabus_problems(repo, day)]
    if found:
        return found  # the other rules would fail on the same names
    found += [problem for day in startable for problem in _starter_problems(repo, day)]
    found += [problem for day in startable for problem in _removed_problems(repo, day)]
    found += [problem for day in startable for problem in _may_use_problems(repo, day)]
    found += _suites_there(repo, startable)
    for day in startable:
        suite = repo.suites / day.suite
        files = suite_files(suite)
        for file in files:
            found += _suite_problems(repo, syllabus, day, file)
        found += _parts_problems(suite)
        found += _untested_in_parts(repo, day)
        found += _twice(repo.suites, files)
        found += missing_examples(repo, day)
        found += missing_solutions(repo, day)
        found += chapter_problems(repo, day)
    found += unsound_solutions(repo, startable)
    return found


def _syllabus_problems(repo: Repo, day: Day) -> Iterator[Problem]:
    """Every name in the syllabus exists, and no hint is empty."""
    for module in day.modules:
        file = repo.reference / f"{module}.py"
        if not file.exists():
            yield Problem("names", day.id, f"there is no module {module}")
            continue
        source = file.read_text(encoding="utf-8")
        for name in (*(exercise.name for exercise in day.of_module(module)), *day.removed_from(module)):
            try:
                find(source, name)
            except CourseError as error:
                yield Problem("names", f"{day.id}, {module}.py", str(error))
    for kernel in day.kernels:
        try:
            cpp.starter(repo, kernel)
        except (CourseError, OSError) as error:
            yield Problem("names", f"{day.id}, {kernel.file}", str(error))
    hints = {one.id: one.hints for one in day.exercises} | {one.id: one.hints for one in day.kernels}
    for exercise_id, steps in hints.items():
        if min(map(len, steps)) < SHORT:
            yield Problem("hints", exercise_id, f"a hint is missing: {list(steps)}")


def _starter_problems(repo: Repo, day: Day) -> Iterator[Problem]:
    """No line of a solution is left in a starter file."""
    for module in day.modules:
        reference = (repo.reference / f"{module}.py").read_text(encoding="utf-8")
        blank = starter(repo, module, day)
        ast.parse(blank)
        lines = {line.strip() for line in blank.splitlines()}
        solutions = [exercise.name for exercise in day.of_module(module)] + list(day.removed_from(module))
        for name in solutions:
            for line in map(str.strip, body_lines(reference, name)):
                if line in lines and _is_distinctive(line):
                    yield Problem(
                        "leak", f"{day.id}, {module}.py", f"the starter still has a line of {name}: {line}"
                    )


def _removed_problems(repo: Repo, day: Day) -> Iterator[Problem]:
    """Nothing except solutions calls a helper that starters do not contain.

    Otherwise a learner's day could pass and still break other days.
    """
    for removed in day.removed:
        module, _, name = removed.partition(".")
        source = (repo.reference / f"{module}.py").read_text(encoding="utf-8")
        solutions = {exercise.name for exercise in day.of_module(module)} | set(day.removed_from(module))
        called = name.rpartition(".")[2]
        for given in functions(source).keys() - solutions:
            if called in names_in(source, given):
                yield Problem(
                    "starter",
                    f"{day.id}, {module}.py",
                    f"{given} calls {name}, which the starter does not contain",
                )
        for file in sorted(repo.reference.glob("*.py")):
            other = file.read_text(encoding="utf-8")
            if (
                file.stem != module
                and _calls(other, called)
                and module in reachable_modules(repo.reference, file.stem)
            ):
                yield Problem(
                    "starter",
                    f"{day.id}, {module}.py",
                    f"{file.name} calls {name}, which the starter does not contain",
                )


def _may_use_problems(repo: Repo, day: Day) -> Iterator[Problem]:
    """The list of interfaces that an exercise may use reveals no helper and contains every name it needs."""
    for exercise in day.exercises:
        for name in set(exercise.may_use) & set(day.removed):
            yield Problem(
                "may use",
                exercise.id,
                f"{name} must not be listed: the starter does not contain it, so it gives the solution away",
            )
        try:
            usable = may_use(repo, day, exercise)
        except CourseError as error:
            yield Problem("may use", exercise.id, str(error))
            continue
        seen = _words(starter(repo, exercise.module, day)) | _words(" ".join(map(str, usable)))
        source = (repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
        needed = names_in(source, exercise.name) - own_names(source, exercise.name)
        needed -= COMMON | _of_other_packages(source)
        hinted = {
            word for hint in exercise.hints for quoted in QUOTED.findall(hint) for word in _words(quoted)
        }
        for name in sorted(needed & hinted - seen):
            yield Problem("may use", exercise.id, f"{name} is needed, but only a hint names it")


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _of_other_packages(source: str) -> set[str]:
    """Names that are not the reference's: attributes of arrays, and of imported modules, such as `mx.exp`."""
    import mlx.core as mx

    tree = ast.parse(source)
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    outside = [node for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    found = {alias.asname or alias.name for node in outside for alias in node.names} | set(dir(mx.array))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found.add(node.attr)
    return found


def _calls(source: str, name: str) -> bool:
    """Whether a module uses a name that it does not define."""
    if name not in source:
        return False
    tree = ast.parse(source)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {name for _, name in imported(source)}
    return name in used and name not in {node.name for node in ast.walk(tree) if isinstance(node, Function)}


def _is_distinctive(line: str) -> bool:
    """Whether a line would reveal a solution, unlike a line that many functions share."""
    if len(line) <= SHORT or line.startswith(('"""', "#", "return self._", "raise NotImplementedError")):
        return False
    try:
        [node] = ast.parse(line).body
    except (SyntaxError, ValueError):
        return True
    is_constant = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    is_bare_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not node.value.args
    return not is_constant and not is_bare_call


def _suites_there(repo: Repo, days: Iterable[Day]) -> Iterator[Problem]:
    """Every day has a suite, and every suite and every folder belongs to a day."""
    wanted = {day.suite for day in days}
    there = {file.name for file in repo.suites.glob("*.py")} - {CONFTEST}
    for name in sorted(wanted - there):
        yield Problem("suites", name, "the day has no tests")
    for name in sorted(there - wanted):
        yield Problem("suites", name, "does not belong to any day")
    folders = {SHARED, *(folder_of(repo.suites / name).name for name in wanted)}
    for name in sorted({file.parent.name for file in repo.suites.glob("*/*.py")} - folders):
        yield Problem("suites", f"{name}/", "does not belong to any day")


def _parts_problems(suite: Path) -> Iterator[Problem]:
    """The day's test file imports all files of its folder."""
    own = imported_files(suite.parent, suite) if suite.exists() else []
    for part in parts_of(suite):
        if part not in own:
            yield Problem("suites", _shown(suite.parent, part), f"{suite.name} does not import it")


def _twice(suites: Path, files: Iterable[Path]) -> Iterator[Problem]:
    """No two tests or fixtures in different files share a name: the last one imported hides the others."""
    where: dict[str, str] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, Function) and _is_pytests(node):
                here = f"{_shown(suites, file)}, line {node.lineno}"
                first = where.setdefault(node.name, here)
                if first != here:
                    yield Problem("suites", here, f"{node.name} is also in {first}; one hides the other")


def _is_pytests(node: Function) -> bool:
    """Whether a function is a test or a fixture, which pytest finds by name."""
    return node.name.startswith("test_") or any(
        "fixture" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def _untested_in_parts(repo: Repo, day: Day) -> Iterator[Problem]:
    """In a day with parts, every test is about an exercise, so that the exercise's part runs it."""
    tasks = {exercise.task for exercise in day.exercises} | {int(k.id.split(".")[2]) for k in day.kernels}
    for file in suite_files(repo.suites / day.suite) if day.parts else ():
        for name in functions(file.read_text(encoding="utf-8")):
            if name.startswith("test_task_") and task_of(f"::{name}") not in tasks:
                yield Problem("parts", _shown(repo.suites, file), f"{name} is not about any exercise")


def _shown(suites: Path, file: Path) -> str:
    return str(file.relative_to(suites))


def _suite_problems(repo: Repo, syllabus: Syllabus, day: Day, file: Path) -> Iterator[Problem]:
    """A suite's file imports only public names of its own and earlier days, and uses no private names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    public = public_names(repo)
    own = {SHARED, folder_of(repo.suites / day.suite).name}
    shown = _shown(repo.suites, file)
    for node in ast.walk(tree):
        where = f"{shown}, line {getattr(node, 'lineno', 0)}"
        for module, name in imported_by(node):
            if module.partition(".")[0] not in ALLOWED_IMPORTS | own:
                yield Problem("imports", where, f"a suite must not import {module}: import from tiny_llm")
            if name.startswith("_"):
                yield Problem("private", where, f"{module}.{name} is private")
            used = module.partition("tiny_llm.")[2] or public.get(name, "")
            owner = syllabus.owner(used) if module.startswith("tiny_llm") else None
            if owner is not None and owner.day.id > day.id:
                yield Problem("later day", where, f"{used} belongs to day {owner.day.id}")
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not _is_public(node.attr):
            yield Problem("private", where, f".{node.attr} is private")
        if isinstance(node, ast.Compare) and _compares_block_ids(node):
            yield Problem("block ids", where, f"{ast.unparse(node)} asserts which ids were allocated")
    yield from _test_problems(tree, shown)


def _is_public(name: str) -> bool:
    return name in PUBLIC or name.startswith("__")


def _test_problems(tree: ast.Module, shown: str) -> Iterator[Problem]:
    """A test's name contains the task that it is about, and its docstring names the oracle."""
    for name, node in functions(ast.unparse(tree)).items():
        if name.startswith("test_") and not name.startswith("test_task_"):
            yield Problem("names", shown, f"{name} does not name its task: expected test_task_N_...")
        if name.startswith("test_") and "Oracle: " not in (ast.get_docstring(node) or ""):
            yield Problem("oracle", shown, f"{name} does not name an oracle in its docstring")


def _compares_block_ids(node: ast.Compare) -> bool:
    """Whether a comparison such as `x.blocks == [0, 1]` compares allocated ids with literal numbers."""
    sides = [node.left, *node.comparators]
    if not any(isinstance(operator, ast.Eq) for operator in node.ops):
        return False
    named = any(
        isinstance(part, ast.Attribute) and part.attr in BLOCK_IDS and not _ignores_order(part, side)
        for side in sides
        for part in ast.walk(side)
    )
    return named and any(_is_literal_ids(side) for side in sides)


def _ignores_order(part: ast.AST, side: ast.AST) -> bool:
    """Whether ids are inside `len`, `set` or `sorted`, which do not depend on their order."""
    calls = [node for node in ast.walk(side) if isinstance(node, ast.Call)]
    return any(
        isinstance(call.func, ast.Name) and call.func.id in ORDER_FREE_CALLS and part in ast.walk(call)
        for call in calls
    )


def _is_literal_ids(side: ast.AST) -> bool:
    if isinstance(side, ast.List | ast.Tuple | ast.Set):
        return bool(side.elts) and all(isinstance(element, ast.Constant) for element in side.elts)
    return isinstance(side, ast.Constant) and isinstance(side.value, int)
