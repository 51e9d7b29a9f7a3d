"""Prompt lookup: guess the next tokens of a text from what followed the same tokens earlier in it.

The prompt and the output are one text. Its last n tokens, an n-gram, may have occurred before; the guess is
that the same tokens follow again. This needs no second model, and is right where a text repeats itself:
edits, summaries with quotes, code. Sources: Saxena, "Prompt Lookup Decoding" (2023); vLLM's method "ngram".
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

MOST_MATCHED = 32  # tokens that are compared; a longer match tells nothing more


class Guess(NamedTuple):
    """The tokens that may come next, taken from an earlier place of the text.

    match: how many tokens before that place equal the last tokens of the text, at most `MOST_MATCHED`. It may
    exceed the size of the n-gram that was looked up.
    """

    tokens: list[int]
    match: int


NO_GUESS = Guess([], 0)


class PromptLookup:
    """An index of the n-grams of one growing text, and guesses of the tokens that come next.

    min_size, max_size: the sizes of the n-grams in tokens, at least 1.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        self._sizes = range(max_size, min_size - 1, -1)
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its latest place

    def __len__(self) -> int:
        """The number of tokens of the text so far."""
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text.

        For each of them: first index the n-grams at the end of the text, of all sizes, with the token's
        position; then append the token. So an n-gram is found only once a token follows it.

        >>> lookup = PromptLookup(1, 2)
        >>> lookup.extend([7, 8, 9])
        >>> len(lookup), lookup.guess(1)
        (3, Guess(tokens=[], match=0))
        """
        for token in tokens:
            for gram in self._last_grams():
                self._follows[gram] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, max_tokens: int) -> Guess:
        """Guess up to `max_tokens` tokens that come next; `NO_GUESS` if no n-gram at the end is indexed.

        Take the longest n-gram at the end of the text that has occurred before, at its latest earlier place;
        the guess is what followed there. If the text ends too early, the guess repeats from its first token.

        >>> lookup = PromptLookup(1, 2)
        >>> lookup.extend([1, 2, 3, 5, 2, 3, 1, 2, 3])  # 2 3 occurred twice before: 5 followed, then 1
        >>> lookup.guess(2)
        Guess(tokens=[1, 2], match=2)
        >>> lookup.extend([1])
        >>> lookup.guess(7)  # after 2 3 1, and at the end of the text from its start again
        Guess(tokens=[2, 3, 1, 2, 3, 1, 2], match=3)
        """
        for gram in self._last_grams():
            start = self._follows.get(gram)
            if start is not None:
                period = len(self._tokens) - start
                tokens = [self._tokens[start + i % period] for i in range(max_tokens)]
                return Guess(tokens, self._match_before(start))
        return NO_GUESS

    def _match_before(self, place: int) -> int:
        """Compare backwards from a position and from the end of the text; count equal tokens."""
        before = self._tokens[max(0, place - MOST_MATCHED) : place]
        pairs = zip(reversed(before), reversed(self._tokens), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _last_grams(self) -> Iterable[tuple[int, ...]]:
        """The n-grams at the end of the text, the longest first."""
        return (tuple(self._tokens[-size:]) for size in self._sizes if size <= len(self._tokens))
