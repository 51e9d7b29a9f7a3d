"""A grammar: which tokens can continue a text of the required form.

A `Grammar` belongs to one sequence and is used by one thread. `GrammarCompiler.compile` makes grammars.
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
    """One sequence's place in a grammar: the tokens accepted so far, and those that may come next.

    matcher: the parser of the library llguidance, at the same place. Used are `consume_token(token)` and
    `rollback(num_tokens)`, which return whether it worked; `validate_tokens(tokens)`, how many of them, from
    the first, could be consumed; `compute_bitmask()`, bytes in which bit t % 8 of byte t // 8 is 1 if token t
    may come next; `is_stopped()`, whether nothing but an end-of-sequence token can follow; `deep_copy()`; and
    `is_error()` and `get_error()`, the reason why it cannot continue. vocab_size: V of the masks; the
    library's may be smaller or larger.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._masks: dict[tuple[int, ...], TokenMask] = {}  # by the tokens after the accepted ones

    def allowed(self, ahead: Seq[int] = ()) -> TokenMask:
        """Return the mask of the tokens that may come next: an end-of-sequence token if the text is complete.

        ahead: return the mask after these tokens instead, each of which must be allowed; the grammar stays
        where it is. Masks are cached until the grammar moves; `accept` keeps those of places still ahead.
        Raises `GrammarError` if no token may come next, or if the grammar is too complex at this place.
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
        """Return how many tokens of a draft, from the first, should be computed as guesses.

        Count up to the first token that is not allowed or that completes the text, and not that token itself:
        a guess gets a row to draw the token after it, and there is none. The grammar stays where it is, with
        its cached masks.
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
        """Take back the last `num_tokens` accepted tokens. Raises `GrammarError` if there are fewer."""
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
        """The mask of the tokens that may come next."""
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
    """The library's mask as words of a `TokenMask`: tokens that it lacks are not allowed."""
    size = 4 * num_words(vocab_size)
    words = array("I", mask[:size].ljust(size, b"\0"))
    words[-1] &= (1 << (vocab_size - 1) % 32 + 1) - 1
    return words
