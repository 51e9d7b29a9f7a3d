"""What runs in the engine's thread, which owns every array: tasks first, then one step, then what it gave.

A step's tokens become text here, and every listener gets those of its own requests. Knows nothing of the
callers: tasks come through an inbox, and what is ready goes to listeners.
"""

import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import NamedTuple

from .admission_control import AdmissionControl, Occupancy
from .block_events import BlockWatch, PoolChange
from .delivery import Listener, Outbox
from .engine_core import EngineCore, EngineStats
from .errors import RequestFailedError, described
from .inbox import Inbox, Refusal, dead, draining, fail, resolve, stopped
from .output_processor import RequestState
from .paged_batch import PagedBatchManager
from .search_state import SearchState
from .token_output import TokenOutput

Request = RequestState | SearchState
PoolListener = Callable[[PoolChange], None]

STEPS_KEPT = 256  # whose times are remembered


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: in the core, and in making text of its tokens."""

    core: float
    text: float


class ActiveRequest(NamedTuple):
    """A request that has not ended, and who listens to it."""

    request: Request
    listener: Listener


class EngineLoop:
    """Serves requests in its thread. Others may read `stats`, `step_times` and `refusal`, and call nothing.

    Invariant: between two iterations `active` has, by id, the requests that the core works on for somebody.
    refusal: makes the error that new requests are refused with, whatever they are; None: they are taken.
    """

    def __init__(self, inbox: Inbox, admission: AdmissionControl) -> None:
        self.core: EngineCore
        self.stats: EngineStats
        self.active: dict[str, ActiveRequest] = {}
        self.step_times: deque[StepTime] = deque(maxlen=STEPS_KEPT)
        self.refusal: Refusal | None = None
        self._inbox = inbox
        self._admission = admission
        self._outbox = Outbox()
        self._num_seen = 0
        self._is_crowded = False
        self._drained: list[Future[None]] = []
        self._deadline = math.inf
        self._stopping = False
        self._watch: BlockWatch | None = None
        self._watchers: list[PoolListener] = []

    def run(self) -> None:
        """The thread: one iteration after another until it is told to stop. The first task must be `begin`.

        Whatever is raised, everybody who waits is told.
        """
        try:
            while not self._stopping:
                self.run_once()
            if self.active:
                self.cancel([*self.active])
            self._end(None)
        except BaseException as error:  # nobody foresaw it, and nobody may hang
            self._end(error)

    def run_once(self) -> None:
        """Do what was asked for, then one step for those who are served. Waits where there is neither.

        All that came of it is delivered at the end. Where nobody is active then, those who drain are told.
        """
        self._inbox.run(wait=not self.active)
        if monotonic() > self._deadline:
            self.cancel(list(self.active))
        if self.active and not self._stopping:
            self.step()
        self._tell_watchers()
        self._deliver()
        if not self.active:
            self._end_drains(None)

    def step(self) -> None:
        """One step of the core: tokens go to the requests that are active, and their events to the listeners.

        A completion that its text ends is finished in the core before the next step. A request whose push
        raises fails alone; its listener, and those of the core's failures, get `RequestFailedError`.
        Whoever has ended is active no more. Tokens of requests that are not active are ignored.
        """
        start = perf_counter()
        outputs = self.core.step()
        computed = perf_counter()
        for output in outputs:
            self._take(output)
        self._take_failures()
        self._end_searches()
        self.step_times.append(StepTime(computed - start, perf_counter() - computed))
        self._is_crowded = True  # if anybody waits: he has been passed over
        self._publish()
        assert self.core.has_work or not self.active, "a request has ended, and nobody was told"

    # Tasks.

    def begin(self, make_core: Callable[[], EngineCore]) -> None:
        """Make the core. Raises what that raises; then the thread ends."""
        self._stopping = True
        self.core = make_core()
        self._stopping = False
        self._publish()

    def add(self, requests: Seq[Request], listener: Listener) -> None:
        """Queue requests in the core, all or none; `listener` is called with what they give.

        Raises what `refusal` makes, or what the core's door raises; then none is queued. All of them count as
        seen, refused or not: until then they count as waiting.
        """
        self._num_seen += len(requests)
        queued: list[Request] = []
        try:
            if self.refusal is not None:
                raise self.refusal()
            for request in requests:
                request.begin(self.core)
                queued.append(request)
        except BaseException:
            for request in queued:
                self.core.cancel(request.request_id)
            raise
        finally:
            self._publish()
        self.active.update({request.request_id: ActiveRequest(request, listener) for request in requests})

    def cancel(self, request_ids: Seq[str]) -> None:
        """End requests now: their pages go back, and their listeners get last events, with reason "abort".

        Ids of requests that have ended, or never were, are ignored.
        """
        for request_id in request_ids:
            active = self.active.pop(request_id, None)
            if active is not None:
                self._outbox.add(active.listener, *active.request.abort())
                self.core.cancel(request_id)
        self._publish()

    def forget(self, requests: Seq[Request]) -> None:
        """Cancel these very requests; others that have got their ids since go on."""
        known = [(request, self.active.get(request.request_id)) for request in requests]
        self.cancel([one.request_id for one, active in known if active is not None and active.request is one])

    def drain(self, timeout: float | None, drained: Future[None]) -> None:
        """Refuse new requests from now on. `drained` is done when all others have ended.

        Those that have not after `timeout` seconds are cancelled; None: they get all the time that they need.
        """
        self.refusal = self.refusal or draining
        self._drained.append(drained)
        if timeout is not None:
            self._deadline = min(self._deadline, monotonic() + timeout)

    def stop(self) -> None:
        """Let this iteration be the last, without a step."""
        self._stopping = True

    def watch(self, watcher: PoolListener) -> None:
        """Tell somebody what is in the pool, and then what changes in it. ValueError where there is none."""
        if not isinstance(self.core.manager, PagedBatchManager):
            raise ValueError("only batching='paged' has blocks to watch")
        self._tell_watchers()  # of what came before, which is not this one's
        watch = self._watch or BlockWatch(self.core.manager)
        watcher(watch.so_far())
        self._watch = watch
        self._watchers.append(watcher)

    def unwatch(self, watcher: PoolListener) -> None:
        """Tell him no more; where nobody is left, nothing is looked at."""
        self._watchers = [other for other in self._watchers if other is not watcher]
        self._watch = self._watch if self._watchers else None

    # What a step gave.

    def _take(self, output: TokenOutput) -> None:
        """Give a token to its request; a stop string that it completes ends the sequence here."""
        active = self.active.get(output.request_id)
        if active is None or not isinstance(active.request, RequestState):
            return  # it has failed in this step, or somebody steps the core by hand
        try:
            event = active.request.push(output)
            if event.finish_reason is not None and output.finish_reason is None:
                self.core.finish(output.seq_id)
        except BaseException as error:  # whatever a tokenizer raised: text belongs to its request only
            self.core.cancel(output.request_id)
            self._fail(output.request_id, error)
            return
        self._outbox.add(active.listener, event)
        if event.usage is not None:
            del self.active[output.request_id]

    def _take_failures(self) -> None:
        for request_id, error in self.core.take_failures():
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: BaseException) -> None:
        """Tell the listener of a request that it has ended with an error."""
        active = self.active.pop(request_id, None)
        if active is not None:
            failed = RequestFailedError(f"request {request_id!r} has failed: {described(error)}", request_id)
            failed.__cause__ = error
            self._outbox.add(active.listener, failed)

    def _end_searches(self) -> None:
        for request_id in self.core.take_ended_searches():
            ended = self.active.pop(request_id, None)
            if ended is not None and isinstance(ended.request, SearchState):
                self._outbox.add(ended.listener, *ended.request.end())

    def _tell_watchers(self) -> None:
        """What has changed in the pool in this iteration; who raises is told no more."""
        if self._watch is None or (change := self._watch.look()).is_empty:
            return
        for watcher in list(self._watchers):
            try:
                watcher(change)
            except BaseException:  # as a listener's: it must not stop the engine
                self.unwatch(watcher)

    def _deliver(self) -> None:
        """Hand over what is ready; the requests of listeners that cannot be reached are cancelled."""
        lost = {id(listener) for listener in self._outbox.deliver()}
        if lost:
            self.cancel(
                [request_id for request_id, active in self.active.items() if id(active.listener) in lost]
            )

    # Beginning and end.

    def _publish(self) -> None:
        """Let other threads see how full it is."""
        stats = self.stats = self.core.stats
        waiting, running = stats.num_waiting_requests, stats.num_running
        self._is_crowded = self._is_crowded and waiting > 0
        self._admission.occupancy = Occupancy(self._num_seen, waiting, running, self._is_crowded)

    def _end(self, error: BaseException | None) -> None:
        """Refuse whatever comes, and let nobody wait: with an error everybody hears of it."""
        self.refusal = refusal = stopped if error is None else partial(dead, error)
        self._inbox.close(refusal)
        for active in self.active.values():
            self._outbox.add(active.listener, refusal())
        self.active.clear()
        self._outbox.deliver()
        self._end_drains(None if error is None else refusal())

    def _end_drains(self, error: Exception | None) -> None:
        for drained in self._drained:
            if error is None:
                resolve(drained, None)
            else:
                fail(drained, error)
        self._drained.clear()
