"""Preemption: when blocks run out, the newest sequence gives up its blocks and waits.

It goes back to the head of the queue, and gets its keys and values again when there is memory: copied from
the host, or computed once more. The oldest sequence is never chosen while another runs, so it always
advances, and every sequence ends. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Sequence as Seq

from .sequence import PagedSequence


class NewestFirst:
    def reserved_tokens(self, sequence: PagedSequence) -> int:
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        return candidates[-1]
