"""A preemption policy for days before 3.6, on which policies are built."""

from collections.abc import Sequence

from tiny_llm.sequence import PagedSequence


class PreemptNewest:
    """Preempt the sequence that was admitted last."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """The known tokens and one block more, at most `max_len`."""
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Sequence[PagedSequence]) -> PagedSequence:
        """The last of the candidates."""
        return candidates[-1]
