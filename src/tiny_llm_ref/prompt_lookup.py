"""Prompt lookup: guess the next tokens of a text from what followed the same tokens earlier in it.

The prompt and the output are one text. Its last n tokens, an n-gram, may have occurred before; then the
tokens that followed them there are the draft. This costs no model, and is right where a text repeats itself:
edits, summaries with quotes, code. Sources: Saxena, "Prompt Lookup Decoding" (2023); vLLM's method "ngram".
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

MOST_MATCHED = 32  # tokens that are compared; a longer match tells nothing more


class Guess(NamedTuple):
    """The tokens that may come next, and how many tokens before them match the end of the text."""

    tokens: list[int]
    match: int


NO_GUESS = Guess([], 0)


class PromptLookup:
    """An index of the n-grams of one growing text, and the drafts that it gives.

    least, most: the sizes of the n-grams, from 1 up. Longer ones are tried first, because what followed a
    long one is more likely to follow again.
    """

    def __init__(self, least: int, most: int) -> None:
        self._sizes = range(most, least - 1, -1)
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # where the text continues after an n-gram, at last

    def __len__(self) -> int:
        """The number of tokens of the text so far."""
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text. The n-grams that end the text are indexed with the token after them.

        >>> lookup = PromptLookup(1, 2)
        >>> lookup.extend([7, 8, 9])
        >>> len(lookup)
        3
        """
        for token in tokens:
            for gram in self._last_grams():
                self._follows[gram] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, most: int) -> Guess:
        """Guess up to `most` tokens that come next; none if no n-gram at the end has occurred before.

        They are the tokens after the latest earlier place of the longest n-gram that was found. If the text
        ends before there are `most` of them, the guess continues with its own tokens: after "a b a b a" the
        guess of 4 is "b a b a".

        >>> lookup = PromptLookup(2, 3)
        >>> lookup.extend([1, 2, 3, 4, 5, 1, 2])
        >>> lookup.guess(3), lookup.guess(6).tokens
        (Guess(tokens=[3, 4, 5], match=2), [3, 4, 5, 1, 2, 3])
        >>> lookup.extend([9])
        >>> lookup.guess(3)
        Guess(tokens=[], match=0)
        """
        for gram in self._last_grams():
            start = self._follows.get(gram)
            if start is not None:
                period = len(self._tokens) - start
                tokens = [self._tokens[start + i % period] for i in range(most)]
                return Guess(tokens, self._match_before(start))
        return NO_GUESS

    def _match_before(self, place: int) -> int:
        """Count the tokens before a place that equal the last ones of the text, up to `MOST_MATCHED`."""
        before = self._tokens[max(0, place - MOST_MATCHED) : place]
        pairs = zip(reversed(before), reversed(self._tokens), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _last_grams(self) -> Iterable[tuple[int, ...]]:
        """The n-grams at the end of the text, the longest first."""
        return (tuple(self._tokens[-size:]) for size in self._sizes if size <= len(self._tokens))
