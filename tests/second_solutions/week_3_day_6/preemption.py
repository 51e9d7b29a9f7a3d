"""Preemption: when blocks run out, the newest sequence gives up its blocks and waits.

It goes back to the head of the queue, and gets its keys and values again when there is memory: copied from
the host, or computed once more. The oldest sequence is never chosen while another runs, so it always
advances, and every sequence ends. Source: section 4.5 of the PagedAttention paper.
"""

from collections.abc import Sequence as Seq

from .sequence import PagedSequence


class NewestFirst:
    """Admits a sequence when its known tokens and one more block fit, and preempts the newest."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """Tokens of `sequence`, from its first, for which blocks must be available once it is admitted.

        All known tokens, prompt and outputs, computed or not (`num_tokens`): they must be computed anyway,
        and after a preemption there are more of them than the prompt's. And one block more
        (`table.block_size` tokens), so that the first output does not preempt another sequence at once. But
        never more than the sequence may ever have (`max_len`).

        >>> from types import SimpleNamespace as Known
        >>> sequence = Known(num_tokens=100, max_len=500, table=Known(block_size=16))
        >>> NewestFirst().reserved_tokens(sequence)
        116
        """
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Seq[PagedSequence]) -> PagedSequence | None:
        """The sequence to preempt: the newest of `candidates`, which are in order, oldest first.

        There is at least one. The last of them may be the very sequence that needs the blocks: then it waits
        itself. Choosing the oldest would let two sequences preempt each other for ever. `candidates` is not
        changed. (Another policy may return None, for no preemption; this one never does.)

        >>> NewestFirst().choose_victim(["oldest", "older", "newest"])
        'newest'
        """
        return candidates[-1]
