"""Checks that a client's values are plain JSON of bounded depth and size. Knows nothing of what they mean."""

import json
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, NoReturn

from .errors import TinyLLMError

MAX_DEPTH = 20  # nesting of lists and objects in the fields that a template receives
MAX_VALUES = 10_000  # elements of lists and fields of objects in one value; `content` has no such limit


class MessageError(TinyLLMError, ValueError):
    """A message, a tool or a variable of a template is not usable.

    field: where it is, such as "messages[2].role". unsupported: OpenAI may support it; this project does not.
    """

    def __init__(self, field: str, reason: str, *, unsupported: bool = False) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.unsupported = unsupported


def check_json(value: Any, field: str, max_depth: int = MAX_DEPTH) -> Any:
    """Return `value` if it is plain JSON with at most `MAX_VALUES` values and valid Unicode strings.

    field: where the value is, for messages. max_depth: the most levels; a string or a number has one level.
    Raises a `MessageError`, which locates a part that is not plain JSON.
    """
    count = 1
    for item, place, depth in _walk(value, field):
        check_value(item, place)
        count += len(item) if isinstance(item, (Mapping, list, tuple)) else 0
        if depth > max_depth:
            raise MessageError(field, f"is nested more than {max_depth} levels deep")
        if count > MAX_VALUES:
            raise MessageError(field, f"has more than {MAX_VALUES} values")
    return value


def check_value(value: Any, field: str) -> None:
    """Raise `MessageError` for a value that JSON cannot represent, or a string with a lone surrogate.

    The values inside of lists and objects are not checked.
    """
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            reason = f"not Unicode: a lone surrogate at character {error.start}"
            raise MessageError(field, reason) from None
    elif not isinstance(value, (Mapping, list, tuple, bool, int, float, type(None))):
        raise MessageError(field, f"must be plain JSON, not {kind_of(value)}")
    elif isinstance(value, float) and not isfinite(value):
        raise MessageError(field, f"must be a finite number, not {json.dumps(value)}")


def parse_object(text: str, field: str, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse the text of a JSON object; an empty text is an empty object.

    Raises `MessageError` for any other text, or for an object that `check_json` rejects. Too many values are
    counted before the text is parsed.
    """
    if not text.strip():
        return {}
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    if sum(map(outside.count, "{[,:")) > 2 * MAX_VALUES:
        raise MessageError(field, f"has more than {MAX_VALUES} values")
    try:
        value = json.loads(text, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise MessageError(field, f"must be the text of a JSON object: {reason}") from None
    if not isinstance(value, dict):
        raise MessageError(field, f"must be the text of a JSON object, not of a {kind_of(value)}")
    check_json(value, field, max_depth)
    return value


def size_of(value: Any) -> int:
    """The number of characters of all strings and keys in plain JSON, plus 8 for each other value.

    >>> size_of({"ab": ["c", 1, None]})  # 2 + 1 for the strings, and 8 for each of {}, [], 1 and None
    35
    """
    return sum(len(item) if isinstance(item, str) else 8 for item, _, _ in _walk(value, ""))


def kind_of(value: Any) -> str:
    """The type of a value for an error message: "null" for None, otherwise Python's name."""
    return "null" if value is None else type(value).__name__


def _walk(value: Any, field: str) -> Iterator[tuple[Any, str, int]]:
    """Every value nested in `value`, itself included, with its location and depth."""
    left = [(value, field, 1)]
    while left:
        item, place, depth = left.pop()
        yield item, place, depth
        if isinstance(item, Mapping):
            for key, one in item.items():
                left += [(key, place, depth + 1), (one, f"{place}.{str(key)[:40]}", depth + 1)]
        elif isinstance(item, (list, tuple)):
            left += [(one, f"{place}[{index}]", depth + 1) for index, one in enumerate(item)]


def reject_constant(constant: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity, which Python's `json` reads, but JSON does not have."""
    raise ValueError(f"{constant} is not JSON")
