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
        """Return the blocks of a prefix of `num_tokens` tokens, in order; a new prefix gets its blocks now.

        prefix_hash: any name for the prefix, which is the id of its sequence in `tables`. Ask again, and no
        block is taken: `allocate` must not run twice, because it lets a known sequence grow. The returned
        list is the caller's own (`physical_indices`).

        Raises ValueError if the prefix is there with another number of tokens, and `OutOfBlocksError` if too
        few blocks are free. After an error nothing has changed: `allocate` changes nothing when it raises.

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
        """Begin a sequence of `total_tokens` tokens with a prefix, and return all its blocks in order.

        The sequence shares the prefix's blocks (`BlockTable.fork`). If the prefix's last block is not full
        and the sequence has tokens of its own, it gets a copy of that block to write them into: `allocate`
        does that. With as many tokens as the prefix it shares every block, until it writes.

        Raises, in this order: KeyError for an unknown prefix; ValueError for a sequence id that is there
        already, or for fewer tokens than the prefix has; `OutOfBlocksError` if too few blocks are free. After
        an error nothing has changed. `allocate` changes nothing when it raises, but by then the fork is in
        `tables` and holds the prefix's blocks: take it out, and give its references back.

        >>> cache = PrefixCachingKVCache(total_blocks=8, block_size=4, num_heads=1, head_dim=2)
        >>> prefix = cache.get_or_create_prefix("system", 6)
        >>> blocks = cache.allocate_with_prefix("a", "system", 9)
        >>> len(blocks), blocks[0] == prefix[0], blocks[1] == prefix[1], cache.allocator.num_free
        (3, True, False, 4)
        """
        prefix = self.tables[prefix_hash]
        if seq_id in self.tables:
            raise ValueError(f"sequence {seq_id!r} is there already")
        if total_tokens < prefix.num_tokens:
            raise ValueError(f"{total_tokens} tokens are fewer than the prefix's {prefix.num_tokens}")
        self.tables[seq_id] = prefix.fork()
        try:
            return self.allocate(seq_id, total_tokens - prefix.num_tokens)
        except OutOfBlocksError:
            self.free_sequence(seq_id)
            raise
