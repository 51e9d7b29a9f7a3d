"""A preemption policy for the days before the one that builds policies."""

from collections.abc import Sequence

from tiny_llm.sequence import PagedSequence


class NewestGivesWay:
    """Preempt the sequence that was admitted last."""

    def reserved_tokens(self, sequence: PagedSequence) -> int:
        """The known tokens and one block more, up to the longest that the sequence may become."""
        return min(sequence.num_tokens + sequence.table.block_size, sequence.max_len)

    def choose_victim(self, candidates: Sequence[PagedSequence]) -> PagedSequence:
        """The last of the candidates."""
        return candidates[-1]
