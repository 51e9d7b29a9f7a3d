"""Where chat templates run: jinja2's immutable sandbox, set up as transformers does it, with bounds.

A template is source from a model file, so it is untrusted. The sandbox keeps it from attributes that lead
out; what it lacks is a limit: a template can loop for ever, or double a text forty times. Here everything
that takes time or makes something pays from one `Budget` for each rendering: a block of statements by the
number of its nodes, an operation by the size of its operands. Source that is too long to be compiled in a
second or two is refused too. Knows nothing of messages or tokens.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from .template_budget import (
    MOST_STEPS,
    Budget,
    TemplateLimitError,
    expect,
    expect_format,
    expect_items,
    expect_power,
    expect_product,
)
from .template_text import Disguise, expect_parts

CALL = 8  # steps of a call
MOST_SOURCE = 200_000  # characters of a template; the longest known have 40 thousand
MOST_NODES = 15_000  # of its syntax tree; the longest known have about 5 thousand
_OF_FUNCTION = 8  # nodes that one counts for that is compiled to a function
MOST_DIGITS = 400  # that a number is rounded to
MOST_DATE = 200  # characters of a date's format

# Whose results can be far larger than what goes in: about the product of the sizes of their arguments.
_GROWING = {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice"}
_GROWING |= {"tojson", "zfill"}
_PER_CHARACTER = {"title", "urlencode", "wordcount", "indent"}  # written in Python: a step a character
_STRIPS = {"strip", "lstrip", "rstrip", "trim"}  # look for each character among those to be stripped
_FROM_RIGHT = {"rfind", "rindex", "rsplit", "rpartition"}  # Python searches backwards in quadratic time
# Filters that take an attribute's name, "a.b,c.d", apart and look it up for each item.
_BY_ATTRIBUTE = {"groupby", "join", "map", "max", "min", "rejectattr", "selectattr", "sort", "sum", "unique"}
_OF_ITEMS = {"batch", "join", "list", "map", "reject", "select", "slice", "sort", "unique"}
_LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")  # too slow, or never the same
# Methods whose cost or result no look at their arguments can bound.
_UNSAFE = {"translate", "format_map", "encode", "decode", "to_bytes", "from_bytes", "fromhex", "hex"}
_UNSAFE |= {"striptags", "unescape", "maketrans"}

_SCOPES = ("_loop_vars", "_block_vars")  # what jinja2 passes beside the arguments of a call

_budget: ContextVar[Budget] = ContextVar("budget")
_disguise: ContextVar[Disguise | None] = ContextVar("disguise", default=None)


@contextmanager
def rendering(
    disguise: Disguise | None = None, most_steps: int = MOST_STEPS
) -> Iterator[Callable[[str], str]]:
    """One rendering with a budget of its own; what it yields takes a piece of output and gives it back.

    disguise: what the texts in the template's variables wear.
    """
    budget = Budget(most_steps)
    tokens = _budget.set(budget), _disguise.set(disguise)
    try:
        yield budget.bounded
    finally:
        _budget.reset(tokens[0])
        _disguise.reset(tokens[1])


class _Bounding(NodeTransformer):
    """Lets every block of statements pay for its nodes, and every operation for its operands."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        costs = {field: _cost(getattr(node, field)) for field in _bodies(node)}
        result = super().visit(node, *args, **kwargs)
        for field, (steps, chars) in costs.items():
            pay = _call("step", nodes.Const(steps), nodes.Const(chars))
            getattr(node, field).insert(0, nodes.ExprStmt(pay))
        return result

    def visit_For(self, node: nodes.For) -> nodes.Node:
        steps = 0 if node.test is None else _cost([node.test])[0]
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_call("step", nodes.Const(steps), nodes.Const(0)), node.test)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            one if isinstance(one, nodes.TemplateData) else _call("written", one) for one in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("operand", node.expr)
        for operand in node.ops:
            operand.expr = _call("operand", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        cut = node.arg
        if not isinstance(cut, nodes.Slice):
            return node
        none = nodes.Const(None)
        return _call("sliced", node.node, cut.start or none, cut.stop or none, cut.step or none)

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


def _bodies(node: nodes.Node) -> list[str]:
    """The fields of a node that are blocks of statements and run more than once, or only sometimes."""
    always = isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
    if isinstance(node, nodes.Template):
        return []
    return [
        f
        for f in ("body", "else_")
        if isinstance(found := getattr(node, f, None), list) and (found or always)
    ]


def _cost(statements: Sequence[nodes.Node]) -> tuple[int, int]:
    """Nodes that run when a block does, and characters that it writes; blocks inside of it pay themselves."""
    count, chars, left = 1, 0, list(statements)
    while left:
        node = left.pop()
        count += 1
        chars += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        left += node.iter_child_nodes(exclude=("body", "else_"))
    return count, chars


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
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _paid(test) for name, test in tests.items()}
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def parse_bounded(self, source: str) -> nodes.Template:
        """The syntax tree of a template as it is written, for those who look at it."""
        _check_length(source)
        return super()._parse(source, None, None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        _check_length(source)
        tree = super()._parse(source, name, filename)
        _check_nodes(tree)
        bounded: nodes.Template = _Bounding().visit(tree)
        bounded.set_environment(self)
        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Nor the methods that no look at their arguments can bound."""
        return attr not in _UNSAFE and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once; jinja2 would let it pass until it is used."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`: a text in disguise is the key that it shows."""
        return super().getitem(obj, _shown(argument))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes."""
        if getattr(obj, "__self__", None) is self:
            return obj(*args)  # the bounds themselves
        budget = _budget.get()
        budget.spend(CALL)
        own = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        for value in (*args, *own.values()):
            budget.searched(value)
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # str.format comes wrapped
        name = getattr(obj, "__name__", "")
        if isinstance(owner, (str, list, tuple, dict)):
            budget.searched(owner)
        if isinstance(owner, str):
            given = _positional(name, args, own)
            _expect_of_method(budget, owner, name, given)
            if (disguise := _disguise.get()) is not None:
                result = disguise.call(owner, name, given)
                if result is not NotImplemented:
                    return budget.bounded(result)
        return budget.bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every operation on two values."""
        budget = _budget.get()
        texts = any(isinstance(value, (str, list, tuple)) for value in (left, right))
        if operator == "*" and texts:
            expect_product(budget, [left, right])
        if operator == "%" and isinstance(left, str):
            expect_format(budget, left, _values(right))
        if operator == "**":
            expect_power(left, right)
        return budget.bounded(super().call_binop(context, operator, left, right))

    # What `_Bounding` puts into a template.

    def step(self, steps: int, chars: int) -> bool:
        """One run of a block of statements: so many nodes, and so many characters of its own to write."""
        budget = _budget.get()
        budget.spend(steps + chars // 64)
        budget.write(chars)
        return True

    def bounded(self, value: Any) -> Any:
        """A list, tuple or dict that the template has just written down."""
        return _budget.get().bounded(value)

    def written(self, value: Any) -> Any:
        """A value that is about to be written out."""
        budget = _budget.get()
        budget.write(budget.size_of(value))
        return budget.bounded(value)

    def operand(self, value: Any) -> Any:
        """One side of a comparison; of a text what it shows."""
        return _shown(_budget.get().searched(value))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        return _budget.get().bounded(value[start:stop:step])

    def concatenated(self, *parts: Any) -> str:
        """The parts as texts, one behind the other: `a ~ b`."""
        budget = _budget.get()
        expect(sum(map(budget.size_of, parts)))
        return str(budget.bounded("".join(map(str, parts))))


def _check_length(source: str) -> None:
    if len(source) > MOST_SOURCE:
        raise jinja2.TemplateSyntaxError(f"{len(source)} characters, expected at most {MOST_SOURCE}", 1)


def _check_nodes(tree: nodes.Template) -> None:
    """Refuse a tree that would take long to compile."""
    left: list[nodes.Node] = [tree]
    count = 0
    while left:
        node = left.pop()
        left += node.iter_child_nodes()
        count += _OF_FUNCTION if isinstance(node, (nodes.Macro, nodes.CallBlock, nodes.Block)) else 1
        if count > MOST_NODES:
            raise jinja2.TemplateSyntaxError(f"more than {MOST_NODES} parts of expressions and statements", 1)


def _shown(value: Any) -> Any:
    """A text without its disguise; anything else as it is."""
    disguise = _disguise.get()
    return disguise.show(value) if disguise is not None and isinstance(value, str) else value


def _values(right: Any) -> list[Any]:
    """What a `%` puts into its format."""
    if isinstance(right, dict):
        return list(right.values())
    return list(right) if isinstance(right, tuple) else [right]


def _positional(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a text's method in their order."""
    if name in ("split", "rsplit") and kwargs:
        return [*args, *([kwargs.get("sep")] if not args else []), kwargs.get("maxsplit", -1)]
    return [*args, *kwargs.values()]


def _expect_of_method(budget: Budget, text: str, name: str, given: list[Any]) -> None:
    """Refuse a method of a text that would make too much, and let it pay for what it searches."""
    if name == "format":
        expect_format(budget, text, given)
    elif name == "replace" and len(given) >= 2 and isinstance(given[0], str):
        expect_product(budget, [len(text) // max(1, len(given[0])) + 1, given[1]])
    elif name in _GROWING:
        expect_product(budget, [text, *given])
    if name in ("split", "rsplit", "splitlines"):
        expect_parts(text, name, given)
    if name in _FROM_RIGHT and given and isinstance(given[0], str):
        budget.spend(len(text) * len(given[0]) // 64)
    if name in _STRIPS:
        _pay_for_stripping(budget, text, given)


def _pay_for_stripping(budget: Budget, text: str, given: list[Any]) -> None:
    if given and isinstance(given[0], str):
        budget.spend(len(text) * len(given[0]) // 64)


def _paid(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that pays for what it looks at: `x is equalto y`."""

    @wraps(test)
    def paid(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(CALL)
        return test(*[_shown(budget.searched(value)) for value in args], **kwargs)

    return paid


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it takes and gives, and is refused where that could be too large."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes first

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(CALL)
        value, *others = args[first:]
        listed = list(value) if isinstance(value, (Iterator, range)) else value
        given = [*others, *kwargs.values()]
        for one in (listed, *given):
            budget.searched(one)
        _expect_of_filter(budget, name, listed, given)
        if name in _OF_TEXT and (disguise := _disguise.get()) is not None and isinstance(listed, str):
            result = disguise.call(listed, _OF_TEXT[name], given)
        else:
            shown = _shown(listed) if name in ("int", "float", "wordcount") else listed
            result = function(*args[:first], shown, *others, **kwargs)
        return budget.bounded(list(result) if isinstance(result, Iterator) else result)

    return guarded


_OF_TEXT = {"trim": "strip", "replace": "replace"}  # filters that are methods of a text


def _expect_of_filter(budget: Budget, name: str, value: Any, given: list[Any]) -> None:
    """Refuse a filter that would make too much, and let it pay for what it does."""
    size = budget.size_of(value)
    if name == "format":
        expect_format(budget, value if isinstance(value, str) else "", given)
    elif name == "replace":
        sought = budget.size_of(given[0]) if given else 1
        expect_product(budget, [size // max(1, sought) + 1, given[1] if len(given) > 1 else ""])
    elif name in _GROWING:
        expect_product(budget, [value, *given])
    if name in _OF_ITEMS:
        expect_items(value)
    if name in _BY_ATTRIBUTE and hasattr(value, "__len__"):
        names = sum(one.count(".") + one.count(",") for one in given if isinstance(one, str))
        budget.spend(4 * names * (1 + len(value)))
    if name in _STRIPS and isinstance(value, str):
        _pay_for_stripping(budget, value, given)
    if name in _PER_CHARACTER:
        budget.spend(4 * size)
    if name == "sort":
        budget.spend(size)
    if name == "round" and any(isinstance(one, (int, float)) and abs(one) > MOST_DIGITS for one in given):
        raise TemplateLimitError(f"it rounds to more than {MOST_DIGITS} digits")
    if name == "sum" and any(not isinstance(one, (int, float, str, type(None))) for one in given):
        budget.spend(size * size // 64)  # lists are copied at every addition


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MOST_DATE:
        raise TemplateLimitError(f"it formats a date in more than {MOST_DATE} characters")
    return datetime.now().strftime(format)


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
