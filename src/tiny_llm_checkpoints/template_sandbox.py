"""The sandbox for chat templates: jinja2's immutable sandbox with transformers' setup, plus resource limits.

A template is source from a model file, so it is untrusted. jinja2's sandbox blocks attributes that would let
it escape, but does not limit its work: a template could loop forever, or double a string forty times. Here
each rendering has one `Budget`. Blocks of statements are charged for the number of their nodes, operations
for the sizes of their operands and results. Source that takes more than a second or two to compile is
rejected. Knows nothing of messages or tokens.
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
    MAX_STEPS,
    Budget,
    TemplateLimitError,
    check_format,
    check_items,
    check_power,
    check_product,
    check_size,
)
from .template_text import Disguise, check_parts

STEPS_PER_CALL = 8
MAX_SOURCE = 200_000  # characters of a template; the longest known have 40 thousand
MAX_NODES = 15_000  # of its syntax tree; the longest known have about 5 thousand
_NODES_PER_FUNCTION = 8  # a node that is compiled to a Python function counts as this many nodes
MAX_DIGITS = 400  # in an argument of `round`
MAX_DATE = 200  # characters of a date format

# Their results can be much larger than the arguments: about the product of the arguments' sizes.
_GROWING = {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice"}
_GROWING |= {"tojson", "zfill"}
_PER_CHARACTER = {"title", "urlencode", "wordcount", "indent"}  # implemented in Python: 4 steps per character
_STRIPS = {"strip", "lstrip", "rstrip", "trim"}  # these compare each character with all characters to strip
_FROM_RIGHT = {"rfind", "rindex", "rsplit", "rpartition"}  # Python's backward search is quadratic
# Filters that parse an attribute path such as "a.b,c.d" and look it up in each item.
_BY_ATTRIBUTE = {"groupby", "join", "map", "max", "min", "rejectattr", "selectattr", "sort", "sum", "unique"}
_LISTING = {"batch", "join", "list", "map", "reject", "select", "slice", "sort", "unique"}
_REMOVED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")  # too slow, or not reproducible
# Methods whose cost or result cannot be bounded from their arguments.
_UNSAFE = {"translate", "format_map", "encode", "decode", "to_bytes", "from_bytes", "fromhex", "hex"}
_UNSAFE |= {"striptags", "unescape", "maketrans"}

_SCOPES = ("_loop_vars", "_block_vars")  # keyword arguments that jinja2 adds to calls

_budget: ContextVar[Budget] = ContextVar("budget")
_disguise: ContextVar[Disguise | None] = ContextVar("disguise", default=None)


@contextmanager
def rendering(disguise: Disguise | None = None, max_steps: int = MAX_STEPS) -> Iterator[Callable[[str], str]]:
    """One rendering with a new budget. Yields a function that charges a piece of output and returns it.

    disguise: the disguise of the texts in the template's variables.
    """
    budget = Budget(max_steps)
    tokens = _budget.set(budget), _disguise.set(disguise)
    try:
        yield budget.charge
    finally:
        _budget.reset(tokens[0])
        _disguise.reset(tokens[1])


class _Metering(NodeTransformer):
    """Rewrites a template so that its blocks of statements and its operations are charged to the budget."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        costs = {field: _cost(getattr(node, field)) for field in _bodies(node)}
        result = super().visit(node, *args, **kwargs)
        for field, (steps, chars) in costs.items():
            charge = _call("charge_block", nodes.Const(steps), nodes.Const(chars))
            getattr(node, field).insert(0, nodes.ExprStmt(charge))
        return result

    def visit_For(self, node: nodes.For) -> nodes.Node:
        steps = 0 if node.test is None else _cost([node.test])[0]
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_call("charge_block", nodes.Const(steps), nodes.Const(0)), node.test)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            one if isinstance(one, nodes.TemplateData) else _call("charge_output", one) for one in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("charge_operand", node.expr)
        for operand in node.ops:
            operand.expr = _call("charge_operand", operand.expr)
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
        return _call("charge_literal", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("charge_literal", node) if node.ctx == "load" else node


def _bodies(node: nodes.Node) -> list[str]:
    """The fields of a node that are blocks of statements which run conditionally or repeatedly."""
    always = isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
    if isinstance(node, nodes.Template):
        return []
    return [
        f
        for f in ("body", "else_")
        if isinstance(found := getattr(node, f, None), list) and (found or always)
    ]


def _cost(statements: Sequence[nodes.Node]) -> tuple[int, int]:
    """Nodes and literal output characters of one run of a block; nested blocks are charged separately."""
    count, chars, left = 1, 0, list(statements)
    while left:
        node = left.pop()
        count += 1
        chars += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        left += node.iter_child_nodes(exclude=("body", "else_"))
    return count, chars


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment, which a template's variable cannot shadow."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, a mark for training: renders its body."""

    tags = {"generation"}  # noqa: RUF012 (declared like this in jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """A jinja2 environment with transformers' options, filters and globals, within limits."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        # Not optimized: constant folding at compile time would not be charged to a budget.
        extensions = [_Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.filters = {
            name: _metered_filter(name, function)
            for name, function in self.filters.items()
            if name not in _REMOVED
        }
        self.filters["tojson"] = _metered_filter("tojson", _tojson)
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _metered_test(test) for name, test in tests.items()}
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def parse_bounded(self, source: str) -> nodes.Template:
        """The syntax tree of a template as it is written, without the metering, for analysis."""
        _check_length(source)
        return super()._parse(source, None, None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        _check_length(source)
        tree = super()._parse(source, name, filename)
        _check_nodes(tree)
        metered: nodes.Template = _Metering().visit(tree)
        metered.set_environment(self)
        return metered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also forbid methods whose cost cannot be bounded from their arguments."""
        return attr not in _UNSAFE and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Raise at once; jinja2 would only raise when the value is used."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`, with the disguise removed from a key."""
        return super().getitem(obj, _shown(argument))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Charge, check and make a call."""
        if getattr(obj, "__self__", None) is self:
            return obj(*args)  # a metering call that `_Metering` inserted
        budget = _budget.get()
        budget.spend(STEPS_PER_CALL)
        own = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        for value in (*args, *own.values()):
            budget.charge_search(value)
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # jinja2 wraps str.format
        name = getattr(obj, "__name__", "")
        if isinstance(owner, (str, list, tuple, dict)):
            budget.charge_search(owner)
        if isinstance(owner, str):
            given = _positional(name, args, own)
            _check_method(budget, owner, name, given)
            if (disguise := _disguise.get()) is not None:
                result = disguise.call(owner, name, given)
                if result is not NotImplemented:
                    return budget.charge(result)
        return budget.charge(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check, run and charge a binary operator."""
        budget = _budget.get()
        texts = any(isinstance(value, (str, list, tuple)) for value in (left, right))
        if operator == "*" and texts:
            check_product(budget, [left, right])
        if operator == "%" and isinstance(left, str):
            check_format(budget, left, _values(right))
        if operator == "**":
            check_power(left, right)
        return budget.charge(super().call_binop(context, operator, left, right))

    # The methods below are called by the code that `_Metering` inserts.

    def charge_block(self, steps: int, chars: int) -> bool:
        """Charge one run of a block: its nodes and the characters of its literal output."""
        budget = _budget.get()
        budget.spend(steps + chars // 64)
        budget.write(chars)
        return True

    def charge_literal(self, value: Any) -> Any:
        """Charge a list, tuple or dict display."""
        return _budget.get().charge(value)

    def charge_output(self, value: Any) -> Any:
        """Charge a value that is about to be written."""
        budget = _budget.get()
        budget.write(budget.size_of(value))
        return budget.charge(value)

    def charge_operand(self, value: Any) -> Any:
        """Charge one side of a comparison; return it without a disguise."""
        return _shown(_budget.get().charge_search(value))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        return _budget.get().charge(value[start:stop:step])

    def concatenated(self, *parts: Any) -> str:
        """`a ~ b`: the parts as strings, concatenated."""
        budget = _budget.get()
        check_size(sum(map(budget.size_of, parts)))
        return str(budget.charge("".join(map(str, parts))))


def _check_length(source: str) -> None:
    """Raise `TemplateSyntaxError` for a template that is too long."""
    if len(source) > MAX_SOURCE:
        raise jinja2.TemplateSyntaxError(f"has {len(source)} characters, expected at most {MAX_SOURCE}", 1)


def _check_nodes(tree: nodes.Template) -> None:
    """Raise `TemplateSyntaxError` for a tree that would take long to compile."""
    left: list[nodes.Node] = [tree]
    count = 0
    while left:
        node = left.pop()
        left += node.iter_child_nodes()
        count += _NODES_PER_FUNCTION if isinstance(node, (nodes.Macro, nodes.CallBlock, nodes.Block)) else 1
        if count > MAX_NODES:
            raise jinja2.TemplateSyntaxError(f"has more than {MAX_NODES} syntax nodes", 1)


def _shown(value: Any) -> Any:
    """A string without its disguise; other values as they are."""
    disguise = _disguise.get()
    return disguise.show(value) if disguise is not None and isinstance(value, str) else value


def _values(right: Any) -> list[Any]:
    """The values that `%` inserts into its format."""
    if isinstance(right, dict):
        return list(right.values())
    return list(right) if isinstance(right, tuple) else [right]


def _positional(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a string method, in positional order."""
    if name in ("split", "rsplit") and kwargs:
        return [*args, *([kwargs.get("sep")] if not args else []), kwargs.get("maxsplit", -1)]
    return [*args, *kwargs.values()]


def _check_method(budget: Budget, text: str, name: str, given: list[Any]) -> None:
    """Check the result size of a string method, and charge its search."""
    if name == "format":
        check_format(budget, text, given)
    elif name == "replace" and len(given) >= 2 and isinstance(given[0], str):
        check_product(budget, [len(text) // max(1, len(given[0])) + 1, given[1]])
    elif name in _GROWING:
        check_product(budget, [text, *given])
    if name in ("split", "rsplit", "splitlines"):
        check_parts(text, name, given)
    if name in _FROM_RIGHT and given and isinstance(given[0], str):
        budget.spend(len(text) * len(given[0]) // 64)
    if name in _STRIPS:
        _charge_strip(budget, text, given)


def _charge_strip(budget: Budget, text: str, given: list[Any]) -> None:
    if given and isinstance(given[0], str):
        budget.spend(len(text) * len(given[0]) // 64)


def _metered_test(test: Callable[..., Any]) -> Callable[..., Any]:
    """A jinja2 test, such as `x is equalto y`, that charges its operands."""

    @wraps(test)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(STEPS_PER_CALL)
        return test(*[_shown(budget.charge_search(value)) for value in args], **kwargs)

    return metered


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A jinja2 filter that charges its arguments and result, and checks the result's size in advance."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # skips the environment or context argument

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(STEPS_PER_CALL)
        value, *others = args[first:]
        listed = list(value) if isinstance(value, (Iterator, range)) else value
        given = [*others, *kwargs.values()]
        for one in (listed, *given):
            budget.charge_search(one)
        _check_filter(budget, name, listed, given)
        if name in _STRING_METHODS and (disguise := _disguise.get()) is not None and isinstance(listed, str):
            result = disguise.call(listed, _STRING_METHODS[name], given)
        else:
            shown = _shown(listed) if name in ("int", "float", "wordcount") else listed
            result = function(*args[:first], shown, *others, **kwargs)
        return budget.charge(list(result) if isinstance(result, Iterator) else result)

    return metered


_STRING_METHODS = {"trim": "strip", "replace": "replace"}  # filters that are methods of a string


def _check_filter(budget: Budget, name: str, value: Any, given: list[Any]) -> None:
    """Check the result size of a filter, and charge its work."""
    size = budget.size_of(value)
    if name == "format":
        check_format(budget, value if isinstance(value, str) else "", given)
    elif name == "replace":
        sought = budget.size_of(given[0]) if given else 1
        check_product(budget, [size // max(1, sought) + 1, given[1] if len(given) > 1 else ""])
    elif name in _GROWING:
        check_product(budget, [value, *given])
    if name in _LISTING:
        check_items(value)
    if name in _BY_ATTRIBUTE and hasattr(value, "__len__"):
        names = sum(one.count(".") + one.count(",") for one in given if isinstance(one, str))
        budget.spend(4 * names * (1 + len(value)))
    if name in _STRIPS and isinstance(value, str):
        _charge_strip(budget, value, given)
    if name in _PER_CHARACTER:
        budget.spend(4 * size)
    if name == "sort":
        budget.spend(size)
    if name == "round" and any(isinstance(one, (int, float)) and abs(one) > MAX_DIGITS for one in given):
        raise TemplateLimitError(f"it rounds to more than {MAX_DIGITS} digits")
    if name == "sum" and any(not isinstance(one, (int, float, str, type(None))) for one in given):
        budget.spend(size * size // 64)  # every addition copies the lists


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MAX_DATE:
        raise TemplateLimitError(f"it uses a date format of more than {MAX_DATE} characters")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it; jinja2's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
