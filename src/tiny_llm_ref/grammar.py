"""A grammar: which tokens can continue a text of the required form.

A `Grammar` belongs to one sequence, and one thread uses it. The library llguidance parses; `grammar_compiler`
makes grammars.
"""

from array import array
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from .errors import GrammarError
from .grammar_reasons import reworded
from .token_mask import TokenMask, num_words

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammar:
    """One sequence's place in a grammar: the tokens accepted so far, and those that may come next."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._masks: dict[tuple[int, ...], TokenMask] = {}  # by the tokens after the accepted ones

    def allowed(self, ahead: Seq[int] = ()) -> TokenMask:
        """Return the tokens that may come next; end-of-sequence tokens among them if the text is complete.

        ahead: tokens, each of them allowed, after which the mask is asked for; the grammar stays where it is.
        The mask depends only on the accepted tokens and these. Raises `GrammarError` if no token may come
        next, or if the grammar is too complex at this place.
        """
        key = tuple(ahead)
        if key not in self._masks:
            masks = self._masks
            for token in key:
                self.accept(token)
            mask = self._computed()
            self.rollback(len(key))
            self._masks = {**masks, key: mask}
        return self._masks[key]

    def num_drafted(self, draft: Seq[int]) -> int:
        """Return how many tokens of a draft, from the first, may be computed as guesses.

        The draft must end before the first token that is not allowed, and before one that completes the text:
        nothing is drawn after those. The grammar stays where it is.
        """
        masks, possible = self._masks, self._matcher.validate_tokens([*draft])
        num_accepted = num_drafted = 0
        for token in draft[:possible]:
            self.accept(token)
            num_accepted += 1
            if self.has_ended:
                break
            num_drafted += 1
        self.rollback(num_accepted)
        self._masks = masks
        return num_drafted

    def accept(self, token: int) -> None:
        """Move past a token. Raises `GrammarError` if it is not allowed; the grammar is then unusable."""
        self._masks = {key[1:]: mask for key, mask in self._masks.items() if key[:1] == (token,)}
        if not self._matcher.consume_token(token):
            self._check(f"token {token} is not possible")

    def rollback(self, num_tokens: int) -> None:
        """Move back by the last `num_tokens` accepted tokens. Raises `GrammarError` if there are fewer."""
        if num_tokens:
            self._masks = {}
            if not self._matcher.rollback(num_tokens):
                self._check(f"cannot go back {num_tokens} tokens")

    def fork(self) -> "Grammar":
        """Return an independent copy at the same place."""
        copy = Grammar(self._matcher.deep_copy(), self._vocab_size)
        copy._masks = dict(self._masks)
        return copy

    @property
    def has_ended(self) -> bool:
        """True if the text is complete and only an end-of-sequence token may come next."""
        return self._matcher.is_stopped()

    def _computed(self) -> TokenMask:
        """The tokens that may come next."""
        words = self._matcher.compute_bitmask()
        self._check("the grammar cannot continue")
        mask = TokenMask(_fitted(words, self._vocab_size))
        if not mask:
            raise GrammarError("the grammar allows only text for which the model has no token")
        return mask

    def _check(self, problem: str) -> None:
        """Raise `GrammarError` if the library reports an error."""
        if self._matcher.is_error():
            raise GrammarError(f"{problem}: {reworded(self._matcher.get_error())}")


def _fitted(mask: bytes, vocab_size: int) -> "array[int]":
    """The library's mask as words for a vocabulary of another size."""
    size = 4 * num_words(vocab_size)
    words = array("I", mask[:size].ljust(size, b"\0"))
    words[-1] &= (1 << (vocab_size - 1) % 32 + 1) - 1
    return words
