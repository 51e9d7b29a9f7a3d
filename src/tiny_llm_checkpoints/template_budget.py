"""What one rendering of a chat template may spend: steps, and the size of what it makes.

A step is about half a microsecond of work. Whatever takes time or memory pays here before it runs, because
one operation of Python on a long text cannot be interrupted. Knows nothing of jinja2's syntax.
"""

import re
from collections.abc import Collection, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

from jinja2.utils import Namespace

MOST_STEPS = 2_000_000  # of a rendering; 1,000 long messages take about 100 thousand
ITEM = 64  # characters that an item of a list counts for
MOST_SIZE = 10_000_000  # characters of a text, or of all that is in a list
MOST_WRITTEN = 5 * MOST_SIZE  # characters of all outputs together, those of macros and blocks included
MOST_BITS = 4096  # of a number
MOST_DEPTH = 100  # lists within lists: Python hashes and compares them recursively
_CHARS = 64  # characters that a step copies, compares or searches
_SHORT = 30_000  # in a shorter text Python may search for each character again
_VIEWS = (KeysView, ValuesView, ItemsView)
_NUMBER = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{(?!\{)")  # whose digits others can lengthen: "{0:{1}{1}{1}}"


class TemplateLimitError(Exception):
    """A template does more than a rendering may; the message says what."""


class Budget:
    """What one rendering has spent, and how large the containers are that it has seen."""

    def __init__(self, most_steps: int = MOST_STEPS) -> None:
        self._most_steps = most_steps
        self._steps = 0
        self._written = 0
        self._depth = 0
        self._measured: dict[int, tuple[object, int, int]] = {}  # holds the objects, so that ids stay unique

    def spend(self, steps: int = 1) -> None:
        """Count steps; refuse when there have been too many."""
        self._steps += steps
        if self._steps > self._most_steps:
            raise TemplateLimitError(f"it takes more than {self._most_steps} steps")

    def write(self, num_chars: int) -> None:
        """Count characters of output; refuse when there have been too many."""
        self._written += num_chars
        if self._written > MOST_WRITTEN:
            raise TemplateLimitError(f"it writes more than {MOST_WRITTEN} characters")

    def bounded(self, value: Any) -> Any:
        """`value`, paid for by its size, unless it is too large."""
        if isinstance(value, int):
            expect_bits(value.bit_length())
        self.spend(1 + self.size_of(value) // _CHARS)
        return value

    def searched(self, value: Any) -> Any:
        """`value`, paid for as something that is compared or searched."""
        size = self.size_of(value)
        self.spend(1 + size // (8 if size < _SHORT else _CHARS))
        return value

    def size_of(self, value: Any) -> int:
        """Characters and items in a value, written out in full; refused where there are too many."""
        if isinstance(value, (str, bytes)):
            size = len(value)
        elif isinstance(value, (list, tuple, dict, set, frozenset, Namespace, *_VIEWS)):
            size, _ = self._measure(value)
        elif isinstance(value, range):
            size = ITEM * len(value)
        else:
            size = 1 + value.bit_length() // 3 if isinstance(value, int) else 1
        expect(size)
        return size

    def _measure(self, value: Any) -> tuple[int, int]:
        """Size and depth of a container. Those that can change, or are made anew each time, are not kept."""
        known = self._measured.get(id(value))
        if known is not None:
            return known[1], known[2]
        parts = _parts(value)
        self.spend(1 + 4 * len(parts))
        expect(ITEM * len(parts))
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise TemplateLimitError(f"it puts more than {MOST_DEPTH} lists into each other")
        size, depth, changes = 1 + ITEM * len(parts), 1, isinstance(value, (Namespace, *_VIEWS))
        for part in parts:
            size += self.size_of(part)
            expect(size)
            if _is_container(part):
                inside = self._measured.get(id(part))
                changes = changes or inside is None
                depth = max(depth, 1 + (inside[2] if inside else 1))
        self._depth -= 1
        if depth > MOST_DEPTH:
            raise TemplateLimitError(f"it puts more than {MOST_DEPTH} lists into each other")
        if not changes:
            self._measured[id(value)] = (value, size, depth)
        return size, depth


def expect(size: int) -> None:
    """Refuse before something of about that size is made."""
    if size > MOST_SIZE:
        raise TemplateLimitError(f"it makes something of more than {MOST_SIZE} characters")


def expect_bits(bits: int) -> None:
    """Refuse a number of so many bits if that is too many."""
    if bits > MOST_BITS:
        raise TemplateLimitError(f"it computes a number of more than {MOST_BITS} bits")


def expect_power(base: Any, exponent: Any) -> None:
    """Refuse `base ** exponent` where it would be too large a number."""
    if isinstance(base, int) and isinstance(exponent, int):
        expect_bits(abs(exponent) * max(1, abs(base)).bit_length())


def expect_product(budget: Budget, arguments: Iterable[Any]) -> None:
    """Refuse a call whose result may be as large as its arguments' sizes, or numbers, multiplied."""
    product = 1
    for argument in arguments:
        product *= max(1, _number(argument) or budget.size_of(argument))
        expect(product)


def expect_format(budget: Budget, text: str, arguments: Collection[Any]) -> None:
    """Refuse a format whose fields could be too wide: each as wide as the widest that anything here says.

    A width can stand in the format, in a number, or in a text that is a part of the format.
    """
    widest = max(map(budget.size_of, arguments), default=1)
    for source in (text, *arguments):
        widest = max(widest, _widest(source))
    fields = text.count("%") + text.count("{")
    expect(len(text) + fields * (widest + 1))
    if _NESTED_FIELD.search(text):
        raise TemplateLimitError("it takes a part of a format from an argument")


def expect_items(text: Any) -> Any:
    """Refuse to make a list of a text's characters where it would be too long; return the text."""
    if isinstance(text, (str, bytes)):
        expect(ITEM * len(text))
    return text


def _widest(source: Any) -> int:
    """The largest number that a value is, or that a text spells."""
    if not isinstance(source, str):
        return _number(source)
    digits = _NUMBER.findall(source[:MOST_BITS]) if len(source) <= MOST_BITS else [str(MOST_SIZE)]
    return max((int(one[:9]) * (1 if len(one) <= 9 else MOST_SIZE) for one in digits), default=0)


def _number(value: Any) -> int:
    """The size of a number; 0 of what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0
    return abs(int(value)) if abs(value) <= MOST_SIZE else MOST_SIZE + 1


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set, frozenset, Namespace, *_VIEWS))


def _parts(value: Any) -> list[Any]:
    """What is in a container: keys and values of a mapping, attributes of a namespace."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    expect(ITEM * len(value))
    return [*value, *value.values()] if isinstance(value, dict) else list(value)
