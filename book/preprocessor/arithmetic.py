"""Evaluates the arithmetic of the directive `calc`, and formats its numbers.

Only numbers, `+ - * / // % **`, comparisons by `min` and `max`, `sum` over ranges, `round`, `ceil`, and the
function `value(result, path)` are allowed.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from tiny_llm_checkpoints.sizes import shown_bytes

from .errors import BookError

Number = float
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ceil": math.ceil,
    "max": max,
    "min": min,
    "range": range,
    "round": round,
    "sum": sum,
}


def evaluate(expression: str, functions: Mapping[str, Callable[..., Any]]) -> Number:
    """The value of an expression. functions: allowed in addition to those of this module.

    Raises `BookError` for anything that is not arithmetic.
    """
    try:
        tree = ast.parse(expression, mode="eval")
        found = _value(tree.body, {**_FUNCTIONS, **functions}, {})
    except (SyntaxError, ArithmeticError, TypeError, ValueError) as error:
        raise BookError(f"{expression!r} cannot be computed: {error}") from error
    if not isinstance(found, int | float):
        raise BookError(f"{expression!r} is {found!r}, not a number")
    return found


def _value(node: ast.expr, functions: Mapping[str, Callable[..., Any]], names: Mapping[str, int]) -> Any:
    """Evaluate one node; `names` are the variables of generator expressions."""

    def value(part: ast.expr, **more: int) -> Any:
        return _value(part, functions, {**names, **more})

    match node:
        case ast.Constant():
            found: Any = node.value
        case ast.Name() if node.id in names:
            found = names[node.id]
        case ast.UnaryOp(op=ast.USub()):
            found = -value(node.operand)
        case ast.BinOp():
            found = _BINARY[type(node.op)](value(node.left), value(node.right))
        case ast.List() | ast.Tuple():
            found = [value(one) for one in node.elts]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in functions:
            found = functions[name](*map(value, node.args))
        case ast.GeneratorExp(generators=[ast.comprehension(target=ast.Name(id=name), ifs=[]) as loop]):
            found = [value(node.elt, **{name: item}) for item in value(loop.iter)]
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")
    return found


def shown(number: Number, form: str) -> str:
    """A number as text. form: `bytes`, `percent`, a format such as `,d` or `.1f`, or empty.

    Without a form, integers have thousands separators, and others three significant digits.

    >>> shown(23040, ""), shown(0.8541, "percent"), shown(23040, "bytes"), shown(2.7182818, "")
    ('23,040', '85.4%', '22.5 KiB', '2.72')
    """
    if form == "bytes":
        return shown_bytes(round(number))
    if form == "percent":
        return f"{number:.1%}"
    if form.endswith("d"):
        number = round(number)
    if not form:
        form = "," if isinstance(number, int) or abs(number) >= 1000 else ".3g"
        number = round(number) if form == "," else number
    try:
        return format(number, form)
    except ValueError as error:
        raise BookError(f"{form!r} is not a format: bytes, percent, or one such as ,d or .1f") from error
