"""A grammar: which tokens can continue a text of the required form.

A `Grammar` belongs to one sequence, and one thread uses it. The library llguidance parses; `grammar_compiler`
makes grammars.
"""

import re
from array import array
from typing import TYPE_CHECKING

from .errors import GrammarError
from .token_mask import TokenMask, num_words

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONGEST_REASON = 300  # characters of the library's reason in an error


class Grammar:
    """One sequence's place in a grammar: the tokens accepted so far, and those that may come next."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._allowed: TokenMask | None = None

    def allowed(self) -> TokenMask:
        """Return the tokens that may come next; end-of-sequence tokens among them if the text is complete.

        Depends only on the accepted tokens. Raises `GrammarError` if no token may come next, or if the
        grammar is too complex at this place.
        """
        if self._allowed is None:
            words = self._matcher.compute_bitmask()
            self._check("the grammar cannot continue")
            mask = TokenMask(_fitted(words, self._vocab_size))
            if not mask:
                raise GrammarError("the grammar allows only text for which the model has no token")
            self._allowed = mask
        return self._allowed

    def accept(self, token: int) -> None:
        """Move past a token. Raises `GrammarError` if it is not allowed; the grammar is then unusable."""
        self._allowed = None
        if not self._matcher.consume_token(token):
            self._check(f"token {token} is not possible")

    def rollback(self, num_tokens: int) -> None:
        """Move back by the last `num_tokens` accepted tokens. Raises `GrammarError` if there are fewer."""
        self._allowed = None
        if not self._matcher.rollback(num_tokens):
            self._check(f"cannot go back {num_tokens} tokens")

    def fork(self) -> "Grammar":
        """Return an independent copy at the same place."""
        copy = Grammar(self._matcher.deep_copy(), self._vocab_size)
        copy._allowed = self._allowed
        return copy

    @property
    def has_ended(self) -> bool:
        """True if the text is complete and only an end-of-sequence token may come next."""
        return self._matcher.is_stopped()

    def _check(self, problem: str) -> None:
        """Raise `GrammarError` if the library reports an error."""
        if self._matcher.is_error():
            raise GrammarError(f"{problem}: {reworded(self._matcher.get_error())}")


def reworded(reason: str) -> str:
    """The library's reason for an error, in one line of at most 300 characters and in our words."""
    reason = " ".join(reason.replace("<non-verbose/>", "").split("while processing")[0].split())
    if keywords := re.fullmatch(r"Unimplemented keys: \[(.*)\]", reason):
        return f"{keywords[1]} is not supported"
    if reason == "NoExtensionBias":
        return "no text satisfies it"
    if reason.startswith("oneOf"):  # the library would have its caller ignore the difference
        return "oneOf needs alternatives that exclude each other, such as by a constant: use anyOf"
    return reason[:LONGEST_REASON]


def _fitted(mask: bytes, vocab_size: int) -> "array[int]":
    """The library's mask as words for a vocabulary of another size."""
    size = 4 * num_words(vocab_size)
    words = array("I", mask[:size].ljust(size, b"\0"))
    words[-1] &= (1 << (vocab_size - 1) % 32 + 1) - 1
    return words
