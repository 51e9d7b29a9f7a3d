"""The cache of named sequences, with shared prefixes: sequences that name the same prefix share its blocks.

Here the caller says which prefixes are equal; `PrefixCache` finds them by content. A prefix is stored as a
sequence that never grows. Its table holds one reference to each of its blocks, so the prefix outlives the
sequences that share it.
"""

from .errors import OutOfBlocksError


class PrefixCachingKVCache:
    def get_or_create_prefix(self, prefix_hash: str, num_tokens: int) -> list[int]:
        table = self.tables.get(prefix_hash)
        if table is None:
            return self.allocate(prefix_hash, num_tokens)
        if table.num_tokens != num_tokens:
            raise ValueError(f"prefix {prefix_hash!r} has {table.num_tokens} tokens, not {num_tokens}")
        return table.physical_indices()

    def allocate_with_prefix(self, seq_id: str, prefix_hash: str, total_tokens: int) -> list[int]:
        prefix = self.tables[prefix_hash]
        if seq_id in self.tables:
            raise ValueError(f"sequence {seq_id!r} already exists")
        num_own = total_tokens - prefix.num_tokens
        if num_own < 0:
            raise ValueError(f"{total_tokens} tokens are fewer than the prefix's {prefix.num_tokens}")
        self.tables[seq_id] = prefix.fork()
        try:
            return self.allocate(seq_id, num_own)
        except OutOfBlocksError:
            self.free_sequence(seq_id)
            raise
