"""An interface as shown to a learner: its signature and a one-line summary from its docstring.

Only reads Python source; `may_use` decides which interfaces an exercise may use.
"""

import ast
import re
from typing import NamedTuple

from .source import Function

MAX_FIELDS = 6  # of a constructor; a longer one shows its required fields, or the first ones
FIELDS_SHOWN = 3


class Interface(NamedTuple):
    """An interface that an exercise may use.

    name: `function`, `Class` or `Class.member`. summary: the first sentence of its docstring; for a field,
    the sentence about it in its class's docstring.
    """

    module: str
    name: str
    signature: str
    summary: str

    def __str__(self) -> str:
        return f"{self.module}.{self.signature}{f': {self.summary}' if self.summary else ''}"


def shown(module: str, name: str, node: ast.stmt | ast.expr | None) -> Interface:
    """A function with its signature and summary, or a field with its type."""
    if isinstance(node, Function):
        is_field = "property" in map(ast.unparse, node.decorator_list)
        returns = f" -> {_type(node.returns)}" if node.returns is not None else ""
        typed = f": {_type(node.returns)}" if is_field and node.returns else f"({_arguments(node)}){returns}"
        return Interface(module, name, f"{name}{typed}", first_line(node))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):  # its initial value
        return Interface(module, name, f"{name}: {type(node.value).__name__}", "")
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.BinOp | ast.Constant):
        return Interface(module, name, f"{name}: {ast.unparse(node)}", "")
    return Interface(module, name, name, "")


def constructor(node: ast.ClassDef, keyword_bases: set[str]) -> str:
    """A constructor's parameters, such as `(a, *, b)`; empty for an error or a protocol."""
    for part in node.body:
        if isinstance(part, Function) and part.name == "__init__":
            return f"({_arguments(part)})"
    decorators = [ast.unparse(one) for one in node.decorator_list]
    bases = [ast.unparse(base) for base in node.bases]
    if not any("dataclass" in one for one in decorators) and "NamedTuple" not in bases:
        return ""
    named = [base for base in bases if "NamedTuple" not in base and "Generic" not in base]
    places = [f"the fields of {base}" for base in named if base not in keyword_bases]
    keywords = [f"the fields of {base}" for base in named if base in keyword_bases]
    fields = _fields(node)
    num_shown = len(fields)
    if num_shown > MAX_FIELDS:
        num_shown = max(FIELDS_SHOWN, sum(one.is_required for one in fields))
    for one in fields[:num_shown]:
        (keywords if one.by_name else places).append(one.name + ("" if one.is_required else " = ..."))
    rest = ["..."] if num_shown < len(fields) else []
    return f"({', '.join([*places, *(['*', *keywords] if keywords else []), *rest])})"


class _Field(NamedTuple):
    """A field that a constructor takes. by_name: it is keyword-only."""

    name: str
    is_required: bool
    by_name: bool


def _fields(node: ast.ClassDef) -> list[_Field]:
    """The annotated fields of a class, in order."""
    found, is_keyword = [], is_keyword_only(node)
    for one in (part for part in node.body if isinstance(part, ast.AnnAssign)):
        if ast.unparse(one.annotation).endswith("KW_ONLY"):
            is_keyword = True
            continue
        by_name = _says_keyword_only(one.value, otherwise=is_keyword)
        found.append(_Field(ast.unparse(one.target), one.value is None, by_name))
    return found


def is_keyword_only(node: ast.stmt) -> bool:
    """Whether a class is a dataclass with `kw_only=True`."""
    return isinstance(node, ast.ClassDef) and any(
        _says_keyword_only(one, otherwise=False) for one in node.decorator_list
    )


def _says_keyword_only(call: ast.expr | None, *, otherwise: bool) -> bool:
    """The value of `kw_only` in `dataclass(...)` or `field(...)`; `otherwise` if it is not given."""
    said = [one.value for one in call.keywords if one.arg == "kw_only"] if isinstance(call, ast.Call) else []
    return ast.unparse(said[0]) == "True" if said else otherwise


def _arguments(node: Function) -> str:
    """A function's parameters without `self`, as the formatter writes them: `x: int = 0, *, y: int`."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    values = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    parts = [_parameter(one, value) for one, value in zip(positional, values, strict=True)]
    if given.posonlyargs:
        parts.insert(len(given.posonlyargs), "/")
    if given.vararg is not None:
        parts.append(f"*{_parameter(given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_parameter(one, value) for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        parts.append(f"**{_parameter(given.kwarg, None)}")
    return ", ".join(parts[1:] if parts[:1] == ["self"] else parts)


def _parameter(node: ast.arg, value: ast.expr | None) -> str:
    """A parameter with its annotation and default value."""
    text = node.arg if node.annotation is None else f"{node.arg}: {_type(node.annotation)}"
    if value is None:
        return text
    return f"{text}{'=' if node.annotation is None else ' = '}{ast.unparse(value)}"


def _type(annotation: ast.expr) -> str:
    """An annotation as text, without the quotes of a forward reference."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return ast.unparse(annotation)


def field_summary(node: ast.stmt | None, name: str) -> str:
    """The sentence about a field in a class's docstring: `name: text`, or `a, b: text` for several."""
    text = (ast.get_docstring(node) or "") if isinstance(node, ast.ClassDef) else ""
    about = rf"(?:^|[.;] )(?:\w+, )*{name}(?:, \w+)*: (.+?)(?=\.(?: |$)|; \w+: )"
    found = re.search(about, " ".join(text.split()))
    return found[1] if found else ""


def first_line(node: Function | ast.ClassDef) -> str:
    """The first sentence of a docstring."""
    text = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"\.\s+(?=[A-Z`])", text)[0].rstrip(".")
