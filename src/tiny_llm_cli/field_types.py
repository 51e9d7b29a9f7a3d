"""Checks values from a file against the types of a dataclass's fields."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tiny_llm_checkpoints.errors import ConfigError, shown

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for the first value that does not have its field's type; it names both.

    A list stands for a tuple, and a whole number is a number.

    >>> from tiny_llm_cluster.config import ClusterConfig
    >>> check_types(ClusterConfig, {"grace": 5, "threads": None})
    """
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _has_type(value, hints[name]):
            raise ConfigError(f"{name} must be {_wanted(hints[name])}, not {shown(value)}")


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list) and all(_has_type(one, arguments[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """The type in words: `a whole number or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_wanted, arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return "a list of texts"
    if origin is Mapping:
        return "a mapping"
    return _WORDS[hint]
