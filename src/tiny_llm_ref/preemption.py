"""Preemption: when blocks run out, the newest sequence releases its blocks and waits.

It goes back to the head of the queue. (With priorities, "newest" means last in the order of service, and it
waits at its place in that order.) When memory is free again, its keys and values are recomputed, or
copied back from host memory (`swap`). The oldest sequence is never preempted while another runs, so it always
advances, and every sequence finishes. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Sequence as Seq

from .sequence import PagedSequence


class NewestFirst:
    """Admits a sequence if its known tokens and one more block fit; preempts the newest sequence."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """Return how many of the sequence's tokens, from the first, need reserved blocks when it is admitted.

        That is all known tokens (`num_tokens`: prompt and outputs, computed or not), plus one block
        (`table.block_size` tokens), so that its first output does not preempt another sequence at once; but
        at most `max_len`, the sequence's length limit. After a preemption the outputs must be recomputed too,
        so counting only the prompt would be wrong.

        >>> from types import SimpleNamespace as Known
        >>> sequence = Known(num_tokens=100, max_len=500, table=Known(block_size=16))
        >>> NewestFirst().reserved_tokens(sequence)
        116
        """
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """Return the sequence to preempt: the newest of `candidates`, which are ordered oldest first.

        There is at least one candidate. The newest may be the sequence that needs the blocks: then it is
        preempted itself. The newest has the least work to lose, and so the oldest always gets further. If the
        oldest were chosen and only prompts were reserved, two sequences could preempt each other forever.
        `candidates` is not changed. (Another policy may return None, for no preemption; this one never does.)

        >>> NewestFirst().choose_victim(["oldest", "older", "newest"])
        'newest'
        """
        return candidates[-1]
