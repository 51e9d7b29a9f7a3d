"""Text of a message in disguise: other characters in the place of those that could spell a control token.

A chat template puts messages and its own control tokens into one text. To tell afterwards which control
tokens are the template's, the messages go in disguised: what stands undisguised in the result is the
template's. One character stands for one, so lengths and positions are those of the text itself, and a
template that compares, splits or strips a text gets what it would get of the text itself. Knows nothing of
jinja2 or of tokenizers.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from .template_budget import ITEM, MOST_SIZE, expect

_STAND_INS = [*range(0xE000, 0xF900), *range(0xF0000, 0x110000)]  # characters for private use
MOST_PARTS = MOST_SIZE // ITEM


class Disguise:
    """How texts are disguised, and how they are shown again."""

    def __init__(self, control_tokens: Collection[str], texts: Iterable[str]) -> None:
        """texts: all that will be rendered; none of their characters is used to stand for another.

        A text can only take part in a control token with the token's first or last character, unless it is
        shorter than that: then all characters of the token count.
        """
        present = "".join(texts)
        free = (chr(code) for code in _STAND_INS if chr(code) not in present)
        ends = {token[place] for token in control_tokens for place in (0, -1)}
        others = sorted(set("".join(control_tokens)) - ends)
        self._stand_ins = {char: next(free) for char in [*sorted(ends), *others]}
        self.mark = next(free)  # a character that is in no text
        self._ends = sorted(ends)
        self._longest = max(map(len, control_tokens), default=0)
        self._used: set[str] = set()

    def hide(self, text: str) -> str:
        """The text in disguise."""
        chars = self._ends if len(text) > self._longest else self._stand_ins
        for char in chars:
            if char in text:
                self._used.add(char)
                text = text.replace(char, self._stand_ins[char])
        return text

    def show(self, text: str) -> str:
        """The text without its disguise."""
        for char in self._used:
            text = text.replace(self._stand_ins[char], char)
        return text

    def hide_all(self, value: Any) -> Any:
        """Plain JSON with every text in it disguised. Keys that are names stay: templates ask for them."""
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
        """What a method of `text` gives, as of the shown text; NotImplemented where disguise does not matter.

        A result that is a part of the text is disguised as the text is.
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
    """A part of `text`, of which characters at the ends are left out."""
    rest = getattr(shown, method)(*given)
    before = {"strip": "lstrip"}.get(method, method)
    start = 0 if method in ("rstrip", "removesuffix") else len(shown) - len(getattr(shown, before)(*given))
    return text[start : start + len(rest)]


def _split(text: str, shown: str, method: str, given: list[Any]) -> Any:
    """Parts of `text`, cut where the shown text is cut."""
    parts = getattr(shown, method)(*given)
    places = _lines(shown) if method == "splitlines" else _places(shown, parts, method, given)
    cut = [text[start : start + len(part)] for start, part in zip(places, parts, strict=False)]
    return tuple(cut) if isinstance(parts, tuple) else cut


def _lines(shown: str) -> Iterator[int]:
    start = 0
    for line in shown.splitlines(keepends=True):
        yield start
        start += len(line)


def _places(shown: str, parts: Iterable[str], method: str, given: list[Any]) -> Iterator[int]:
    """Where parts begin: behind each other, with a separator between those of `split`."""
    separator = given[0] if given and isinstance(given[0], str) and "split" in method else ""
    is_words = "split" in method and not separator
    start = 0
    for part in parts:
        start = shown.find(part, start) if is_words else start
        yield start
        start += len(part) + len(separator)


def expect_parts(text: str, method: str, given: list[Any]) -> None:
    """Refuse to split a text into too many parts."""
    if method == "splitlines":
        expect(ITEM * sum(map(text.count, "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")))
    elif given and isinstance(given[0], str) and given[0]:
        expect(ITEM * text.count(given[0]))
    elif len(text) > MOST_PARTS:
        expect(ITEM * len(text.split(None, MOST_PARTS)))
