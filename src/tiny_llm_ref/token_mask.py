"""Token masks: one bit for each token of a vocabulary, 1 if the token may come next."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import mlx.core as mx

BITS = 32  # in a word


class TokenMask:
    """The allowed tokens of a vocabulary: token t is allowed if bit t % 32 of word t // 32 is 1.

    words: ceil(V / 32) unsigned numbers of 32 bits, type code "I". Bit 0 has the value 1; the bits after the
    last token are 0. Tokens are ids from 0 to V - 1, which is not checked.
    """

    def __init__(self, words: "array[int]") -> None:
        self.words = words

    @classmethod
    def of(cls, tokens: Iterable[int], vocab_size: int) -> "TokenMask":
        """Return the mask that allows only these tokens.

        >>> list(TokenMask.of([0, 33], vocab_size=40).words)
        [1, 2]
        """
        words = array("I", bytes(4 * num_words(vocab_size)))
        for token in tokens:
            words[token // BITS] |= 1 << token % BITS
        return cls(words)

    def __contains__(self, token: int) -> bool:
        """Whether a token is allowed.

        >>> 33 in TokenMask.of([33], vocab_size=40), 1 in TokenMask.of([33], vocab_size=40)
        (True, False)
        """
        return bool(self.words[token // BITS] >> token % BITS & 1)

    def __bool__(self) -> bool:
        """Whether any token is allowed."""
        return any(self.words)

    def without(self, tokens: Iterable[int]) -> "TokenMask":
        """Return a copy that does not allow these tokens; they need not be allowed now.

        >>> list(TokenMask.of([0, 33], vocab_size=40).without([0, 1]).words)
        [0, 2]
        """
        words = self.words[:]
        for token in tokens:
            words[token // BITS] &= ~(1 << token % BITS)
        return TokenMask(words)


def num_words(vocab_size: int) -> int:
    """The number of words of a mask: ceil(vocab_size / 32).

    >>> num_words(32), num_words(33)
    (1, 2)
    """
    return -(-vocab_size // BITS)


def stacked_masks(masks: Seq[TokenMask]) -> mx.array:
    """Return n masks of one vocabulary, at least one, as an array [n, ceil(V / 32)] int32, for the kernels.

    The bits stay the same, so a word whose bit 31 is 1 becomes a negative number.

    >>> stacked_masks([TokenMask.of([0], 40), TokenMask.of([31, 32], 40)]).tolist()
    [[1, 0], [-2147483648, 1]]
    """
    together = b"".join(mask.words.tobytes() for mask in masks)
    words = mx.array(memoryview(together).cast("i"))  # type: ignore[arg-type]  # it takes any buffer
    return words.reshape(len(masks), -1)
