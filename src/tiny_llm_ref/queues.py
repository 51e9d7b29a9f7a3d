"""The requests of a batch manager by id: which wait, which run, and which sequences each has.

Every operation on one request costs O(log n) in the number of requests, and O(its own sequences). Plain
bookkeeping: knows nothing of memory, of pages, or of when a request should run.
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
    """Invariants: a sequence that has not ended is waiting, running, set aside, or parked behind one that is.
    Waiting and running sequences are in the order of their ranks.

    A completion that is not forked yet is known by its id already: it stands for its leader. priority_key:
    a request's place in the order of service, from its number, counted from 0, and its priority.
    """

    def __init__(self, priority_key: Callable[[int, int], int] = lambda number, priority: number) -> None:
        self.running: RankedQueue[S] = RankedQueue()
        self._all_waiting: RankedQueue[S] = RankedQueue()
        self._num_waiting_of: Counter[str] = Counter()  # sequences in `_all_waiting`, by request
        self._alone: str | None = None
        self._priority_key = priority_key
        self._num_arrived = 0
        self._sequences: dict[str, S] = {}
        self._of_request: dict[str, dict[str, S]] = {}  # the same, request by request

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, seq_id: str) -> S:
        """The unfinished sequence of that id; KeyError for another."""
        return self._sequences[seq_id]

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences

    @property
    def waiting(self) -> Seq[S]:
        """The sequences that wait and may run, the next to run first."""
        if self._alone is None:
            return self._all_waiting
        return self._in_order(self._alone, self._all_waiting)

    def first_waiting(self, most: int) -> list[S]:
        """The first of those that wait, set aside or not; costs O(most log n)."""
        return self._all_waiting.head(most)

    @property
    def set_aside(self) -> list[S]:
        """The sequences that wait and may not run, because another request runs alone."""
        if self._alone is None:
            return []
        return [sequence for sequence in self._all_waiting if sequence.request_id != self._alone]

    @property
    def num_waiting_requests(self) -> int:
        """Requests that have a waiting sequence, set aside or not."""
        return len(self._num_waiting_of)

    def has_request(self, request_id: str) -> bool:
        """True while a request has not ended."""
        return request_id in self._of_request

    def refuse_id_in_use(self, request_id: str, seq_ids: Iterable[str]) -> None:
        """Raise `DuplicateRequestError` for an id of a request that has not ended."""
        if any(name in self._of_request or name in self._sequences for name in (request_id, *seq_ids)):
            raise DuplicateRequestError(
                f"request id {request_id!r} is in use by a request that has not ended"
            )

    def add(self, leader: S) -> None:
        """Queue a request's leader, and make the ids of all its completions known."""
        number, self._num_arrived = self._num_arrived, self._num_arrived + 1
        leader.rank = (self._priority_key(number, leader.params.priority), number, 0)
        self._wait(leader)
        self._know(leader.request_id, completion_ids(leader.request_id, 1 + leader.num_forks), leader)

    def start_next(self) -> S:
        """Move the first waiting sequence to the running ones; return it."""
        sequence = self.waiting[0]
        self._stop_waiting(sequence)
        self._run(sequence)
        return sequence

    def put_back(self, sequence: S) -> list[S]:
        """Make a running sequence wait again, in its old place; all sequences that stopped by that."""
        self.running.discard(sequence)
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
            self._know(leader.request_id, [fork.seq_id], fork)
        return [leader, *forks]

    def end(self, seq_id: str) -> S:
        """Take out a sequence, waiting or running; return it. KeyError for one that has ended."""
        sequence = self._forget(seq_id)
        self.running.discard(sequence)
        self._stop_waiting(sequence)
        sequence.state = SequenceState.FINISHED
        return sequence

    def forget_forks_to_come(self, request_id: str) -> list[str]:
        """The ids of a request's sequences; completions that were never forked are forgotten."""
        of_request = dict(self._of_request.get(request_id, {}))
        for seq_id, sequence in of_request.items():
            if seq_id != sequence.seq_id:
                self._forget(seq_id)
        return [seq_id for seq_id, sequence in of_request.items() if seq_id == sequence.seq_id]

    def isolate(self, request_id: str | None) -> None:
        """Let only this request start waiting sequences, until this is called again; None: all of them."""
        self._alone = request_id

    def _in_order(self, request_id: str, queue: RankedQueue[S]) -> list[S]:
        """The members of a queue that belong to a request."""
        members = {s.rank: s for s in self._of_request.get(request_id, {}).values() if s in queue}
        return [members[rank] for rank in sorted(members)]

    def _know(self, request_id: str, seq_ids: Iterable[str], sequence: S) -> None:
        """From now on these ids of a request stand for a sequence."""
        known = dict.fromkeys(seq_ids, sequence)
        self._sequences.update(known)
        self._of_request.setdefault(request_id, {}).update(known)

    def _forget(self, seq_id: str) -> S:
        """Forget an id; returns the sequence that it stood for. KeyError for an unknown one."""
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
        """A sequence waits no more; nothing happens where it did not."""
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
    """What every batch manager shows of its queues."""

    _queues: RequestQueues[S]

    @property
    def waiting(self) -> Seq[S]:
        """The waiting sequences, the next to start first."""
        return self._queues.waiting

    def first_waiting(self, most: int) -> list[S]:
        """The first of those that wait, at most `most`; costs O(most log n)."""
        return self._queues.first_waiting(most)

    @property
    def running(self) -> Seq[S]:
        """The running sequences, in the order of service."""
        return self._queues.running

    @property
    def num_waiting_requests(self) -> int:
        """Requests that have a waiting sequence."""
        return self._queues.num_waiting_requests

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
        """Let only this request start waiting sequences, until this is called again; None: all of them."""
        self._queues.isolate(request_id)
