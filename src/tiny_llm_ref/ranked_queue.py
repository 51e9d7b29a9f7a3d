"""A priority queue of sequences: reading the first one, adding and removing cost O(log n).

A heap of ranks with lazy deletion, and a dict of the members. Only the `rank` of a sequence is used.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush
from typing import TypeVar, overload

from .sequence import Sequence

S = TypeVar("S", bound=Sequence)
Rank = tuple[int, int, int]


class RankedQueue(Seq[S]):
    """Sequences in the order of their ranks, the lowest first. No two members have the same rank.

    Invariant: every member's rank is in the heap. The heap may also hold the ranks of removed members: each
    is dropped when it reaches the top, and all of them when they are more than half of the heap.
    """

    def __init__(self) -> None:
        self._members: dict[Rank, S] = {}
        self._heap: list[Rank] = []
        self._in_order: list[S] | None = []  # the sorted members; None: out of date

    def add(self, sequence: S) -> None:
        """Add a sequence."""
        assert sequence.rank not in self._members
        self._members[sequence.rank] = sequence
        heappush(self._heap, sequence.rank)
        self._in_order = None

    def discard(self, sequence: S) -> None:
        """Remove a sequence, if it is a member."""
        if sequence not in self:
            return
        del self._members[sequence.rank]
        self._in_order = None
        if len(self._heap) > 2 * len(self._members) + 8:
            self._heap = list(self._members)
            heapify(self._heap)

    def first(self) -> S:
        """The sequence with the lowest rank; IndexError if the queue is empty."""
        while self._heap and self._heap[0] not in self._members:
            heappop(self._heap)
        return self._members[self._heap[0]]

    def head(self, most: int) -> list[S]:
        """The first `most` of n members, in order; costs O(most log n)."""
        ranks: list[Rank] = []
        while self._heap and len(ranks) < most:
            rank = heappop(self._heap)
            # A member that was removed and added again is in the heap twice.
            if rank in self._members and rank not in ranks[-1:]:
                ranks.append(rank)
        for rank in ranks:
            heappush(self._heap, rank)
        return [self._members[rank] for rank in ranks]

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: object) -> bool:
        return isinstance(sequence, Sequence) and self._members.get(sequence.rank) is sequence

    def __iter__(self) -> Iterator[S]:
        return iter(self._ordered())

    @overload
    def __getitem__(self, place: int) -> S: ...
    @overload
    def __getitem__(self, place: slice) -> list[S]: ...
    def __getitem__(self, place: int | slice) -> S | list[S]:
        """Return a member, or a slice of them; except for 0, this sorts the members if they have changed."""
        return self.first() if place == 0 else self._ordered()[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (RankedQueue, list)) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RankedQueue({[sequence.seq_id for sequence in self]})"

    def _ordered(self) -> list[S]:
        if self._in_order is None:
            self._in_order = [self._members[rank] for rank in sorted(self._members)]
        return self._in_order
