"""Where chat templates run: jinja2's immutable sandbox, set up as transformers does it, with bounds.

A template is source from a model file, so it is untrusted. The sandbox keeps it from attributes that lead
out; what it lacks is a limit: a template can loop for ever, or double a text forty times. Here everything
that takes time or makes something spends from one budget for each rendering, and what would be too large is
refused before it is made. Knows nothing of messages or tokens.
"""

import json
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_STEPS = 2_000_000  # a round, an operation, 64 characters are one; 1,000 long messages take 90 thousand
CALL = 8  # steps of a call
ITEM = 64  # characters that an item of a list counts for
MOST_SIZE = 10_000_000  # characters of a text, or of all that is in a list
MOST_BITS = 4096  # of a number
MOST_SOURCE = 1_000_000  # characters of a template; the longest known have 20 thousand

# Whose results can be far larger than what goes in: about the product of the sizes of their arguments.
_GROWING = {"batch", "center", "expandtabs", "format", "indent", "join", "ljust", "replace", "rjust", "slice"}
_GROWING |= {"tojson", "zfill"}
_LEFT_OUT = ("pprint", "random", "urlize", "wordwrap", "xmlattr")  # slow on long texts, or never the same
_WIDE = re.compile(r"\d{6,}")  # a width in a format


class TemplateLimitError(Exception):
    """A template does more than a rendering may; the message says what."""


class _Budget:
    """What one rendering has spent, and how large the containers are that it has seen."""

    def __init__(self) -> None:
        self._steps = 0
        self._sizes: dict[int, tuple[object, int]] = {}  # kept alive, so that no id is used twice

    def spend(self, steps: int = 1) -> None:
        """Count steps; refuse when there have been too many."""
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise TemplateLimitError(f"it takes more than {MOST_STEPS} steps")

    def bounded(self, value: Any) -> Any:
        """`value`, paid for, unless it is too large."""
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise TemplateLimitError(f"it computes a number of more than {MOST_BITS} bits")
        size = self.size_of(value)
        self.spend(1 + size // 64)
        return value

    def size_of(self, value: Any) -> int:
        """Characters and items in a value, written out in full; refused where there are too many."""
        if isinstance(value, (str, bytes)):
            size = len(value)
        elif isinstance(value, (list, tuple, dict, set)):
            if id(value) not in self._sizes:
                self.expect(ITEM * len(value))
                parts = [*value, *value.values()] if isinstance(value, dict) else value
                self._sizes[id(value)] = (value, 1 + ITEM * len(value) + sum(map(self.size_of, parts)))
            size = self._sizes[id(value)][1]
        else:
            size = ITEM * len(value) if isinstance(value, (range, KeysView, ValuesView, ItemsView)) else 1
        self.expect(size)
        return size

    def expect(self, size: int) -> None:
        """Refuse before something of about that size is made."""
        if size > MOST_SIZE:
            raise TemplateLimitError(f"it makes something of more than {MOST_SIZE} characters")

    def expect_growth(self, name: str, arguments: list[Any]) -> None:
        """Refuse a call whose result could be too large: as large as its arguments' sizes multiplied.

        The text that `replace` looks for divides.
        """
        product = 1
        if name == "replace" and len(arguments) >= 3:
            arguments = [self.size_of(arguments[0]) // max(1, self.size_of(arguments[1])) + 1, arguments[2]]
        for argument in arguments:
            if isinstance(argument, str) and _WIDE.search(argument) and len(arguments) > 1:
                self.expect(max(map(int, _WIDE.findall(argument[:MOST_BITS]))))
            is_number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
            product *= max(1, abs(int(argument)) if is_number else self.size_of(argument))
        self.expect(product)


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def rendering() -> Iterator[Callable[[str], str]]:
    """One rendering with a budget of its own; what it yields takes a piece of output and gives it back."""
    budget = _Budget()
    token = _budget.set(budget)
    try:
        yield budget.bounded
    finally:
        _budget.reset(token)


class _Bounding(NodeTransformer):
    """Puts a step into every round of a loop and every macro, and a bound around what is put together."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step")))
        if node.test is not None:
            node.test = nodes.And(_call("step"), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step")))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded", node) if node.ctx == "load" else node


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of the environment's own method, which no variable of the template can hide."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """transformers' options, filters and globals, inside the bounds."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        # Not optimized: what is folded while compiling would be made outside of any budget.
        extensions = [_Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.filters = {
            name: _guarded(name, function) for name, function in self.filters.items() if name not in _LEFT_OUT
        }
        self.filters["tojson"] = _guarded("tojson", _tojson)
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_SOURCE:
            raise jinja2.TemplateSyntaxError(f"{len(source)} characters, expected at most {MOST_SOURCE}", 1)
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounding().visit(tree)
        bounded.set_environment(self)
        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Nor the two methods whose result no look at their arguments can bound."""
        return attr not in ("translate", "format_map") and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once; jinja2 would let it pass until it is used."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes."""
        if getattr(obj, "__self__", None) is self:
            return obj(*args)  # the bounds themselves
        budget = _budget.get()
        budget.spend(CALL)
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # str.format comes wrapped
        if isinstance(owner, str) and getattr(obj, "__name__", "") in _GROWING:
            budget.expect_growth(obj.__name__, [owner, *args, *kwargs.values()])
        return budget.bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every operation on two values."""
        budget = _budget.get()
        texts = any(isinstance(value, (str, list, tuple)) for value in (left, right))
        if (operator == "*" and texts) or (operator == "%" and isinstance(left, str)):
            budget.expect_growth(operator, [left, *right] if isinstance(right, tuple) else [left, right])
        if operator == "**" and abs(right) * max(1, abs(left)).bit_length() > MOST_BITS:
            raise TemplateLimitError(f"it computes a number of more than {MOST_BITS} bits")
        return budget.bounded(super().call_binop(context, operator, left, right))

    # What `_Bounding` puts into a template.

    def step(self) -> bool:
        """One round of a loop, one call of a macro."""
        _budget.get().spend()
        return True

    def bounded(self, value: Any) -> Any:
        """A list, tuple or dict that the template has just written down."""
        return _budget.get().bounded(value)

    def concatenated(self, *parts: Any) -> str:
        """The parts as texts, one behind the other: `a ~ b`."""
        budget = _budget.get()
        budget.expect(sum(map(budget.size_of, parts)))
        return str(budget.bounded("".join(map(str, parts))))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its result, and is refused where that could be too large."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes first

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        value, *others = args[first:]
        listed = list(value) if isinstance(value, (Iterator, range)) else value
        if name in _GROWING:
            budget.expect_growth(name, [listed, *others, *kwargs.values()])
        result = function(*args[:first], listed, *others, **kwargs)
        return budget.bounded(list(result) if isinstance(result, Iterator) else result)

    return guarded


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as templates expect it; jinja2's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
