"""Disguises message text in a prompt: replaces the characters that could spell a control token.

A chat template joins messages and its own control tokens into one text. To find out afterwards which control
tokens the template wrote, the messages are disguised before rendering: undisguised control tokens in the
result are the template's. Each character is replaced by one character, so lengths and positions stay the
same, and string operations of the template give the same results as on the original text. Knows nothing of
jinja2 or of tokenizers.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from .template_budget import ITEM_CHARS, MAX_SIZE, check_size

_STAND_INS = [*range(0xE000, 0xF900), *range(0xF0000, 0x110000)]  # Unicode's private-use characters
MAX_PARTS = MAX_SIZE // ITEM_CHARS


class Disguise:
    """A reversible replacement of characters in texts."""

    def __init__(self, control_tokens: Collection[str], texts: Iterable[str]) -> None:
        """texts: everything that will be rendered; characters that occur there are not used as stand-ins.

        If a text is longer than every control token, a token that overlaps it has its first or its last
        character in it. So in such a text only the first and last characters of tokens are replaced; in
        shorter texts all of their characters are.
        """
        present = "".join(texts)
        free = (chr(code) for code in _STAND_INS if chr(code) not in present)
        ends = {token[place] for token in control_tokens for place in (0, -1)}
        others = sorted(set("".join(control_tokens)) - ends)
        self._stand_ins = {char: next(free) for char in [*sorted(ends), *others]}
        self.mark = next(free)  # a character that occurs in no text
        self._ends = sorted(ends)
        self._longest = max(map(len, control_tokens), default=0)
        self._used: set[str] = set()

    def hide(self, text: str) -> str:
        """Disguise a text."""
        chars = self._ends if len(text) > self._longest else self._stand_ins
        for char in chars:
            if char in text:
                self._used.add(char)
                text = text.replace(char, self._stand_ins[char])
        return text

    def show(self, text: str) -> str:
        """Remove the disguise from a text."""
        for char in self._used:
            text = text.replace(self._stand_ins[char], char)
        return text

    def hide_all(self, value: Any) -> Any:
        """Disguise every string in plain JSON; keys that are identifiers stay, as templates look them up."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, (list, tuple)):
            return [self.hide_all(item) for item in value]
        if isinstance(value, dict):
            return {self._hide_key(key): self.hide_all(item) for key, item in value.items()}
        return value

    def _hide_key(self, key: Any) -> Any:
        return self.hide(key) if isinstance(key, str) and not key.isidentifier() else key

    def call(self, text: str, method: str, arguments: list[Any]) -> Any:
        """Call a method of `text` as if it had no disguise. NotImplemented if the disguise does not matter.

        If the result is a part of the text, it stays disguised.
        """
        shown = self.show(text)
        given = [self.show(one) if isinstance(one, str) else one for one in arguments]
        if method in _ANSWERS:
            return getattr(shown, method)(*given)
        if method in _STRIPS:
            return _stripped(text, shown, method, given)
        if method in _SPLITS:
            return _split(text, shown, method, given)
        if method == "replace" and arguments and given[0]:
            return arguments[1].join(_split(text, shown, "split", [given[0], *given[2:]]))
        return NotImplemented


_ANSWERS = {"startswith", "endswith", "find", "rfind", "index", "rindex", "count", "isspace", "isdigit"}
_ANSWERS |= {"isalpha", "isalnum", "isnumeric", "isdecimal", "isascii", "isupper", "islower", "istitle"}
_STRIPS = {"strip", "lstrip", "rstrip", "removeprefix", "removesuffix"}
_SPLITS = {"split", "rsplit", "splitlines", "partition", "rpartition"}


def _stripped(text: str, shown: str, method: str, given: list[Any]) -> str:
    """The part of `text` that the strip method leaves."""
    rest = getattr(shown, method)(*given)
    before = {"strip": "lstrip"}.get(method, method)
    start = 0 if method in ("rstrip", "removesuffix") else len(shown) - len(getattr(shown, before)(*given))
    return text[start : start + len(rest)]


def _split(text: str, shown: str, method: str, given: list[Any]) -> Any:
    """The parts of `text`, split at the positions where the shown text is split."""
    parts = getattr(shown, method)(*given)
    places = _line_starts(shown) if method == "splitlines" else _part_starts(shown, parts, method, given)
    cut = [text[start : start + len(part)] for start, part in zip(places, parts, strict=False)]
    return tuple(cut) if isinstance(parts, tuple) else cut


def _line_starts(shown: str) -> Iterator[int]:
    """The position of each line."""
    start = 0
    for line in shown.splitlines(keepends=True):
        yield start
        start += len(line)


def _part_starts(shown: str, parts: Iterable[str], method: str, given: list[Any]) -> Iterator[int]:
    """The position of each part. Parts are adjacent, except for the separator of `split`."""
    separator = given[0] if given and isinstance(given[0], str) and "split" in method else ""
    is_words = "split" in method and not separator
    start = 0
    for part in parts:
        start = shown.find(part, start) if is_words else start
        yield start
        start += len(part) + len(separator)


def check_parts(text: str, method: str, given: list[Any]) -> None:
    """Raise `TemplateLimitError` before a text is split into too many parts."""
    if method == "splitlines":
        check_size(ITEM_CHARS * sum(map(text.count, "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")))
    elif given and isinstance(given[0], str) and given[0]:
        check_size(ITEM_CHARS * text.count(given[0]))
    elif len(text) > MAX_PARTS:
        check_size(ITEM_CHARS * len(text.split(None, MAX_PARTS)))
