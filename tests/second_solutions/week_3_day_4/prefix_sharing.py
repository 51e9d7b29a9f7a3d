"""The policy that uses the prefix cache: a sequence does not compute what it finds there.

Knows sequences and their tables; the cache knows no sequences. Bookkeeping over ints, without an array.
"""

from .sequence import PagedSequence


class PrefixSharing:
    def adopt(self, sequence: PagedSequence) -> None:
        """Share the kept blocks that come next in a sequence, up to the first miss.

        What it shares it does not compute. The next block has the index num_computed // block_size. The
        blocks come into the sequence's table by `cache.share`, in order and with their full length, and the
        sequence learns by `note_shared` how many tokens that makes. Share only blocks that lie within the
        first `num_shareable` tokens: all known tokens except the last, which is always computed, because its
        row of the step gives the logits for the next token.

        Nothing happens if no block is left to share or if the given `_may_share` says no. `_stream(sequence,
        n)` is the sequence's text, cut into at least n blocks; `cache.match` finds the blocks.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> from tiny_llm.policies import Policies
        >>> manager = PagedBatchManager(8, 4, 2, policies=Policies(prefix=PrefixSharing))  # 8 blocks of 4
        >>> for name in ("first", "again"):
        ...     added = manager.add_request(list(range(10)), name, SamplingParams(max_tokens=1))
        ...     rows = manager.process_batch()
        >>> [sequence.num_cached_tokens for sequence in manager.running]
        [0, 8]
        """
        first = sequence.num_computed // self.block_size
        stop = sequence.num_shareable // self.block_size
        if first >= stop or not self._may_share(sequence):
            return
        blocks = self.cache.match(self._stream(sequence, stop), first, stop)
        for block in blocks:
            self.cache.share(sequence.table, block, self.block_size)
        sequence.note_shared(len(blocks) * self.block_size)

    def next_block(self, sequence: PagedSequence) -> bytes | None:
        """Return the hash of the block that a sequence fills next, or None if a token of it is not known yet.

        That is the block of the first token that is not computed; it may be partly full. Known are the prompt
        and the outputs (`num_tokens`). Two sequences with the same hash would compute the same block: the
        scheduler lets the later one wait, and share.

        >>> from tiny_llm import SamplingParams
        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> manager = PagedBatchManager(8, 4, 1)  # 8 blocks of 4 tokens
        >>> added = manager.add_request(list(range(11)), "a", SamplingParams(max_tokens=1))
        >>> sequence, sharing = manager.sequence("a"), PrefixSharing(manager.allocator, 4)
        >>> sequence.num_computed = 9  # the next block, 2, has the tokens 8 .. 11, and 11 is not known
        >>> sharing.next_block(sequence) is None
        True
        """
        index = sequence.num_computed // self.block_size
        if (index + 1) * self.block_size > sequence.num_tokens:
            return None
        return self._stream(sequence, index + 1).hashes[index]
