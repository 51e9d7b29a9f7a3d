"""Follows one call of a tool, as JSON, in a text that arrives character by character."""

import json
from collections.abc import Collection

from .json_scanner import Expects, JsonScanner, NotJSONError

_KEYS = (Expects.KEY, Expects.KEY_OR_END)
_UNFINISHED = (Expects.STRING, Expects.NUMBER, Expects.WORD)
_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """One call: a JSON object with a "name", "arguments" (or "parameters") and other fields, in any order.

    The name is one of `names`. The arguments are an object; they may be missing. Neither may occur twice.
    name: the function's name, None until it has been read; if given, the JSON object is the arguments only.

    >>> call = CallScanner(["f"])
    >>> for char in '{"name": "f", "arguments": {"a":':
    ...     call.push(char)
    >>> call.name, call.take(), call.is_complete
    ('f', '{"a":', False)
    """

    def __init__(self, names: Collection[str], name: str | None = None) -> None:
        self.name = name
        self._names = names
        self._json = JsonScanner()
        self._arguments: list[str] | None = None
        self._key: str | None = None if name is None else "arguments"
        self._item: list[str] | None = None  # the key or value that is being read
        self._level = 1 if name is None else 0  # the depth at which the call's keys and values stand

    @property
    def is_complete(self) -> bool:
        """Whether the object has ended."""
        return self._json.expects is Expects.NOTHING

    @property
    def has_arguments(self) -> bool:
        """Whether the arguments have begun."""
        return self._arguments is not None

    def take(self) -> str:
        """Return the arguments' text since the last `take`, exactly as it was written."""
        taken, self._arguments = "".join(self._arguments or ()), []
        return taken

    def push(self, char: str) -> None:
        """Take the next character. Raises `NotJSONError` if the text cannot become a call as described."""
        before, depth = self._json.expects, self._json.depth
        self._json.push(char)
        if depth == 0 and self._level == 1:
            if before is Expects.VALUE and char not in " \t\n\r{":
                raise NotJSONError("not an object")
        elif self._item is not None:
            self._grow(char)
        elif depth == self._level and before in (*_KEYS, Expects.VALUE) and not char.isspace():
            self._start(char, before in _KEYS)
        if self.is_complete and self.name is None:
            raise NotJSONError("no name")

    def _start(self, char: str, is_key: bool) -> None:
        """Start a key or a value of the call."""
        if is_key:
            self._key = None
        elif self._key == "name" and (char != '"' or self.name is not None):
            raise NotJSONError("the name is not one string")
        elif self._key in _ARGUMENTS:
            if char != "{" or self._arguments is not None:
                raise NotJSONError("the arguments are not one object")
            self._arguments = []
        if char != "}":
            self._item = []
            self._grow(char)

    def _grow(self, char: str) -> None:
        """Add a character to the key or value; it may be the last one."""
        assert self._item is not None
        if self._key in _ARGUMENTS and self._arguments is not None:
            self._arguments.append(char)
        else:
            self._item.append(char)
        if self._json.depth <= self._level and self._json.expects not in _UNFINISHED:
            text, self._item = "".join(self._item), None
            if self._key is None:
                self._key = json.loads(text)
            elif self._key == "name":
                self._set_name(json.loads(text))

    def _set_name(self, name: str) -> None:
        if name not in self._names:
            raise NotJSONError(f"no function {name[:64]!r}")
        self.name = name
