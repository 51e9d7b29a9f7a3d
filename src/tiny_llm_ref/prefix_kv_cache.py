"""The lab's cache with shared prefixes: whoever knows a prefix by its hash shares its pages.

Here the caller says what is alike; `PrefixCache` finds out by content. A prefix is a sequence that nobody
continues: its table holds one reference to each of its blocks, so it outlives those who share it.
"""

from .errors import OutOfBlocksError
from .paged_cache import PagedKVCache


class PrefixCachingKVCache(PagedKVCache):
    """A `PagedKVCache` whose sequences may begin with a prefix that is stored once.

    A prefix's hash is its sequence id: `write_token` fills it, and `free_sequence` forgets it, while its
    blocks stay with the sequences that share them.
    """

    def get_or_create_prefix(self, prefix_hash: str, num_tokens: int) -> list[int]:
        """The blocks of a prefix of `num_tokens` tokens; they are allocated where the hash is new.

        Raises ValueError where the hash stands for another number of tokens; `OutOfBlocksError`, unchanged,
        where too few blocks are free.
        """
        if prefix_hash not in self.tables:
            return self.allocate(prefix_hash, num_tokens)
        prefix = self.tables[prefix_hash]
        if prefix.num_tokens != num_tokens:
            raise ValueError(f"prefix {prefix_hash!r} has {prefix.num_tokens} tokens, not {num_tokens}")
        return prefix.physical_indices()

    def allocate_with_prefix(self, seq_id: str, prefix_hash: str, total_tokens: int) -> list[int]:
        """Begin a sequence of `total_tokens` tokens with a prefix -> all its blocks, in order.

        The prefix's blocks are shared. Where its last one has room and the sequence goes on, the sequence
        gets a copy of that one, to write its own tokens into. All or nothing: raises KeyError for an unknown
        prefix, ValueError for a sequence that is there already or fewer tokens than the prefix has, and
        `OutOfBlocksError` where too few blocks are free.
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
