"""The requests of a batch manager by id: who waits, who runs, and which sequences a request has.

Plain bookkeeping: knows nothing of memory, of pages, or of when anybody should run.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Generic, TypeVar

from .errors import DuplicateRequestError
from .sequence import Sequence, SequenceState, completion_ids

S = TypeVar("S", bound=Sequence)


class RequestQueues(Generic[S]):
    """Invariants: a sequence that has not ended is waiting, running, set aside, or parked behind one that is.
    Who waits and who runs stand in the order of their ranks.

    A completion that is not forked yet is known by its id already: it stands for its leader. turn: when it is
    a request's turn, from its number, counted from 0, and its priority.
    """

    def __init__(self, turn: Callable[[int, int], int] = lambda number, priority: number) -> None:
        self.waiting: list[S] = []
        self.running: list[S] = []
        self.set_aside: list[S] = []
        self._alone: str | None = None
        self._turn = turn
        self._num_arrived = 0
        self._sequences: dict[str, S] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, seq_id: str) -> S:
        """The unfinished sequence of that id; KeyError for another."""
        return self._sequences[seq_id]

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences

    def has_request(self, request_id: str) -> bool:
        """True while a request has not ended."""
        return any(sequence.request_id == request_id for sequence in self._sequences.values())

    def refuse_id_in_use(self, request_id: str, seq_ids: Iterable[str]) -> None:
        """Raise `DuplicateRequestError` for an id of a request that has not ended."""
        taken = {sequence.request_id for sequence in self._sequences.values()} | self._sequences.keys()
        if request_id in taken or not taken.isdisjoint(seq_ids):
            raise DuplicateRequestError(
                f"request id {request_id!r} is in use by a request that has not ended"
            )

    def add(self, leader: S) -> None:
        """Queue a request's leader."""
        number, self._num_arrived = self._num_arrived, self._num_arrived + 1
        leader.rank = (self._turn(number, leader.params.priority), number, 0)
        self._wait(leader)
        ids = completion_ids(leader.request_id, 1 + leader.num_forks)
        self._sequences.update(dict.fromkeys(ids, leader))

    def start_next(self) -> S:
        """The sequence whose turn it is runs."""
        sequence = self.waiting.pop(0)
        self._run(sequence)
        return sequence

    def put_back(self, sequence: S) -> list[S]:
        """Make a running sequence wait again, until it is its turn; everybody who stopped by that."""
        self.running.remove(sequence)
        sequence.state = SequenceState.WAITING
        self._wait(sequence)
        return [sequence]

    def fork(self, leader: S) -> list[S]:
        """The leader and, once its prompt is computed, its other completions; they run beside it."""
        ids = completion_ids(leader.request_id, 1 + leader.num_forks)
        forks = [leader.fork(seq_id, leader.seed + i) for i, seq_id in enumerate(ids[1:], start=1)]
        leader.num_forks = 0
        for place, fork in enumerate(forks, start=1):
            fork.rank = (*leader.rank[:2], place)
            self._run(fork)
        self._sequences.update({fork.seq_id: fork for fork in forks})
        return [leader, *forks]

    def end(self, seq_id: str) -> S:
        """Take out a sequence and return it. KeyError for one that has ended."""
        sequence = self._sequences.pop(seq_id)
        for queue in (self.running, self.waiting, self.set_aside):
            if sequence in queue:
                queue.remove(sequence)
        sequence.state = SequenceState.FINISHED
        return sequence

    def forget_forks_to_come(self, request_id: str) -> list[str]:
        """The ids of a request's sequences; completions that were never forked are forgotten."""
        of_request = {i: seq for i, seq in self._sequences.items() if seq.request_id == request_id}
        for seq_id, sequence in of_request.items():
            if seq_id != sequence.seq_id:
                del self._sequences[seq_id]
        return [seq_id for seq_id, sequence in of_request.items() if seq_id == sequence.seq_id]

    def isolate(self, request_id: str | None) -> None:
        """Let nobody else's turn come, of those who wait, until this is called again; None: everybody's."""
        everybody = sorted([*self.waiting, *self.set_aside], key=_rank)
        self._alone, self.waiting, self.set_aside = request_id, [], []
        for sequence in everybody:
            self._wait(sequence)

    def _wait(self, sequence: S) -> None:
        may_run = self._alone in (None, sequence.request_id)
        insort(self.waiting if may_run else self.set_aside, sequence, key=_rank)

    def _run(self, sequence: S) -> None:
        insort(self.running, sequence, key=_rank)
        sequence.run()


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


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

    def has_sequence(self, seq_id: str) -> bool:
        """True while a sequence has not ended."""
        return seq_id in self._queues

    def has_request(self, request_id: str) -> bool:
        """True while a request has not ended."""
        return self._queues.has_request(request_id)

    def isolate(self, request_id: str | None) -> None:
        """Let nobody else's turn come, of those who wait, until this is called again; None: everybody's."""
        self._queues.isolate(request_id)
