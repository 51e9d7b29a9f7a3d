"""Metadata keys that belong together, such as `tokenizer.ggml.*`, each checked when it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any


@dataclass(frozen=True)
class GGUFKeys:
    """The keys of a GGUF file that begin with `prefix` and a dot; `integer("a.b")` reads `prefix.a.b`.

    Every method raises ValueError naming the key, what the file has and what was expected.
    """

    metadata: Mapping[str, Any]
    prefix: str

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; a list of equal ones, one for each layer, is that number."""
        value = self._get(name, default)
        if isinstance(value, list) and value and all(type(v) is int and v == value[0] for v in value):
            value = value[0]
        if type(value) is not int:
            raise self._refusal(name, value, "one whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not isfinite(value):
            raise self._refusal(name, value, "one finite number")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._refusal(name, value, "a text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._refusal(name, value, "true or false")
        return value

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id, or None where the file has no such key."""
        value = self._get(name, None)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise self._refusal(name, value, f"0 to {vocab_size - 1}")
        return value

    def numbers(self, name: str) -> list[Any]:
        """A list of numbers."""
        return self._values(name, {int, float}, "numbers")

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        return self._values(name, {str}, "texts")

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return f"{self.prefix}.{name}" in self.metadata

    def value(self, name: str) -> Any:
        """Whatever the file has under the key; None for nothing."""
        return self._get(name, None)

    def _values(self, name: str, types: set[type], kinds: str) -> list[Any]:
        value = self._get(name, None)
        if value is None:
            raise ValueError(f"the file holds no {self.prefix}.{name}")
        if not isinstance(value, list) or not types.issuperset(map(type, value)):
            raise ValueError(f"{self.prefix}.{name} is not a list of {kinds}")
        return value

    def _get(self, name: str, default: Any) -> Any:
        """A value as plain Python: what MLX's reader gives as arrays becomes numbers and lists."""
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        return value.tolist() if hasattr(value, "tolist") else value

    def _refusal(self, name: str, value: Any, expected: str) -> ValueError:
        key = f"{self.prefix}.{name}"
        if value is None:
            return ValueError(f"metadata {key} is missing")
        return ValueError(f"{key} is {str(value)[:60]!r}, expected {expected}")
