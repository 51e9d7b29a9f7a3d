"""Preemption: a comparison instead of a minimum."""

from collections.abc import Sequence as Seq

from .sequence import PagedSequence


class NewestFirst:
    """The newest gives up its blocks."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """A block more, unless the sequence ends before."""
        wanted = sequence.num_tokens + sequence.table.block_size
        return sequence.max_len if wanted > sequence.max_len else wanted

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """The last of them."""
        *_, newest = candidates
        return newest
