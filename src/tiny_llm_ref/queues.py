"""The requests of a batch manager by id: the waiting and running ones, and the sequences of each.

Every operation on one request costs O(log n) in the number of requests, and O(m) in the number of its
sequences. This is plain bookkeeping: other modules handle memory and pages, and decide when a request runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Generic, TypeVar

from .errors import DuplicateRequestError
from .ranked_queue import RankedQueue
from .sequence import Sequence, SequenceState, completion_ids

S = TypeVar("S", bound=Sequence)


class RequestQueues(Generic[S]):
    """Waiting and running sequences, in the order of their ranks.

    Invariant: a sequence that has not ended is waiting, running, set aside, or parked with a sequence in one
    of these states.

    The ids of completions that are not forked yet exist already: they refer to the request's leader, its
    first sequence. priority_key: a function that makes a request's priority key from its arrival number,
    counted from 0, and its priority.
    """

    def __init__(self, priority_key: Callable[[int, int], int] = lambda number, priority: number) -> None:
        self.running: RankedQueue[S] = RankedQueue()
        self._all_waiting: RankedQueue[S] = RankedQueue()
        self._num_waiting_of: Counter[str] = Counter()  # sequences in `_all_waiting`, by request
        self._isolated: str | None = None  # the only request whose waiting sequences may start
        self._priority_key = priority_key
        self._num_arrived = 0
        self._sequences: dict[str, S] = {}
        self._of_request: dict[str, dict[str, S]] = {}  # the same, by request id

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, seq_id: str) -> S:
        """The unfinished sequence with that id; KeyError if there is none."""
        return self._sequences[seq_id]

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences

    @property
    def waiting(self) -> Seq[S]:
        """The sequences that wait and may run; the first one runs next."""
        if self._isolated is None:
            return self._all_waiting
        return self._in_order(self._isolated, self._all_waiting)

    def first_waiting(self, most: int) -> list[S]:
        """The first `most` of n waiting sequences, including those set aside; costs O(most log n)."""
        return self._all_waiting.head(most)

    @property
    def set_aside(self) -> list[S]:
        """The sequences that wait and may not run, because another request is isolated."""
        if self._isolated is None:
            return []
        return [sequence for sequence in self._all_waiting if sequence.request_id != self._isolated]

    @property
    def num_waiting_requests(self) -> int:
        """The number of requests that have a waiting sequence, including those set aside."""
        return len(self._num_waiting_of)

    def has_request(self, request_id: str) -> bool:
        """True until the request has ended."""
        return request_id in self._of_request

    def refuse_id_in_use(self, request_id: str, seq_ids: Iterable[str]) -> None:
        """Raise `DuplicateRequestError` if an id belongs to a request that has not ended."""
        if any(name in self._of_request or name in self._sequences for name in (request_id, *seq_ids)):
            raise DuplicateRequestError(
                f"request id {request_id!r} is in use by a request that has not ended"
            )

    def add(self, leader: S) -> None:
        """Queue a request's leader, which computes its prompt, and register all completions' ids."""
        number, self._num_arrived = self._num_arrived, self._num_arrived + 1
        leader.rank = (self._priority_key(number, leader.params.priority), number, 0)
        self._wait(leader)
        self._know(leader.request_id, completion_ids(leader.request_id, 1 + leader.num_forks), leader)

    def start_next(self) -> S:
        """Move the first waiting sequence to the running ones and return it."""
        sequence = self.waiting[0]
        self._stop_waiting(sequence)
        self._run(sequence)
        return sequence

    def return_to_waiting(self, sequence: S) -> list[S]:
        """Make a running sequence wait again, at its old position; returns all sequences that stopped."""
        self.running.discard(sequence)
        sequence.state = SequenceState.WAITING
        self._wait(sequence)
        return [sequence]

    def fork(self, leader: S) -> list[S]:
        """Fork a request's other completions from its leader; returns all completions, which now all run."""
        ids = completion_ids(leader.request_id, 1 + leader.num_forks)
        forks = [leader.fork(seq_id, leader.seed + i) for i, seq_id in enumerate(ids[1:], start=1)]
        leader.num_forks = 0
        for place, fork in enumerate(forks, start=1):
            fork.rank = (*leader.rank[:2], place)
            self._run(fork)
            self._know(leader.request_id, [fork.seq_id], fork)
        return [leader, *forks]

    def end(self, seq_id: str) -> S:
        """Remove a waiting or running sequence and return it. KeyError if it has ended."""
        sequence = self._forget(seq_id)
        self.running.discard(sequence)
        self._stop_waiting(sequence)
        sequence.state = SequenceState.FINISHED
        return sequence

    def remove_pending_forks(self, request_id: str) -> list[str]:
        """Remove the ids of completions that are not forked yet; returns the ids of existing sequences."""
        of_request = dict(self._of_request.get(request_id, {}))
        for seq_id, sequence in of_request.items():
            if seq_id != sequence.seq_id:
                self._forget(seq_id)
        return [seq_id for seq_id, sequence in of_request.items() if seq_id == sequence.seq_id]

    def isolate(self, request_id: str | None) -> None:
        """Until the next call, start only this request's waiting sequences; None: those of all requests."""
        self._isolated = request_id

    def _in_order(self, request_id: str, queue: RankedQueue[S]) -> list[S]:
        """The members of a queue that belong to a request, in the order of their ranks."""
        members = {s.rank: s for s in self._of_request.get(request_id, {}).values() if s in queue}
        return [members[rank] for rank in sorted(members)]

    def _know(self, request_id: str, seq_ids: Iterable[str], sequence: S) -> None:
        """Register these ids of a request for a sequence."""
        known = dict.fromkeys(seq_ids, sequence)
        self._sequences.update(known)
        self._of_request.setdefault(request_id, {}).update(known)

    def _forget(self, seq_id: str) -> S:
        """Remove an id and return its sequence. KeyError for an unknown id."""
        sequence = self._sequences.pop(seq_id)
        of_request = self._of_request[sequence.request_id]
        del of_request[seq_id]
        if not of_request:
            del self._of_request[sequence.request_id]
        return sequence

    def _wait(self, sequence: S) -> None:
        self._all_waiting.add(sequence)
        self._num_waiting_of[sequence.request_id] += 1

    def _stop_waiting(self, sequence: S) -> None:
        """Remove a sequence from the waiting ones, if it is one of them."""
        if sequence not in self._all_waiting:
            return
        self._all_waiting.discard(sequence)
        self._num_waiting_of[sequence.request_id] -= 1
        if not self._num_waiting_of[sequence.request_id]:
            del self._num_waiting_of[sequence.request_id]

    def _run(self, sequence: S) -> None:
        self.running.add(sequence)
        sequence.run()


class QueueViews(Generic[S]):
    """The part of a batch manager's interface that reads its queues."""

    _queues: RequestQueues[S]

    @property
    def waiting(self) -> Seq[S]:
        """The waiting sequences; the first one starts next."""
        return self._queues.waiting

    def first_waiting(self, most: int) -> list[S]:
        """The first `most` of n waiting sequences; costs O(most log n)."""
        return self._queues.first_waiting(most)

    @property
    def running(self) -> Seq[S]:
        """The running sequences, in the order of their ranks."""
        return self._queues.running

    @property
    def num_waiting_requests(self) -> int:
        """The number of requests that have a waiting sequence."""
        return self._queues.num_waiting_requests

    @property
    def has_work(self) -> bool:
        """True while any request has not ended."""
        return len(self._queues) > 0

    def sequence(self, seq_id: str) -> S:
        """The unfinished sequence with that id; KeyError if there is none."""
        return self._queues[seq_id]

    def has_sequence(self, seq_id: str) -> bool:
        """True until the sequence has ended."""
        return seq_id in self._queues

    def has_request(self, request_id: str) -> bool:
        """True until the request has ended."""
        return self._queues.has_request(request_id)

    def isolate(self, request_id: str | None) -> None:
        """Until the next call, start only this request's waiting sequences; None: those of all requests."""
        self._queues.isolate(request_id)
