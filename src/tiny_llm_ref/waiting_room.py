"""How many requests may wait at once: refused before they cost anything, in whatever thread they come.

Knows nothing of the engine but what it tells after each step.
"""

from threading import Lock
from typing import NamedTuple

from .errors import QueueFullError


class Occupancy(NamedTuple):
    """What the engine saw last: requests that have come in so far, those that wait, sequences that run.

    is_crowded: the last step has left somebody waiting.
    """

    num_seen: int = 0
    num_waiting: int = 0
    num_running: int = 0
    is_crowded: bool = False


class WaitingRoom:
    """limit: requests that may wait at once; None: any number. num_seats: sequences that may run at once.

    A request waits from the moment that it comes, unless a seat is free for it: in a crowd none is, because
    then there are no pages, or those who were left waiting take it.
    """

    def __init__(self, limit: int | None, num_seats: int) -> None:
        self.occupancy = Occupancy()
        self._limit = limit
        self._num_seats = num_seats
        self._num_entered = 0
        self._lock = Lock()

    def enter(self, num_requests: int) -> None:
        """Let requests in, all or none. Raises `QueueFullError` with the figures."""
        with self._lock:
            self.check(num_requests)
            self._num_entered += num_requests

    def check(self, num_requests: int) -> None:
        """Raise `QueueFullError` where so many could not enter now."""
        waiting = self._num_waiting()
        if self._limit is not None and waiting + num_requests > self._limit:
            raise QueueFullError(
                f"{max(0, waiting)} requests wait and {self._limit} may: "
                f"no room for {num_requests} more (max_num_waiting)"
            )

    def _num_waiting(self) -> int:
        """Requests that wait; below 0 where seats are free."""
        seen = self.occupancy
        free = 0 if seen.is_crowded else max(0, self._num_seats - seen.num_running)
        return seen.num_waiting + self._num_entered - seen.num_seen - free
