"""The lab's cache with shared prefixes: sequences that name the same prefix share its blocks.

Here the caller says which prefixes are equal; `PrefixCache` finds them by content. A prefix is a sequence
that never grows: its table holds one reference to each of its blocks, so it outlives the sequences that share
it.
"""

from .errors import OutOfBlocksError
from .paged_cache import PagedKVCache


class PrefixCachingKVCache(PagedKVCache):
    """A `PagedKVCache` whose sequences may begin with a prefix that is stored once.

    A prefix's hash is its sequence id: `write_token` fills it, and `free_sequence` forgets it, while its
    blocks stay with the sequences that share them.
    """

    def get_or_create_prefix(self, prefix_hash: str, num_tokens: int) -> list[int]:
        """A known one is looked at first."""
        if prefix_hash in self.tables:
            if self.tables[prefix_hash].num_tokens != num_tokens:
                raise ValueError(f"{num_tokens} tokens for {prefix_hash!r}")
            return [*self.tables[prefix_hash].blocks]
        return self.allocate(prefix_hash, num_tokens)

    def allocate_with_prefix(self, seq_id: str, prefix_hash: str, total_tokens: int) -> list[int]:
        """Asks how many blocks it takes before it forks for good."""
        prefix = self.tables[prefix_hash]
        own = total_tokens - prefix.num_tokens
        if own < 0 or seq_id in self.tables:
            raise ValueError(f"{seq_id!r} with {total_tokens} tokens")
        fork = prefix.fork()
        if fork.blocks_to_append(own) > self.allocator.num_free:
            fork.release()
            raise OutOfBlocksError(f"{own} tokens behind {prefix_hash!r}")
        self.tables[seq_id] = fork
        return self.allocate(seq_id, own)
