"""What the log says while the server drains: how many requests are left, and for how long they may run."""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from tiny_llm_checkpoints.sizes import counted

LOG = logging.getLogger("uvicorn.error")
CHECK_SECONDS = 0.1
REPEAT_SECONDS = 5.0  # between two lines while the number of requests stays the same


class DrainReport:
    """Logs how many requests are left, when the number changes and every few seconds.

    num_left: returns the number. grace: seconds that the requests have; None: as many as they need.
    """

    def __init__(self, num_left: Callable[[], int], grace: float | None) -> None:
        self._num_left = num_left
        self._grace = grace
        self._deadline = None if grace is None else monotonic() + grace
        self._unfinished = num_left()  # as counted before the deadline

    async def run(self) -> None:
        """Log until no request is left, or until cancelled."""
        logged, next_line = 0, 0.0
        while (left := self._num_left()) > 0:
            self._unfinished = left
            if left != logged or monotonic() >= next_line:
                logged, next_line = left, monotonic() + REPEAT_SECONDS
                LOG.info("%s", draining_line(left, self._seconds_left()))
            await asyncio.sleep(CHECK_SECONDS)
        if not self._is_overdue():  # after the deadline, none is left because the rest was aborted
            self._unfinished = 0

    def finish(self) -> None:
        """Log how draining ended."""
        if self._is_overdue() and self._unfinished:
            aborted = counted(self._unfinished, "request")
            LOG.info("The grace period of %g s is over: %s aborted", self._grace, aborted)
        else:
            LOG.info("No requests are left")

    def _is_overdue(self) -> bool:
        seconds = self._seconds_left()
        return seconds is not None and seconds <= 0

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else self._deadline - monotonic()


def draining_line(num_left: int, seconds: float | None) -> str:
    """`Draining: 2 requests left, for at most 30 s. Press Ctrl-C again to stop now.`"""
    limit = "" if seconds is None else f", for at most {max(0.0, seconds):.0f} s"
    return f"Draining: {counted(num_left, 'request')} left{limit}. Press Ctrl-C again to stop now."
