"""Metadata keys with a common prefix, such as `tokenizer.ggml.*`; each is type-checked when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any


@dataclass(frozen=True)
class GGUFKeys:
    """The keys of a GGUF file that start with `prefix` and a dot; `integer("a.b")` reads `prefix.a.b`.

    Methods raise a ValueError that names the key, its value and what was expected.
    """

    metadata: Mapping[str, Any]
    prefix: str

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer. A list of equal integers, one per layer, counts as that integer."""
        value = self._get(name, default)
        if isinstance(value, list) and value and all(type(v) is int and v == value[0] for v in value):
            value = value[0]
        if type(value) is not int:
            raise self._error(name, value, "one whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not isfinite(value):
            raise self._error(name, value, "one finite number")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._error(name, value, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id, or None if the key is missing."""
        value = self._get(name, None)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise self._error(name, value, f"0 to {vocab_size - 1}")
        return value

    def numbers(self, name: str) -> list[Any]:
        """A list of numbers."""
        return self._values(name, {int, float}, "numbers")

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        return self._values(name, {str}, "strings")

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return f"{self.prefix}.{name}" in self.metadata

    def value(self, name: str) -> Any:
        """The value, whatever its type; None if the key is missing."""
        return self._get(name, None)

    def _values(self, name: str, types: set[type], kinds: str) -> list[Any]:
        value = self._get(name, None)
        if value is None:
            raise ValueError(f"metadata {self.prefix}.{name} is missing, expected a list of {kinds}")
        if not isinstance(value, list) or not types.issuperset(map(type, value)):
            raise ValueError(
                f"metadata {self.prefix}.{name} is {str(value)[:60]!r}, expected a list of {kinds}"
            )
        return value

    def _get(self, name: str, default: Any) -> Any:
        """A value in plain Python types; the arrays of MLX's GGUF reader become numbers and lists."""
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        return value.tolist() if hasattr(value, "tolist") else value

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        key = f"{self.prefix}.{name}"
        if value is None:
            return ValueError(f"metadata {key} is missing, expected {expected}")
        return ValueError(f"{key} is {str(value)[:60]!r}, expected {expected}")
