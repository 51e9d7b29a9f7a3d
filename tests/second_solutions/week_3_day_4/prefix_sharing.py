"""The policy that uses the prefix cache: sequences share cached blocks instead of computing them.

Knows sequences and their tables; the cache knows nothing of them. Bookkeeping over ints, no arrays.
"""

from .sequence import PagedSequence


class PrefixSharing:
    def adopt(self, sequence: PagedSequence) -> None:
        first = sequence.num_computed // self.block_size
        stop = sequence.num_shareable // self.block_size
        if first >= stop or not self._may_share(sequence):
            return
        blocks = self.cache.match(self._stream(sequence, stop), first, stop)
        for block in blocks:
            self.cache.share(sequence.table, block, self.block_size)
        sequence.add_shared_tokens(len(blocks) * self.block_size)

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        index = sequence.num_computed // self.block_size
        if (index + 1) * self.block_size > sequence.num_tokens:
            return None
        return self._stream(sequence, index + 1).hashes[index]
