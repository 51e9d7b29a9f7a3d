"""A stop string, looked for while a text grows: each character costs the same, however long either is."""

from collections.abc import Iterable, Sequence

Item = str | int  # a character of a text, or a control token where it is produced


class StopString:
    """How much of a string a growing text ends with. Source: Knuth, Morris and Pratt (1977).

    text: the string; not empty; control tokens in it are ids. matched: length of the longest beginning of it
    that the text ends with, the whole string left out: text that may turn out to be a part of it.
    """

    def __init__(self, text: Sequence[Item]) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0]  # [i]: of text[:i + 1], the longest proper beginning that it also ends with

    def push(self, piece: Iterable[Item]) -> int | None:
        """The text has grown by `piece`: after how much of that the string is there first, if it is."""
        found = None
        for end, character in enumerate(piece, start=1):
            self.matched = self._grown(self.matched, character)
            if self.matched > len(self._borders):
                self._borders.append(self._grown(self._borders[-1], character))
            if self.matched == len(self.text):
                self.matched = self._borders[-1]
                found = found or end
        return found

    def _grown(self, matched: int, character: Item) -> int:
        """What of the string is matched, where so much was before a character came."""
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)
