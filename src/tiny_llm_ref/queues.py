"""The requests of a batch manager by id: who waits, who runs, and which sequences a request has.

Plain bookkeeping: knows nothing of memory, of pages, or of when anybody should run.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Generic, TypeVar

from .errors import DuplicateRequestError
from .sequence import Sequence, SequenceState, completion_ids

S = TypeVar("S", bound=Sequence)


class RequestQueues(Generic[S]):
    """Invariant: a sequence that has not ended is waiting, or running, or parked behind one that is.

    A completion that is not forked yet is known by its id already: it stands for its leader.
    """

    def __init__(self) -> None:
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self._sequences: dict[str, S] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, seq_id: str) -> S:
        """The unfinished sequence of that id; KeyError for another."""
        return self._sequences[seq_id]

    def refuse_id_in_use(self, request_id: str, seq_ids: Iterable[str]) -> None:
        """Raise `DuplicateRequestError` for an id of a request that has not ended."""
        taken = {sequence.request_id for sequence in self._sequences.values()} | self._sequences.keys()
        if request_id in taken or not taken.isdisjoint(seq_ids):
            raise DuplicateRequestError(
                f"request id {request_id!r} is in use by a request that has not ended"
            )

    def add(self, leader: S) -> None:
        """Queue a request's leader."""
        self.waiting.append(leader)
        ids = completion_ids(leader.request_id, 1 + leader.num_forks)
        self._sequences.update(dict.fromkeys(ids, leader))

    def start_next(self) -> S:
        """The sequence that has waited longest runs."""
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        sequence.state = SequenceState.RUNNING
        return sequence

    def put_back(self, sequence: S) -> list[S]:
        """Make a running sequence wait again, at the head of the queue; everybody who stopped by that."""
        self.running.remove(sequence)
        sequence.state = SequenceState.WAITING
        self.waiting.appendleft(sequence)
        return [sequence]

    def fork(self, leader: S) -> list[S]:
        """The leader and, once its prompt is computed, its other completions; they run beside it."""
        ids = completion_ids(leader.request_id, 1 + leader.num_forks)
        forks = [leader.fork(seq_id, leader.seed + i) for i, seq_id in enumerate(ids[1:], start=1)]
        leader.num_forks = 0
        self._insert_after(leader, forks)
        self._sequences.update({fork.seq_id: fork for fork in forks})
        return [leader, *forks]

    def end(self, seq_id: str) -> S:
        """Take out a sequence and return it. KeyError for one that has ended."""
        sequence = self._sequences.pop(seq_id)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        return sequence

    def forget_forks_to_come(self, request_id: str) -> list[str]:
        """The ids of a request's sequences; completions that were never forked are forgotten."""
        of_request = {i: seq for i, seq in self._sequences.items() if seq.request_id == request_id}
        for seq_id, sequence in of_request.items():
            if seq_id != sequence.seq_id:
                del self._sequences[seq_id]
        return [seq_id for seq_id, sequence in of_request.items() if seq_id == sequence.seq_id]

    def _insert_after(self, sequence: S, others: list[S]) -> None:
        after = self.running.index(sequence) + 1
        self.running[after:after] = others


class QueueViews(Generic[S]):
    """What every batch manager shows of its queues."""

    _queues: RequestQueues[S]

    @property
    def waiting(self) -> Seq[S]:
        """Who waits, the next to run first."""
        return self._queues.waiting

    @property
    def running(self) -> Seq[S]:
        """Who runs, oldest first."""
        return self._queues.running

    @property
    def has_work(self) -> bool:
        """True while a request has not ended."""
        return len(self._queues) > 0

    def sequence(self, seq_id: str) -> S:
        """The unfinished sequence of that id; KeyError for another."""
        return self._queues[seq_id]
