"""Shows code of the project by name: `module.function`, `module.Class` or `module.Class.method`.

Modules of the reference are named without their package, others with it: `tiny_llm_checkpoints.model_config`.
"""

import ast
import inspect
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from tiny_llm_course.source import is_stand_in

from .errors import BookError

SOURCES = Path(__file__).parents[2] / "src"
REFERENCE = "tiny_llm_ref"
LONG = 120  # characters: a longer header keeps its lines
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Code:
    """The directives `code`, `signature` and `docstring`.

    solutions: names of exercises, whose code is only shown at the end of their chapter.
    """

    def __init__(self, solutions: Collection[str]) -> None:
        self._solutions = solutions

    def code(self, name: str) -> str:
        """The whole definition. Raises `BookError` for an exercise, and for a class that contains one."""
        inside = [one for one in self._solutions if one == name or one.startswith(f"{name}.")]
        if inside:
            raise BookError(f"{inside[0]} is an exercise: only {{{{solutions DAY}}}} shows its code")
        return block(source_of(name))

    def signature(self, name: str) -> str:
        """The signature: for a class, its name and the signatures of its public methods."""
        return block(signature_of(name))

    def docstring(self, name: str) -> str:
        """The docstring as Markdown text."""
        return docstring_of(name)


def block(code: str) -> str:
    """A fenced block of Python."""
    return f"```python\n{code}\n```"


def docstring_of(name: str) -> str:
    """A docstring as Markdown: its examples become fenced blocks. Raises `BookError` if it is missing."""
    text = ast.get_docstring(definition(name)[0])
    if text is None:
        raise BookError(f"{name} has no docstring")
    return "\n\n".join(
        block(paragraph) if paragraph.startswith(">>>") else paragraph for paragraph in text.split("\n\n")
    )


def source_of(name: str) -> str:
    """The source of a definition, with its decorators, without the indentation of its class."""
    node, lines = definition(name)
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return inspect.cleandoc("\n".join(["", *lines[first - 1 : node.end_lineno]]))


def solution_of(name: str) -> str:
    """The source of an exercise as it fits into the starter: no docstring, no decorator for faster code."""
    node, lines = definition(name)
    left_out: list[ast.stmt | ast.expr] = [one for one in node.decorator_list if is_stand_in(one)]
    left_out += [] if ast.get_docstring(node) is None else node.body[:1]
    hidden = {number for one in left_out for number in range(one.lineno, (one.end_lineno or one.lineno) + 1)}
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    shown = [number for number in range(first, (node.end_lineno or first) + 1) if number not in hidden]
    return inspect.cleandoc("\n".join(["", *(lines[number - 1] for number in shown)]))


def signature_of(name: str) -> str:
    """The header of a function, in one line unless that is long; of a class, with its public methods'."""
    node, lines = definition(name)
    if not isinstance(node, ast.ClassDef):
        header = _header(node, lines)
        return header if len(header) <= LONG else _written(node, lines)
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
    shown = [one for one in methods if not one.name.startswith("_") or one.name == "__init__"]
    return "\n".join([_header(node, lines), *(f"    {_header(one, lines)} ..." for one in shown)])


def _written(node: Definition, lines: list[str]) -> str:
    """The lines from `def` or `class` to the colon, without the indentation of the class."""
    first = node.body[0]
    last = first.lineno - (1 if first.lineno > node.lineno else 0)
    return inspect.cleandoc("\n".join(["", *lines[node.lineno - 1 : last]]))


def _header(node: Definition, lines: list[str]) -> str:
    """The same as one line."""
    text = " ".join(line.strip() for line in _written(node, lines).splitlines())
    return text.replace("( ", "(").replace(", )", ")").replace(" )", ")").replace(",)", ")")


def definition(name: str) -> tuple[Definition, list[str]]:
    """A definition and the lines of its file. Raises `BookError` for an unknown name."""
    path, rest = _split(name)
    names = dict(_definitions(path))
    if rest not in names:
        guess = get_close_matches(rest, names, n=1)
        advice = f"; did you mean {guess[0]}?" if guess else ""
        raise BookError(f"{path.relative_to(SOURCES)} has no {rest!r}{advice}")
    return names[rest], path.read_text(encoding="utf-8").splitlines()


def _split(name: str) -> tuple[Path, str]:
    """The file and the name within it."""
    package, module, rest = REFERENCE, *name.partition(".")[::2]
    if (SOURCES / module).is_dir():
        package, (module, _, rest) = module, rest.partition(".")
    path = SOURCES / package / f"{module}.py"
    if not path.exists() or not rest:
        raise BookError(f"{name!r} is not MODULE.NAME of {package}")
    return path, rest


@cache
def _definitions(path: Path) -> tuple[tuple[str, Definition], ...]:
    found: list[tuple[str, Definition]] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Definition):
            found.append((node.name, node))
        if isinstance(node, ast.ClassDef):
            found += [
                (f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, Definition)
            ]
    return tuple(found)
