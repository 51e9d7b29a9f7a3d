"""Checks the examples in the exercises' docstrings: each exercise has one, and all are correct.

An example is a doctest, such as `>>> softmax(mx.zeros(2)).tolist()`, and can use the names of its module. The
docstrings are read from the source, because Python's own doctest search skips functions that compiled kernels
replace. `python -m tiny_llm_course.examples MODULE.NAME ...` runs the examples of some functions in one
process, on `tiny_llm` with the current overlay.
"""

import ast
import doctest
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .problem import Problem, last_lines
from .repo import Repo
from .runs import overlay_of, run_python
from .source import find
from .syllabus import Syllabus
from .units import Day

FAILED = 1


def missing_examples(repo: Repo, day: Day) -> Iterator[Problem]:
    """The exercises of a day without an example in their docstring."""
    for exercise in day.exercises:
        source = (repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
        if not doctest.DocTestParser().get_examples(ast.get_docstring(find(source, exercise.name)) or ""):
            yield Problem("examples", exercise.id, f"{exercise.name} has no example: `>>> ...`")


def failing_examples(
    repo: Repo, syllabus: Syllabus, environment: dict[str, str] | None = None
) -> list[Problem]:
    """The examples that fail on the reference. environment: additional variables for the run."""
    names = {f"{one.module}.{one.name}": one.id for day in syllabus.days for one in day.exercises}
    with overlay_of(repo, {}) as reference:
        run = run_python(reference, ["-m", "tiny_llm_course.examples", *names], environment)
    if run.returncode:
        return [Problem("examples", "all days", f"cannot be run\n{last_lines(run.stderr)}")]
    return [Problem("examples", names[name], f"{name} {said}") for name, said in json.loads(run.stdout)]


def main(names: Sequence[str]) -> None:
    """Run the examples of these functions, and print the failures as JSON: a list of [name, output]."""
    print(json.dumps([[name, said] for name in names for said in _failures(name)]))


def _failures(name: str) -> Iterator[str]:
    """Doctest's report on each failing example of a function."""
    module_name, _, function = name.partition(".")
    module = importlib.import_module(f"tiny_llm.{module_name}")
    file = Path(str(module.__file__))
    node = find(file.read_text(encoding="utf-8"), function)
    docstring, line = ast.get_docstring(node), node.body[0].lineno - 1
    test = doctest.DocTestParser().get_doctest(docstring or "", dict(vars(module)), function, file.name, line)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    yield from (text.replace("*" * 70 + "\n", "").rstrip() for text in said)


if __name__ == "__main__":
    main(sys.argv[1:])
