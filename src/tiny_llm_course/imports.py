"""Imports of the standard library: starters omit those that only solutions use, and `skip` adds them again.

Such an import would reveal how an exercise is solved, and a linter reports it in a solution that does not
use it. Imports of the project's modules stay, because the learner may use them.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator

Import = ast.Import | ast.ImportFrom
LONGEST_LINE = 110


def lines_of(source: str) -> list[str]:
    """The lines of a source with their ends, as Python counts them: a form feed does not end a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", source)


def without_unused_imports(source: str, before: str) -> str:
    """The source without those imports of the standard library that only `before` used."""
    tree = ast.parse(source)
    idle = _used(ast.parse(before)) - _used(tree)
    lines = lines_of(source)
    for node in reversed(_imports(tree)):
        kept = [alias for alias in node.names if _bound(alias) not in idle]
        if _is_standard(node) and len(kept) < len(node.names):
            _replace(lines, node, kept)
    return "".join(lines)


def with_imports(source: str, other: str) -> str:
    """The source with the imports of the standard library that it lacks, copied from another source."""
    for node in _imports(ast.parse(other)):
        tree = ast.parse(source)
        lacking = _used(tree) - set(_defined(tree))
        missing = [alias for alias in node.names if _bound(alias) in lacking]
        if _is_standard(node) and missing:
            source = _with_import(source, other, node, missing)
    return source


def missing_imports(source: str, other: str) -> str:
    """The imports of the standard library that `with_imports` would add."""
    tree = ast.parse(source)
    lacking = _used(tree) - set(_defined(tree))
    found = [
        (node, [alias for alias in node.names if _bound(alias) in lacking])
        for node in _imports(ast.parse(other))
        if _is_standard(node)
    ]
    return "".join(_text(node, missing) for node, missing in found if missing)


def _with_import(source: str, other: str, node: Import, missing: list[ast.alias]) -> str:
    """The source with additional names of one import, in an existing import or in a new line."""
    lines, own = lines_of(source), _imports(ast.parse(source))
    for one in own:
        if isinstance(one, ast.ImportFrom) and _key(one) == _key(node):
            _replace(lines, one, _ordered([*one.names, *missing], node))
            return "".join(lines)
    at, text = _place(source, own, _followers(other, node)), _text(node, missing)
    return "".join([*lines[:at], *_spaced(lines, at, own, text), *lines[at:]])


def _place(source: str, own: list[Import], followers: set[str]) -> int:
    """The line before which to insert a new import: after earlier imports, before those that follow it."""
    follow = (i for i, one in enumerate(own) if _key(one) in followers or not _is_standard(one))
    later = next(follow, len(own))
    if later and _is_standard(own[later - 1]):
        return _last(own[later - 1])
    if later < len(own):
        return own[later].lineno - 1
    first = ast.parse(source).body[:1]
    has_docstring = bool(first) and isinstance(first[0], ast.Expr)
    return _last(own[-1]) if own else _last(first[0]) if has_docstring else 0


def _spaced(lines: list[str], at: int, own: list[Import], text: str) -> list[str]:
    """A new import, with an empty line between it and imports of another group."""
    standard = [one for one in own if _is_standard(one)]
    joined = any(at in (one.lineno - 1, _last(one)) for one in standard)
    above = [] if joined or not at or not lines[at - 1].strip() else ["\n"]
    below = [] if joined or at >= len(lines) or not lines[at].strip() else ["\n"]
    return [*above, text, *below]


def _replace(lines: list[str], node: Import, kept: list[ast.alias]) -> None:
    """Replace an import's names; without names, remove it and the empty line it would leave."""
    at = node.lineno - 1
    lines[at : _last(node)] = [_text(node, kept)] if kept else []
    if not kept and 0 < at < len(lines) and not lines[at - 1].strip() and not lines[at].strip():
        del lines[at]


def _text(node: Import, names: list[ast.alias]) -> str:
    """An import of these names, formatted."""
    parts = [ast.unparse(alias) for alias in names]
    if isinstance(node, ast.Import):
        return "".join(f"import {part}\n" for part in parts)
    head = f"from {node.module} import "
    line = head + ", ".join(parts)
    if len(line) <= LONGEST_LINE:
        return f"{line}\n"
    return f"{head}(\n" + "".join(f"    {part},\n" for part in parts) + ")\n"


def _ordered(names: list[ast.alias], like: Import) -> list[ast.alias]:
    """The names in the order of another import; unknown names come last."""
    order = {ast.unparse(alias): place for place, alias in enumerate(like.names)}
    return sorted(names, key=lambda alias: order.get(ast.unparse(alias), len(order)))


def _followers(source: str, node: Import) -> set[str]:
    """The keys (`_key`) of the imports that come after a given one in a source."""
    return {_key(one) for one in _imports(ast.parse(source)) if one.lineno > node.lineno}


def _key(node: Import) -> str:
    """The part of an import before its names, such as `from collections`."""
    if isinstance(node, ast.Import):
        return f"import {node.names[0].name}"
    return f"from {'.' * node.level}{node.module or ''}"


def _imports(tree: ast.Module) -> list[Import]:
    return [node for node in tree.body if isinstance(node, Import)]


def _is_standard(node: Import) -> bool:
    """Whether an import names only modules of the standard library."""
    if isinstance(node, ast.ImportFrom):
        return not node.level and _package(node.module or "") in sys.stdlib_module_names
    return all(_package(alias.name) in sys.stdlib_module_names for alias in node.names)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _bound(alias: ast.alias) -> str:
    """The name that an import binds."""
    return alias.asname or _package(alias.name)


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module binds at its top level."""
    for node in tree.body:
        if isinstance(node, Import):
            yield from map(_bound, node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        else:
            yield from (one.id for one in ast.walk(node) if _is_stored(one))  # type: ignore[attr-defined]


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _used(tree: ast.Module) -> set[str]:
    """Every name that a module uses, including those in quoted annotations."""
    nodes = list(ast.walk(tree))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | set(_quoted(nodes))


def _quoted(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The names in quoted annotations."""
    for node in nodes:
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            for part in ast.walk(annotation) if annotation is not None else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from re.findall(r"\w+", part.value)


def _last(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno
