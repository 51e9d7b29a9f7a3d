"""A prompt as the router sees it: the hashes of its full blocks, never its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tiny_llm.prefix_cache import TokenBlocks

HASH_BYTES = 8  # of 32: two different blocks collide once in 2**64, and then a request is only routed badly


def short_hash(digest: bytes) -> bytes:
    """Return the first `HASH_BYTES` bytes of a block's hash, which keep reports small."""
    return digest[:HASH_BYTES]


@dataclass(frozen=True)
class PromptBlocks:
    """The full blocks of a prompt.

    hashes: the short hash of each full block, in order. Each hash covers the block, all blocks before it and
    the salt. num_tokens: tokens of the prompt. block_size: tokens in a block.
    """

    hashes: tuple[bytes, ...]
    num_tokens: int
    block_size: int

    @classmethod
    def of(cls, token_ids: Sequence[int], block_size: int, salt: str = "") -> Self:
        """Hash a prompt; takes about 2 us for each block.

        salt: the request's `cache_salt`. Prompts with different salts have different hashes in every block.

        >>> same, other = PromptBlocks.of(range(10), 4), PromptBlocks.of(range(10), 4, "other")
        >>> len(same.hashes), len(same.hashes[0]), set(same.hashes) & set(other.hashes)
        (2, 8, set())
        """
        return cls.of_stream(token_ids, TokenBlocks(block_size, salt))

    @classmethod
    def of_stream(cls, token_ids: Sequence[int], stream: TokenBlocks) -> Self:
        """Hash a prompt in a stream that is still empty and has the right salt."""
        stream.extend(token_ids)
        return cls(tuple(map(short_hash, stream.hashes)), len(token_ids), stream.block_size)

    def num_uncached(self, num_blocks: int) -> int:
        """Return how many tokens a replica must compute if it has the first `num_blocks` blocks cached.

        It is at least 1, because the engine always computes the last token of a prompt.

        >>> [PromptBlocks.of(range(8), 4).num_uncached(blocks) for blocks in (0, 1, 2)]
        [8, 4, 1]
        """
        return max(1, self.num_tokens - num_blocks * self.block_size)
