"""Limits the work and the output size of one rendering of a chat template.

A step is about half a microsecond of work. An operation that may take long, or whose result may be large, is
charged or checked before it runs, because a single Python operation on a long string cannot be interrupted.
Knows nothing of jinja2's syntax.
"""

import re
from collections.abc import Collection, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

from jinja2.utils import Namespace

MAX_STEPS = 2_000_000  # per rendering; 1,000 long messages take about 100 thousand
ITEM_CHARS = 64  # a list's item counts as this many characters
MAX_SIZE = 10_000_000  # characters of a string, or of a list with all that it contains
MAX_WRITTEN = 5 * MAX_SIZE  # characters of all outputs together, those of macros and blocks included
MAX_BITS = 4096  # of an integer
MAX_DEPTH = 100  # nesting of lists: Python hashes and compares them recursively
_CHARS_PER_STEP = 64  # that are copied, compared or searched
_SHORT = 30_000  # in shorter strings Python's search may compare the pattern at every position
_VIEWS = (KeysView, ValuesView, ItemsView)
_NUMBER = re.compile(r"\d+")
# A field such as "{0:{1}{1}{1}}": its width consists of the digits of several arguments and may be huge.
_NESTED_FIELD = re.compile(r"\{[^{}]*\{(?!\{)")


class TemplateLimitError(Exception):
    """A template exceeds a limit of rendering; the message names it."""


class Budget:
    """Steps and output of one rendering so far, and the sizes of the containers that it has used."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self._steps = 0
        self._written = 0
        self._depth = 0
        self._measured: dict[int, tuple[object, int, int]] = {}  # keeps the objects, so ids stay unique

    def spend(self, steps: int = 1) -> None:
        """Count steps. Raises `TemplateLimitError` above the limit, as all methods do."""
        self._steps += steps
        if self._steps > self._max_steps:
            raise TemplateLimitError(f"it takes more than {self._max_steps} steps")

    def write(self, num_chars: int) -> None:
        """Count characters of output."""
        self._written += num_chars
        if self._written > MAX_WRITTEN:
            raise TemplateLimitError(f"it writes more than {MAX_WRITTEN} characters")

    def charge(self, value: Any) -> Any:
        """Spend the steps for making `value`; return it."""
        if isinstance(value, int):
            check_bits(value.bit_length())
        self.spend(1 + self.size_of(value) // _CHARS_PER_STEP)
        return value

    def charge_search(self, value: Any) -> Any:
        """Spend the steps for comparing or searching `value`; return it."""
        size = self.size_of(value)
        self.spend(1 + size // (8 if size < _SHORT else _CHARS_PER_STEP))
        return value

    def size_of(self, value: Any) -> int:
        """The size of `value` in characters, with all that it contains; checked against the limit."""
        if isinstance(value, (str, bytes)):
            size = len(value)
        elif isinstance(value, (list, tuple, dict, set, frozenset, Namespace, *_VIEWS)):
            size, _ = self._measure(value)
        elif isinstance(value, range):
            size = ITEM_CHARS * len(value)
        else:
            size = 1 + value.bit_length() // 3 if isinstance(value, int) else 1
        check_size(size)
        return size

    def _measure(self, value: Any) -> tuple[int, int]:
        """Size and depth of a container.

        Cached unless it is or contains a namespace or a view, because these may change.
        """
        known = self._measured.get(id(value))
        if known is not None:
            return known[1], known[2]
        parts = _parts(value)
        self.spend(1 + 4 * len(parts))
        check_size(ITEM_CHARS * len(parts))
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TemplateLimitError(f"it nests lists more than {MAX_DEPTH} levels deep")
        size, depth, changes = 1 + ITEM_CHARS * len(parts), 1, isinstance(value, (Namespace, *_VIEWS))
        for part in parts:
            size += self.size_of(part)
            check_size(size)
            if _is_container(part):
                inside = self._measured.get(id(part))
                changes = changes or inside is None
                depth = max(depth, 1 + (inside[2] if inside else 1))
        self._depth -= 1
        if depth > MAX_DEPTH:
            raise TemplateLimitError(f"it nests lists more than {MAX_DEPTH} levels deep")
        if not changes:
            self._measured[id(value)] = (value, size, depth)
        return size, depth


def check_size(size: int) -> None:
    """Raise `TemplateLimitError` if a value of about this size is too large. So do the other checks."""
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE} characters")


def check_bits(bits: int) -> None:
    """Check the size of an integer."""
    if bits > MAX_BITS:
        raise TemplateLimitError(f"it computes a number of more than {MAX_BITS} bits")


def check_power(base: Any, exponent: Any) -> None:
    """Check the size of `base ** exponent`."""
    if isinstance(base, int) and isinstance(exponent, int):
        check_bits(abs(exponent) * max(1, abs(base)).bit_length())


def check_product(budget: Budget, arguments: Iterable[Any]) -> None:
    """Check a call whose result may be as large as the product of its arguments, such as `"ab" * 1000`.

    An argument that is a number counts as that number, any other as its size: here 2 * 1000.
    """
    product = 1
    for argument in arguments:
        product *= max(1, _number(argument) or budget.size_of(argument))
        check_size(product)


def check_format(budget: Budget, text: str, arguments: Collection[Any]) -> None:
    """Check a format call, as if every field had the largest width that its arguments could give.

    A width may be in the format string, or be an argument: a number, or a string that contains one. A field
    within a field is rejected.
    """
    widest = max(map(budget.size_of, arguments), default=1)
    for source in (text, *arguments):
        widest = max(widest, _widest(source))
    fields = text.count("%") + text.count("{")
    check_size(len(text) + fields * (widest + 1))
    if _NESTED_FIELD.search(text):
        raise TemplateLimitError("it nests a field in a field of a format string, as in {0:{1}}")


def check_items(text: Any) -> Any:
    """Check a string before a list of its characters is made; return it."""
    if isinstance(text, (str, bytes)):
        check_size(ITEM_CHARS * len(text))
    return text


def _widest(source: Any) -> int:
    """The largest number that `source` is or, for a string, contains."""
    if not isinstance(source, str):
        return _number(source)
    digits = _NUMBER.findall(source[:MAX_BITS]) if len(source) <= MAX_BITS else [str(MAX_SIZE)]
    return max((int(one[:9]) * (1 if len(one) <= 9 else MAX_SIZE) for one in digits), default=0)


def _number(value: Any) -> int:
    """The absolute value of a number, up to just above `MAX_SIZE`; 0 for other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0
    return abs(int(value)) if abs(value) <= MAX_SIZE else MAX_SIZE + 1


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set, frozenset, Namespace, *_VIEWS))


def _parts(value: Any) -> list[Any]:
    """The contents of a container: a mapping's keys and values, a namespace's attributes."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    check_size(ITEM_CHARS * len(value))
    return [*value, *value.values()] if isinstance(value, dict) else list(value)
