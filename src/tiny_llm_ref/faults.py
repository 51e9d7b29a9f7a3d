"""Find the request that made a step fail: retry the requests of the step one by one.

Scheduling never changes the answer, so a request that is computed again on its own gets the same tokens. The
kind of error matters only for a `StuckRequestError`, which names its request.
"""

from collections import deque
from collections.abc import Container
from typing import NamedTuple

from .batch_manager import BatchManager
from .errors import StuckRequestError


class Failure(NamedTuple):
    """A request that has ended with an error."""

    request_id: str
    error: BaseException


class FaultIsolation:
    """Undoes failed steps of a batch manager, and retries the suspects one by one: any that fails again ends.

    Requests that fail only together are ended one at a time, the last first, until the others succeed. A step
    that fails before it has anything to compute is blamed on the request that would start next: otherwise it
    would be repeated forever.
    """

    def __init__(self, manager: BatchManager) -> None:
        self._manager = manager
        self._suspects: deque[str] = deque()
        self._isolated: str | None = None  # the suspect that runs alone
        self._have_retried = False  # the requests of the last failed step were retried one by one

    def prepare_step(self) -> None:
        """Let only the next suspect run; without suspects, let all requests run."""
        if not self._suspects or self._isolated is not None:
            return
        self._manager.recover()
        while self._isolated is None and self._suspects:
            request_id = self._suspects.popleft()
            self._isolated = request_id if self._manager.has_request(request_id) else None
        self._manager.isolate(self._isolated)

    def find_culprit(self, error: BaseException) -> str | None:
        """Undo a step that raised; return the id of the request that must end, or None if not known yet."""
        computing = self._manager.recover() or self._next_to_start()
        if isinstance(error, StuckRequestError):
            return error.request_id
        if self._isolated is not None:
            culprit = self._isolated
            self._end_isolation()
            return culprit
        if len(computing) == 1 or (computing and self._have_retried):
            self._have_retried = False
            return computing[-1]
        self._suspects, self._have_retried = deque(computing), True
        return None

    def step_succeeded(self, request_ids: Container[str]) -> None:
        """Record that a step has computed the last known tokens of these requests without an error."""
        if self._isolated is None:
            self._have_retried = False
        elif self._isolated in request_ids or not self._manager.has_request(self._isolated):
            self._end_isolation()

    def _next_to_start(self) -> list[str]:
        """The request of the first waiting sequence; empty if none waits."""
        waiting = self._manager.waiting
        return [waiting[0].request_id] if waiting else []

    def _end_isolation(self) -> None:
        self._isolated = None
        self._manager.isolate(None)
