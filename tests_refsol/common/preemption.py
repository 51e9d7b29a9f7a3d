"""A preemption policy for the days before 3.6, the day on which learners write policies."""

from collections.abc import Sequence

from tiny_llm.sequence import PagedSequence


class PreemptNewest:
    """Preempt the sequence that was admitted last."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """The known tokens and one more block, at most `max_len`."""
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Sequence[PagedSequence]) -> PagedSequence:
        """The last of the candidates."""
        return candidates[-1]
