"""Edits Python source as text: finds, blanks, removes, adds and compares functions.

Line ranges come from `ast`; the reference contains no markers. All other lines stay unchanged, with their
comments.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import indent

from .errors import CourseError
from .imports import lines_of, without_unused_imports

Function = ast.FunctionDef | ast.AsyncFunctionDef
STAND_INS = ("accelerated",)  # decorators that replace the reference's functions with faster code
STAND_IN_NAMES = ("accelerated", "compiled_kernel", "can_fuse", "run_fused")
STATEMENTS = ("body", "orelse", "handlers", "finalbody", "cases")  # fields of a node with statements
MAX_LINE = 110  # characters of a formatted line, as in pyproject.toml
CACHE_SIZE = 500  # sources whose imports are cached
SKIPPED = "# skipped: the reference's code"


def functions(source: str) -> dict[str, Function]:
    """Every function of a module, by name: `function` or `Class.method`."""
    found: dict[str, Function] = {}
    for node in ast.parse(source).body:
        if isinstance(node, Function):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, Function)}
    return found


def find(source: str, name: str) -> Function:
    """One function. Raises `CourseError` for an unknown name."""
    try:
        return functions(source)[name]
    except KeyError:
        raise CourseError(f"there is no function {name}") from None


def blanked(source: str, messages: Mapping[str, str], removed: Iterable[str] = ()) -> str:
    """The source with some functions blank and others removed.

    messages: by function name, the text of the NotImplementedError that the blank raises. A blank keeps its
    signature and docstring. The decorators that select compiled kernels are removed with their imports, and
    so are imports of the standard library that only removed code used.
    """
    lines = lines_of(source)
    edits: list[tuple[int, int, str]] = []  # first and last line, from 1, and their replacement
    for name, message in messages.items():
        node = find(source, name)
        edits.append((_body(node)[0], _last(node), _head(lines, node) + _raise(node, message)))
    for name in removed:
        node = find(source, name)
        edits.append((_first(node), _last(node), ""))
    for node in functions(source).values():
        edits += [(d.lineno, d.end_lineno or d.lineno, "") for d in node.decorator_list if is_stand_in(d)]
    for first, last, text in sorted(edits, reverse=True):
        lines[first - 1 : last] = [text] if text else []
    blank = _without_unused_stand_ins("".join(lines))
    return _tidy(without_unused_imports(blank, source))


def body_lines(source: str, name: str) -> list[str]:
    """The lines of a function's body, without its docstring."""
    node, lines = find(source, name), lines_of(source)
    first, last = _body(node)
    found = [line.rstrip("\n") for line in lines[first - 1 : last]]
    if head := _head(lines, node):
        found[0] = " " * (node.col_offset + 4) + found[0][len(head) - 1 :].lstrip()
    return found


def is_blank(source: str, name: str) -> bool:
    """Whether the function only raises NotImplementedError."""
    body = _statements(find(source, name))
    if len(body) != 1 or not isinstance(body[0], ast.Raise):
        return False
    raised = body[0].exc
    kind = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(kind, ast.Name) and kind.id == "NotImplementedError"


def signature(source: str, name: str) -> str:
    """A function's name, parameters and return type, as written."""
    node = find(source, name)
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def parameters(source: str, name: str) -> str:
    """A function's parameters without their types, which a learner may leave out."""
    args = find(source, name).args
    for one in ast.walk(args):
        if isinstance(one, ast.arg):
            one.annotation = None
    return ast.unparse(args)


def sibling_modules(source: str) -> list[str]:
    """The modules of the same package that a source imports; empty if it does not parse."""
    try:
        nodes = import_nodes(source)
    except SyntaxError:
        return []
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level and node.module]


def import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import at any level. Visits only statements, a tenth of the nodes that `ast.walk` visits."""
    for field in STATEMENTS:
        for node in getattr(tree, field, ()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node
            else:
                yield from import_statements(node)


def reachable_modules(folder: Path, module: str) -> set[str]:
    """The modules of the same folder that a module imports, directly or indirectly."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        new = set(sibling_modules(file.read_text(encoding="utf-8"))) - found if file.exists() else set()
        found |= new
        waiting += new
    return found


def imported_by(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The modules that a node imports, each with the imported name (empty for `import module`)."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((node.module or "", alias.name) for alias in node.names)


def imported(source: str) -> list[tuple[str, str]]:
    """The modules that a source imports, each with the imported name (empty for `import module`)."""
    return [found for node in import_nodes(source) for found in imported_by(node)]


@lru_cache(maxsize=CACHE_SIZE)
def import_nodes(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Every import of a source, at any level. Raises `SyntaxError` if it does not parse."""
    return tuple(import_statements(ast.parse(source)))


def docstrings(source: str) -> list[str]:
    """Every docstring of a module, its classes and its functions."""
    nodes = ast.walk(ast.parse(source))
    found = [
        ast.get_docstring(node) for node in nodes if isinstance(node, ast.Module | ast.ClassDef | Function)
    ]
    return [text for text in found if text is not None]


def with_body_of(source: str, other: str, name: str) -> str:
    """The source with one function's body copied from another source, under the `SKIPPED` comment."""
    lines = lines_of(source)
    node = find(source, name)
    first, last = _body(node)[0], _last(node)
    body = f"{_head(lines, node)}{' ' * (node.col_offset + 4)}{SKIPPED}\n"
    body += "".join(f"{line}\n" for line in body_lines(other, name))
    return "".join([*lines[: first - 1], body, *lines[last:]])


def with_blank(source: str, name: str, message: str) -> str:
    """The source with one function blank; everything else stays unchanged."""
    lines = lines_of(source)
    node = find(source, name)
    blank = _head(lines, node) + _raise(node, message)
    return "".join([*lines[: _body(node)[0] - 1], blank, *lines[_last(node) :]])


def is_reference_code(source: str, other: str, name: str) -> bool:
    """Whether a function is an unchanged copy that `with_body_of` or `with_function` made from `other`."""
    if name not in functions(source) or name not in functions(other):
        return False
    own = body_lines(source, name)
    above = lines_of(source)[_first(find(source, name)) - 2]
    marked = SKIPPED in map(str.strip, [above, *own])
    return marked and [line for line in own if line.strip() != SKIPPED] == body_lines(other, name)


def without(source: str, name: str) -> str:
    """The source without one function, its `SKIPPED` comment, and the empty lines before it."""
    lines = lines_of(source)
    node = find(source, name)
    first = _first(node) - 1
    if first and lines[first - 1].strip() == SKIPPED:
        first -= 1
    gap = 1 if "." in name else 2
    while gap and first and not lines[first - 1].strip():
        first, gap = first - 1, gap - 1
    return "".join([*lines[:first], *lines[_last(node) :]])


def with_function(source: str, other: str, name: str) -> str:
    """The source with a function copied from another source, at the end of its class or of the file."""
    lines = lines_of(source)
    node = find(other, name)
    taken = lines_of(other)[_first(node) - 1 : _last(node)]
    column = " " * node.col_offset
    owner = name.rpartition(".")[0]
    ends = [n.end_lineno for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == owner]
    at = ends[0] if ends and ends[0] is not None else len(lines)
    gap = ["\n"] if owner else ["\n", "\n"]
    return "".join([*lines[:at], *gap, f"{column}{SKIPPED}\n", *taken, *lines[at:]])


def names_in(source: str, name: str) -> set[str]:
    """Every name and attribute in a function's body."""
    nodes = [node for statement in _statements(find(source, name)) for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def own_names(source: str, name: str) -> set[str]:
    """The names of a function's local variables."""
    nodes = [node for statement in _statements(find(source, name)) for node in ast.walk(statement)]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _statements(node: Function) -> list[ast.stmt]:
    """The body without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def _body(node: Function) -> tuple[int, int]:
    """First and last line of the body, without the docstring, with the comments before it."""
    if ast.get_docstring(node) is None:
        return node.body[0].lineno, _last(node)
    docstring = node.body[0]
    return (docstring.end_lineno or docstring.lineno) + 1, _last(node)


def _head(lines: Sequence[str], node: Function) -> str:
    """The signature as a line of its own, if the body begins on its last line; otherwise empty."""
    start = _statements(node)[:1] or node.body
    line = lines[start[0].lineno - 1]
    before = line.encode()[: start[0].col_offset].decode()
    return f"{before.rstrip()}\n" if before.strip() and _body(node)[0] == start[0].lineno else ""


def _first(node: Function) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _last(node: Function) -> int:
    return node.end_lineno or node.lineno


def _raise(node: Function, message: str) -> str:
    """The body of a blank: one line, or three if it would be longer than the formatter allows."""
    column = node.col_offset + 4
    line = f'raise NotImplementedError("{message}")\n'
    if column + len(line) - 1 > MAX_LINE:
        line = f'raise NotImplementedError(\n    "{message}"\n)\n'
    return indent(line, " " * column)


def stand_ins(source: str, name: str) -> set[str]:
    """The kinds of faster code that may replace a function: `compiled`, `fused`, both or none."""
    calls = [one for one in find(source, name).decorator_list if isinstance(one, ast.Call)]
    given = {keyword.arg for one in calls if is_stand_in(one) for keyword in one.keywords}
    return {kind for kind in ("compiled", "fused") if kind in given}


def is_stand_in(decorator: ast.expr) -> bool:
    """Whether a decorator replaces a function of the reference with faster code; starters have none."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(function, ast.Name) and function.id in STAND_INS


def _tidy(source: str) -> str:
    """Restore the formatter's number of empty lines after a removal."""
    source = re.sub(r"\n{3,}(?=[ \t])", "\n\n", source)  # one inside a class
    return re.sub(r"\n{4,}", "\n\n\n", source).rstrip("\n") + "\n"


def _without_unused_stand_ins(source: str) -> str:
    """Remove imports that only the removed decorators used."""
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = lines_of(source)
    for node in reversed(tree.body):
        if not isinstance(node, ast.ImportFrom):
            continue
        kept = [a for a in node.names if a.name not in STAND_IN_NAMES or (a.asname or a.name) in used]
        if len(kept) < len(node.names):
            names = ", ".join(alias.name for alias in kept)
            line = f"from {'.' * node.level}{node.module or ''} import {names}\n"
            lines[node.lineno - 1 : node.end_lineno] = [line] if kept else []
    return "".join(lines)
