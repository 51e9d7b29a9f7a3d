"""Follows a JSON value in a text that arrives character by character. Does not know what the value means."""

import re
from enum import Enum

MAX_DEPTH = 100  # nesting of lists and objects
_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_NUMBER_CHARS = frozenset("0123456789+-.eE")
_WORDS = ("true", "false", "null")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")


class NotJSONError(ValueError):
    """The text cannot become a JSON value, or not the one that is expected."""


class Expects(Enum):
    """What may come next. The last three: within a string, which may be a key, a number or a word."""

    VALUE = "a value"
    VALUE_OR_END = "a value, or the end of the list"
    KEY = "a key"
    KEY_OR_END = "a key, or the end of the object"
    COLON = "a colon"
    COMMA = "a comma, or the end of the list or object"
    NOTHING = "nothing: the value is complete"
    STRING = "more of a string"
    NUMBER = "more of a number"
    WORD = "more of true, false or null"


class JsonScanner:
    """Follows one JSON value (RFC 8259) of at most `MAX_DEPTH` levels. expects: what may come next.

    White space may stand before and after the value. A number has ended when a character follows it that is
    no part of a number; only then a malformed one is an error. Other errors are raised at once.

    >>> scanner = JsonScanner()
    >>> for char in '{"a": [1':
    ...     scanner.push(char)
    >>> scanner.expects.name, scanner.depth
    ('NUMBER', 2)
    """

    def __init__(self) -> None:
        self.expects = Expects.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._escape = ""  # an unfinished escape sequence of a string
        self._word: list[str] = []  # an unfinished number or word

    @property
    def depth(self) -> int:
        """The number of lists and objects that have begun and not ended."""
        return len(self._open)

    def push(self, char: str) -> None:
        """Take the next character. Raises `NotJSONError` if the text cannot become a JSON value with it."""
        if self.expects is Expects.STRING:
            self._push_string(char)
        elif self.expects is Expects.NUMBER:
            self._push_number(char)
        elif self.expects is Expects.WORD:
            self._push_word(char)
        elif char not in _SPACE:
            self._push_sign(char)

    def _push_sign(self, char: str) -> None:
        """Take a character that is not within a string, a number or a word."""
        expects = self.expects
        if expects is Expects.COLON and char == ":":
            self.expects = Expects.VALUE
        elif expects in (Expects.KEY, Expects.KEY_OR_END) and char == '"':
            self.expects, self._is_key = Expects.STRING, True
        elif char in "]}" and self._may_close(char):
            self._open.pop()
            self._end_value()
        elif expects is Expects.COMMA and char == ",":
            self.expects = Expects.KEY if self._open[-1] == "{" else Expects.VALUE
        elif expects in (Expects.VALUE, Expects.VALUE_OR_END):
            self._start(char)
        else:
            raise NotJSONError(f"{char!r} instead of {expects.value}")

    def _start(self, char: str) -> None:
        """Start a value."""
        if char in "[{":
            if len(self._open) == MAX_DEPTH:
                raise NotJSONError(f"nested more than {MAX_DEPTH} levels deep")
            self._open.append(char)
            self.expects = Expects.KEY_OR_END if char == "{" else Expects.VALUE_OR_END
        elif char == '"':
            self.expects, self._is_key = Expects.STRING, False
        elif char in "-0123456789":
            self.expects, self._word = Expects.NUMBER, [char]
        elif char in "tfn":
            self.expects, self._word = Expects.WORD, [char]
        else:
            raise NotJSONError(f"{char!r} instead of a value")

    def _push_string(self, char: str) -> None:
        if self._escape:
            self._push_escape(char)
        elif char == "\\":
            self._escape = char
        elif char == '"':
            if self._is_key:
                self.expects = Expects.COLON
            else:
                self._end_value()
        elif char < " ":
            raise NotJSONError(f"{char!r} in a string")

    def _push_escape(self, char: str) -> None:
        """Take a character after a backslash: one of a few letters, or u and four hexadecimal digits."""
        if self._escape == "\\":
            if char not in _ESCAPES and char != "u":
                raise NotJSONError(f"the escape \\{char}")
            self._escape = "\\u" if char == "u" else ""
        elif char not in _HEX:
            raise NotJSONError(f"{char!r} instead of a hexadecimal digit")
        else:
            self._escape = self._escape + char if len(self._escape) < 5 else ""

    def _push_number(self, char: str) -> None:
        if char in _NUMBER_CHARS:
            self._word.append(char)
            return
        if not _NUMBER.fullmatch("".join(self._word)):
            raise NotJSONError("a malformed number")
        self._end_value()
        if char not in _SPACE:
            self._push_sign(char)

    def _push_word(self, char: str) -> None:
        self._word.append(char)
        word = "".join(self._word)
        if word in _WORDS:
            self._end_value()
        elif not any(one.startswith(word) for one in _WORDS):
            raise NotJSONError(f"{word[:10]!r} instead of a value")

    def _may_close(self, char: str) -> bool:
        """Whether this character may end the innermost list or object."""
        first, after = ("{", Expects.KEY_OR_END) if char == "}" else ("[", Expects.VALUE_OR_END)
        return self._open[-1:] == [first] and self.expects in (Expects.COMMA, after)

    def _end_value(self) -> None:
        self.expects = Expects.COMMA if self._open else Expects.NOTHING
