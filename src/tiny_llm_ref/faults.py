"""Who is to blame for a step that raised: the requests that it was to compute are tried one by one.

Scheduling never changes the answer, so a request that is computed again, alone, gets what it would have got.
Knows nothing of what went wrong.
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


class Trials:
    """Undoes failed steps of a batch manager, and runs each suspect alone until one fails or all have passed.

    Several requests that fail only together are thinned out: the last of them is blamed.
    """

    def __init__(self, manager: BatchManager) -> None:
        self._manager = manager
        self._suspects: deque[str] = deque()
        self._on_trial: str | None = None
        self._found_nobody = False

    def begin_step(self) -> None:
        """Let the next suspect run, quite alone, or everybody when there is none left."""
        if not self._suspects or self._on_trial is not None:
            return
        self._manager.recover()
        while self._on_trial is None and self._suspects:
            request_id = self._suspects.popleft()
            self._on_trial = request_id if self._manager.has_request(request_id) else None
        self._manager.isolate(self._on_trial)

    def blame(self, error: BaseException) -> str | None:
        """Undo a step that raised. The request that has to end, or None while several are suspected."""
        computing = self._manager.recover()
        if isinstance(error, StuckRequestError):
            return error.request_id
        if self._on_trial is not None:
            guilty = self._on_trial
            self._end_trial()
            return guilty
        if len(computing) == 1 or (computing and self._found_nobody):
            self._found_nobody = False
            return computing[-1]
        self._suspects, self._found_nobody = deque(computing), True
        return None

    def passed(self, request_ids: Container[str]) -> None:
        """A step has computed the last known tokens of these requests."""
        if self._on_trial is None:
            self._found_nobody = False
        elif self._on_trial in request_ids or not self._manager.has_request(self._on_trial):
            self._end_trial()

    def _end_trial(self) -> None:
        self._on_trial = None
        self._manager.isolate(None)
