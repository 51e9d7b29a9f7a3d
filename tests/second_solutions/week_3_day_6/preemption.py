"""Preemption: when blocks run out, the newest sequence releases its blocks and waits.

It goes back to the head of the queue. When memory is free again, its keys and values are recomputed, or
copied back from host memory (`swap`). The oldest sequence is never preempted while another runs, so it always
advances, and every sequence finishes. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Sequence as Seq

from .sequence import PagedSequence


class NewestFirst:
    def reserved_tokens(self, sequence: PagedSequence) -> int:
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        return candidates[-1]
