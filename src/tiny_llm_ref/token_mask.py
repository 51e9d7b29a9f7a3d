"""Token masks: which tokens may come next, one bit for each. Plain numbers, until masks become an array."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import mlx.core as mx

BITS = 32  # of a word


class TokenMask:
    """Which tokens of a vocabulary are allowed: token t is, if bit t % 32 of word t // 32 is 1.

    words: ceil(V / 32) numbers of 32 bits; the bits after the last token are 0.
    """

    def __init__(self, words: "array[int]") -> None:
        self.words = words

    @classmethod
    def of(cls, tokens: Iterable[int], vocab_size: int) -> "TokenMask":
        """Return the mask that allows these tokens of a vocabulary, and no others."""
        words = array("I", bytes(4 * num_words(vocab_size)))
        for token in tokens:
            words[token // BITS] |= 1 << token % BITS
        return cls(words)

    def __contains__(self, token: int) -> bool:
        """Whether a token is allowed."""
        return bool(self.words[token // BITS] >> token % BITS & 1)

    def __bool__(self) -> bool:
        """Whether any token is allowed."""
        return any(self.words)

    def without(self, tokens: Iterable[int]) -> "TokenMask":
        """Return a mask that does not allow these tokens."""
        words = self.words[:]
        for token in tokens:
            words[token // BITS] &= ~(1 << token % BITS)
        return TokenMask(words)


def num_words(vocab_size: int) -> int:
    """The number of words of a mask."""
    return -(-vocab_size // BITS)


def stacked_masks(masks: Seq[TokenMask]) -> mx.array:
    """Return masks as one array [n, ceil(V / 32)] int32, for the kernels."""
    together = b"".join(mask.words.tobytes() for mask in masks)
    words = mx.array(memoryview(together).cast("i"))  # type: ignore[arg-type]  # it takes any buffer
    return words.reshape(len(masks), -1)
