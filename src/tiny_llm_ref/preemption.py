"""Who gives way when pages run out: the newest sequence, and nobody before it has to.

It goes back to the head of the queue and gets its keys and values again when there is room, from the host or
by computing them. The oldest sequence is never chosen while another runs, so somebody always gets on and
everybody ends. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Sequence as Seq

from .sequence import PagedSequence


class NewestFirst:
    """Admits a sequence when its known tokens and one block more fit, and preempts the newest."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """The known tokens and a block to grow into, but never more than its whole life."""
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """The one that was admitted last."""
        return candidates[-1]
