"""Second solutions: each day solved again from its docstrings, with code other than the reference's.

They prove that a suite accepts any correct solution, and that a docstring states everything that its tests
check. They are in `tests/second_solutions/week_W_day_D/`, a file for each module of the day. A file contains
only the exercises, new helpers, and imports from the standard library; the starter supplies the rest.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from .imports import with_imports
from .outcome import Outcome, read_outcome
from .problem import Problem, last_lines
from .repo import Repo
from .runs import overlay_of, run_suites
from .source import Function, functions, is_blank, with_body_of, with_function
from .starter import starter
from .suite_files import folder_of
from .units import Day

SHORT = 3  # lines: functions this short may be equal by chance

# Only their own day's suite runs these: a readable quantized matmul unpacks every matrix in each step, which
# is too slow for the suites of later days that run a real model.
BY_ITSELF = frozenset({"2.4"})


def folder(repo: Repo, day: Day) -> Path:
    """The folder of a day's second solution."""
    return repo.root / "tests" / "second_solutions" / folder_of(repo.suites / day.suite).name


def missing_solutions(repo: Repo, day: Day) -> Iterator[Problem]:
    """The modules of a day without a second solution."""
    for module in day.modules:
        file = folder(repo, day) / f"{module}.py"
        if not file.exists():
            yield Problem("second solution", day.id, f"there is no {repo.shown(file)}")


def unsound_solutions(repo: Repo, days: Iterable[Day]) -> Iterator[Problem]:
    """Files that solve no module of their day, and solutions copied from the reference."""
    days = list(days)
    known = {folder(repo, day) / f"{module}.py" for day in days for module in day.modules}
    for file in sorted((repo.root / "tests" / "second_solutions").glob("*/*.py")):
        if file not in known:
            yield Problem("second solution", repo.shown(file), "is not a module of a day")
    for day in days:
        for module in day.modules:
            yield from _copies(repo, day, module)


def failing_solutions(repo: Repo, days: Iterable[Day]) -> list[Problem]:
    """The failures with all second solutions together; those in `BY_ITSELF` run on their own.

    If the solutions fail together, each day is also tried separately.
    """
    solved = {day: sources for day in days if (sources := _sources(repo, day))}
    found = [problem for day in solved if day.id in BY_ITSELF for problem in _by_itself(repo, day, solved)]
    return found + _together(repo, {day: one for day, one in solved.items() if day.id not in BY_ITSELF})


def _by_itself(repo: Repo, day: Day, solved: Mapping[Day, dict[str, str]]) -> list[Problem]:
    outcome, output = _run(repo, solved[day], [repo.suites / day.suite])
    return [] if outcome.code == 0 else [Problem("second solution", day.id, f"fails\n{last_lines(output)}")]


def _together(repo: Repo, solved: Mapping[Day, dict[str, str]]) -> list[Problem]:
    together = {module: source for sources in solved.values() for module, source in sources.items()}
    if not solved:
        return []
    outcome, output = _run(repo, together, [repo.suites])
    if outcome.code == 0:
        return []
    suites = sorted({Path(test.partition("::")[0]).name for test in outcome.failed})
    found = [
        Problem("second solution", day.id, f"fails {outcome.failed[0]}\n{last_lines(output)}")
        for day, sources in solved.items()
        for outcome, output in [_run(repo, sources, [repo.suites / name for name in suites])]
        if outcome.failed
    ]
    return found or [Problem("second solution", "all together", f"fail\n{last_lines(output)}")]


def _sources(repo: Repo, day: Day) -> dict[str, str]:
    """The sources of a day's second solution, by module."""
    files = [folder(repo, day) / f"{module}.py" for module in day.modules]
    return {file.stem: _completed(repo, day, file) for file in files if file.exists()}


def _completed(repo: Repo, day: Day, file: Path) -> str:
    """A complete module: the starter with the file's exercises and helpers."""
    solution, completed = file.read_text(encoding="utf-8"), starter(repo, file.stem, day)
    helpers = functions(solution).keys() - functions(completed).keys()
    for name in (exercise.name for exercise in day.of_module(file.stem)):
        completed = with_body_of(completed, solution, name)
    for helper in sorted(helpers):
        completed = with_function(completed, solution, helper)
    return with_imports(completed, solution)


def _run(repo: Repo, sources: dict[str, str], suites: Sequence[Path]) -> tuple[Outcome, str]:
    """The outcome and the output of suites on these modules."""
    with overlay_of(repo, sources) as overlay, TemporaryDirectory(prefix="tiny-llm-outcome-") as stored:
        file = Path(stored, "outcome.json")
        run = run_suites(overlay, suites, ["-q"], quiet=True, outcome=file)
        return read_outcome(file, run.returncode), run.stdout


def _copies(repo: Repo, day: Day, module: str) -> Iterator[Problem]:
    """A problem if more than half of a file's longer functions equal the reference's.

    Some equal functions are allowed, because some docstrings allow few solutions. Functions that the starter
    contains do not count.
    """
    file = folder(repo, day) / f"{module}.py"
    if not file.exists():
        return
    reference = (repo.reference / f"{module}.py").read_text(encoding="utf-8")
    blank = starter(repo, module, day)
    given = {name for name in functions(blank) if not is_blank(blank, name)}
    originals = {_body_of(node) for node in functions(reference).values()}
    own = functions(file.read_text(encoding="utf-8")).items()
    longer = {name: node for name, node in own if name not in given and _num_lines(node) > SHORT}
    alike = [name for name, node in longer.items() if _body_of(node) in originals]
    if 2 * len(alike) > len(longer):
        yield Problem(
            "second solution",
            f"{day.id}, {module}.py",
            f"{', '.join(alike)}: the same code as the reference's",
        )


def _statements(node: Function) -> list[ast.stmt]:
    """The body without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def _body_of(node: Function) -> str:
    return "\n".join(ast.dump(statement) for statement in _statements(node))


def _num_lines(node: Function) -> int:
    statements = _statements(node)
    return (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0
