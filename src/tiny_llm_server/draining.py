"""What the log says while the server drains: how many requests are left, and for how long they may run."""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

LOG = logging.getLogger("uvicorn.error")
CHECK_SECONDS = 0.1
REPEAT_SECONDS = 5.0  # between two lines while the number of requests stays the same


class DrainReport:
    """Logs how many requests are left, when the number changes and every few seconds.

    num_left: returns the number. grace: seconds that the requests have; None: as many as they need.
    """

    def __init__(self, num_left: Callable[[], int], grace: float | None) -> None:
        self._num_left = num_left
        self._deadline = None if grace is None else monotonic() + grace
        self._grace = grace
        self._last = 0  # the number that the last line named

    async def run(self) -> None:
        """Log until no request is left, or until cancelled."""
        next_line = 0.0
        while (left := self._num_left()) > 0:
            if left != self._last or monotonic() >= next_line:
                self._last, next_line = left, monotonic() + REPEAT_SECONDS
                LOG.info("%s", draining_line(left, self._seconds_left()))
            await asyncio.sleep(CHECK_SECONDS)

    def finish(self) -> None:
        """Log how draining ended."""
        seconds = self._seconds_left()
        if seconds is not None and seconds <= 0 and self._last:
            LOG.info(
                "The %g seconds of --grace are over: %s aborted", self._grace, counted(self._last, "request")
            )
        else:
            LOG.info("No requests are left")

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else self._deadline - monotonic()


def draining_line(num_left: int, seconds: float | None) -> str:
    """`Draining: 2 requests left, for at most 30 s. Press Ctrl-C again to stop now.`"""
    limit = "" if seconds is None else f", for at most {max(0.0, seconds):.0f} s"
    return f"Draining: {counted(num_left, 'request')} left{limit}. Press Ctrl-C again to stop now."


def counted(count: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
