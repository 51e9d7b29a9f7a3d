"""How many requests may wait: too many are refused at once, in the thread that submits them.

Knows nothing of the engine except the figures that the engine publishes after each task and each step.
"""

from threading import Lock
from typing import NamedTuple

from .errors import QueueFullError


class Occupancy(NamedTuple):
    """How full the engine was when it last published its figures.

    num_seen: requests that have reached the engine's thread so far, accepted or refused. num_waiting:
    requests that wait there. num_running: sequences that run. is_crowded: the last step left a request
    waiting.
    """

    num_seen: int = 0
    num_waiting: int = 0
    num_running: int = 0
    is_crowded: bool = False


class AdmissionControl:
    """Counts the requests that wait, from any thread and without asking the engine's.

    limit: requests that may wait at once; None: any number. max_num_seqs: sequences that may run at once.
    occupancy: the latest figures; the engine's thread replaces them as a whole.
    """

    def __init__(self, limit: int | None, max_num_seqs: int) -> None:
        self.occupancy = Occupancy()
        self._limit = limit
        self._max_num_seqs = max_num_seqs
        self._num_admitted = 0  # requests admitted here so far, seen by the engine or not
        self._lock = Lock()

    def num_waiting(self) -> int:
        """Requests that wait now; below 0: so many more could start in the next step.

        The sum of the requests that wait in the engine and of those that were admitted here and that the
        engine has not seen yet, less the free places; the result may be negative. Free places are
        `max_num_seqs` less those that run, at least 0, and 0 while `is_crowded` (why it may be: the pool has
        no blocks for more sequences, or the requests that wait already take the places). Read
        `self.occupancy` once: the engine may replace it between two reads.

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
        """Count requests as admitted, all of them or none.

        Raises `QueueFullError` as `check` does, and then counts nothing. Any thread may call it. Looking and
        counting are one operation under `_lock`: of two threads that ask for the last place at the same
        moment, one must be refused.

        >>> control = AdmissionControl(limit=1, max_num_seqs=2)
        >>> control.admit(3)
        >>> control.check(0), control.num_waiting()
        (None, 1)
        """
        with self._lock:
            self.check(num_requests)
            self._num_admitted += num_requests

    def check(self, num_requests: int) -> None:
        """Raise `QueueFullError`, with the figures, where so many requests could not be admitted now."""
        waiting = self.num_waiting()
        if self._limit is not None and waiting + num_requests > self._limit:
            raise QueueFullError(
                f"{max(0, waiting)} requests wait and {self._limit} may: "
                f"no room for {num_requests} more (max_num_waiting)"
            )
