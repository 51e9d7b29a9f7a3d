"""Find a stop string in a growing text, in constant time per character, amortized."""

from collections.abc import Iterable, Sequence

Item = str | int  # a character of the text, or the id of a control token


class StopString:
    """Matches a growing text against a string. Source: Knuth, Morris and Pratt (1977).

    text: the string, not empty; control tokens in it are ids. matched: the length of the longest proper
    prefix of the string that the text ends with; these characters may turn out to be part of the string.
    """

    def __init__(self, text: Sequence[Item]) -> None:
        self.text = text
        self.matched = 0
        # borders[i]: length of the longest proper prefix of text[:i + 1] that is also its suffix.
        self._borders = [0]

    def push(self, piece: Iterable[Item]) -> int | None:
        """Add `piece` to the text; return None if no match ends in it.

        Otherwise return the number of the piece's items up to the end of the first match.
        """
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
        """The matched length after one more item, from the length before it."""
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)
