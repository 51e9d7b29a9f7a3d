"""Limit how many requests may wait. Further ones are rejected immediately, in the thread that submits them.

This module sees only the occupancy that the engine publishes after each task and step.
"""

from threading import Lock
from typing import NamedTuple

from .errors import QueueFullError


class Occupancy(NamedTuple):
    """How full the engine was when it last published its occupancy.

    num_seen: requests that have reached the engine's thread so far, accepted or rejected. num_waiting:
    requests that wait there; one with several completions counts once. num_running: sequences that run; a
    completion is one. is_crowded: the last step left a request waiting.
    """

    num_seen: int = 0
    num_waiting: int = 0
    num_running: int = 0
    is_crowded: bool = False


class AdmissionControl:
    """Counts the waiting requests, from any thread and without waiting for the engine's thread.

    limit: requests that may wait at once; None: any number. max_num_seqs: sequences that may run at once.
    occupancy: the latest published occupancy; the engine's thread replaces the whole object.
    """

    def __init__(self, limit: int | None, max_num_seqs: int) -> None:
        self.occupancy = Occupancy()
        self._limit = limit
        self._max_num_seqs = max_num_seqs
        self._num_admitted = 0  # requests admitted so far, whether the engine has seen them or not
        self._lock = Lock()

    def num_waiting(self) -> int:
        """The number of waiting requests, less the free slots; -2 means that two more could start at once.

        The waiting requests are those that wait in the engine (`occupancy.num_waiting`), and those that were
        admitted here but that the engine has not seen yet (`_num_admitted` less `occupancy.num_seen`). Free
        slots are `max_num_seqs` less the running sequences, at least 0. While `is_crowded` there are no free
        slots: the pool has no blocks for more sequences, or waiting requests will take the slots. Read
        `self.occupancy` only once, because the engine's thread may replace it between two reads.

        >>> control = AdmissionControl(limit=4, max_num_seqs=2)
        >>> control.num_waiting()
        -2
        >>> control.occupancy = Occupancy(num_seen=0, num_waiting=5, num_running=1)
        >>> control.num_waiting()
        4
        """
        seen = self.occupancy
        free = 0 if seen.is_crowded else max(0, self._max_num_seqs - seen.num_running)
        return seen.num_waiting + self._num_admitted - seen.num_seen - free

    def admit(self, num_requests: int) -> None:
        """Admit requests, all of them or none: add them to `_num_admitted`.

        Raises `QueueFullError` as `check` does, and then counts nothing. Any thread may call this. Check and
        count in one operation, under `_lock`: if two threads ask for the last free slot at the same moment,
        one of them must be rejected.

        >>> control = AdmissionControl(limit=1, max_num_seqs=2)
        >>> control.admit(3)
        >>> control.check(0), control.num_waiting()
        (None, 1)
        """
        with self._lock:
            self.check(num_requests)
            self._num_admitted += num_requests

    def check(self, num_requests: int) -> None:
        """Raise `QueueFullError`, with the numbers, if this many requests cannot be admitted now."""
        waiting = self.num_waiting()
        if self._limit is not None and waiting + num_requests > self._limit:
            waits = "1 request waits" if waiting == 1 else f"{max(0, waiting)} requests wait"
            raise QueueFullError(
                f"{waits} and max_num_waiting is {self._limit}: "
                f"{num_requests} more {'does' if num_requests == 1 else 'do'} not fit"
            )
