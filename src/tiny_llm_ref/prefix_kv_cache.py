"""The cache of named sequences, with shared prefixes: sequences that name the same prefix share its blocks.

Here the caller says which prefixes are equal; `PrefixCache` finds them by content. A prefix is stored as a
sequence that never grows. Its table holds one reference to each of its blocks, so the prefix outlives the
sequences that share it.
"""

from .errors import OutOfBlocksError
from .paged_cache import PagedKVCache


class PrefixCachingKVCache(PagedKVCache):
    """A `PagedKVCache` whose sequences may start with a prefix that is stored once.

    A prefix's name is its sequence id. `write_token` writes the prefix's tokens; `free_sequence` removes the
    prefix, but sequences that share its blocks keep them.
    """

    def get_or_create_prefix(self, prefix_hash: str, num_tokens: int) -> list[int]:
        """Return the blocks of a prefix of `num_tokens` tokens, in order; allocate them for a new prefix.

        prefix_hash: the prefix's name, any string, which is also the id of its sequence in `tables`. (The
        parameter's name is historical: nothing is hashed.) A second call for the same prefix takes no block:
        do not call `allocate` again, which would make the sequence longer. The returned list is a copy that
        the caller may change (`physical_indices` makes one).

        Raises ValueError if the prefix exists with another number of tokens, and `OutOfBlocksError` if too
        few blocks are free. After an error nothing has changed; `allocate` changes nothing when it raises.

        >>> cache = PrefixCachingKVCache(total_blocks=8, block_size=4, num_heads=1, head_dim=2)
        >>> cache.get_or_create_prefix("system", 6) == cache.get_or_create_prefix("system", 6)
        True
        >>> cache.allocator.num_free
        6
        """
        if prefix_hash not in self.tables:
            return self.allocate(prefix_hash, num_tokens)
        prefix = self.tables[prefix_hash]
        if prefix.num_tokens != num_tokens:
            raise ValueError(f"prefix {prefix_hash!r} has {prefix.num_tokens} tokens, not {num_tokens}")
        return prefix.physical_indices()

    def allocate_with_prefix(self, seq_id: str, prefix_hash: str, total_tokens: int) -> list[int]:
        """Start a sequence of `total_tokens` tokens, the prefix included; return all its blocks in order.

        The sequence shares the prefix's blocks (`BlockTable.fork`), and `allocate` adds the places for its
        other tokens. If the prefix's last block is not full and the sequence is longer than the prefix,
        `allocate` also replaces that block by a copy, into which the sequence may write. A sequence of just
        the prefix's tokens shares every block.

        Raises, checked in this order: KeyError for an unknown prefix; ValueError if the sequence id is in
        `tables` already, or for fewer tokens than the prefix has; `OutOfBlocksError` if too few blocks are
        free. After an error nothing has changed. But when `allocate` raises, the fork is in `tables` already
        and holds the prefix's blocks: remove it and free its references (`free_sequence` does both).

        >>> cache = PrefixCachingKVCache(total_blocks=8, block_size=4, num_heads=1, head_dim=2)
        >>> prefix = cache.get_or_create_prefix("system", 6)
        >>> blocks = cache.allocate_with_prefix("a", "system", 9)
        >>> len(blocks), blocks[0] == prefix[0], blocks[1] == prefix[1], cache.allocator.num_free
        (3, True, False, 4)
        """
        prefix = self.tables[prefix_hash]
        if seq_id in self.tables:
            raise ValueError(f"sequence {seq_id!r} exists already")
        if total_tokens < prefix.num_tokens:
            raise ValueError(f"{total_tokens} tokens are fewer than the prefix's {prefix.num_tokens}")
        self.tables[seq_id] = prefix.fork()
        try:
            return self.allocate(seq_id, total_tokens - prefix.num_tokens)
        except OutOfBlocksError:
            self.free_sequence(seq_id)
            raise
