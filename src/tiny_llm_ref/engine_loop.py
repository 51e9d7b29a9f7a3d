"""The engine's thread, which owns every array: an iteration runs tasks, makes one step, delivers its events.

A request is what a client submits, with an id. It has `n` completions, each of which is a sequence in the
core, with a `seq_id` of its own. In a step a sequence gives an output: one token. Here the output becomes an
event: the text that it adds. A completion ends with a finish_reason, the request's last event has a `usage`.

Listeners are callbacks: `_outbox` keeps the events of each, and `_outbox.deliver()` calls it with their list;
it returns the listeners that raised. Knows nothing of the callers: tasks come through an inbox.
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

STEPS_KEPT = 256  # whose times are kept


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: in the core, and in making text of its tokens."""

    core: float
    text: float


class ActiveRequest(NamedTuple):
    """A request that has not ended, and the callback that gets its events."""

    request: Request
    listener: Listener


class EngineLoop:
    """Serves requests in its own thread. Other threads may read `stats`, `step_times` and `refusal` only.

    active: by request id, the requests that have not ended: those that the core works on for a listener.
    refusal: makes the error that every new request is refused with; None: new requests are taken.
    """

    def __init__(self, inbox: Inbox, admission: AdmissionControl) -> None:
        self.core: EngineCore
        self.stats: EngineStats
        self.active: dict[str, ActiveRequest] = {}
        self.step_times: deque[StepTime] = deque(maxlen=STEPS_KEPT)
        self.refusal: Refusal | None = None
        self._inbox = inbox
        self._admission = admission
        self._outbox = Outbox()  # events that are not delivered yet
        self._num_seen = 0  # requests that have come to `add` so far, accepted or refused
        self._is_crowded = False  # the last step left a request waiting
        self._drained: list[Future[None]] = []  # done when no request is active any more
        self._deadline = math.inf  # a moment of `time.monotonic()`: then all active requests are cancelled
        self._stopping = False
        self._watch: BlockWatch | None = None
        self._watchers: list[PoolListener] = []

    # Tasks: other threads post them to the inbox, and they run between two steps.

    def begin(self, make_core: Callable[[], EngineCore]) -> None:
        """Make the core: the first task. Raises what `make_core` raises; then the thread ends."""
        self._stopping = True
        self.core = make_core()
        self._stopping = False
        self._publish()

    def add(self, requests: Seq[Request], listener: Listener) -> None:
        """Queue requests in the core, all of them or none; then all are active, with this listener.

        `request.begin(self.core)` queues one request, or raises: ValueError for an empty prompt,
        `RequestTooLargeError`, `QueueFullError`, `DuplicateRequestError` for an id in use. Whatever is raised
        (a BaseException counts too), the requests of this call that had begun before the one that raised are
        cancelled in the core, no others (an id in use belongs to another request), and the error is raised
        again. Where `self.refusal` is set, the error that it makes is raised before any request begins.

        Accepted or refused (by `refusal` too), the requests are added to `_num_seen`, and `_publish` shows
        it: until then admission control counts them as waiting.

        >>> from unittest.mock import Mock
        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.core = EngineCore(PagedBatchManager(8, 4, 2), ())
        >>> loop.add([Mock(request_id="a"), Mock(request_id="b")], listener=print)
        >>> list(loop.active)
        ['a', 'b']
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
        """End requests now: their memory is free again, and their listeners get their last events.

        A cancelled request is active no more and is cancelled in the core. Its last events go to `_outbox`,
        for its listener, and are delivered at the end of the iteration: those that `request.abort()` returns,
        one with finish_reason "abort" for each completion that has not ended. Ids of unknown and of ended
        requests are ignored. At the end `_publish` shows the free capacity to other threads.

        >>> from unittest.mock import Mock
        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.core = EngineCore(PagedBatchManager(8, 4, 2), ())
        >>> loop.active["a"] = ActiveRequest(Mock(abort=lambda: ["the last event"]), print)
        >>> loop.cancel(["a", "a", "unknown"]); loop._deliver()
        ['the last event']
        """
        for request_id in request_ids:
            active = self.active.pop(request_id, None)
            if active is not None:
                self._outbox.add(active.listener, *active.request.abort())
                self.core.cancel(request_id)
        self._publish()

    def forget(self, requests: Seq[Request]) -> None:
        """Cancel these very requests. Another request that has got the id of an ended one goes on."""
        known = [(request, self.active.get(request.request_id)) for request in requests]
        self.cancel([one.request_id for one, active in known if active is not None and active.request is one])

    # A step.

    def take_output(self, output: TokenOutput) -> None:
        """Give one token to its request, and put the event that it makes into `_outbox`.

        `request.push(output)` returns the event. Three things may follow:

        - The event has a finish_reason and the output has none: a stop string in the text has ended this
          completion. The core does not know that yet: `core.finish(output.seq_id)` ends it before the next
          step. Where the output has a finish_reason, the core has ended it already.
        - The event has a `usage`: it is the request's last, and the request is active no more.
        - `push` or `finish` raises, whatever it is (a tokenizer written in Rust may raise a BaseException):
          the event is dropped, so put the event into `_outbox` last, and only this request fails. It is
          cancelled in the core, and `fail_request` tells its listener.

        Ignored: an output whose request is not active (it failed earlier in this step, or was added to the
        core directly), or is not a `RequestState`: a beam search has no outputs.

        >>> from unittest.mock import Mock
        >>> loop, request = EngineLoop(Inbox(), AdmissionControl(None, 8)), Mock(spec=RequestState)
        >>> request.push.return_value = Mock(text="yes", finish_reason=None, usage=None)
        >>> loop.active["a"] = ActiveRequest(request, lambda events: print(events[0].text))
        >>> loop.take_output(Mock(request_id="a", finish_reason=None)); loop._deliver()
        yes
        """
        active = self.active.get(output.request_id)
        if active is None or not isinstance(active.request, RequestState):
            return
        try:
            event = active.request.push(output)
            if event.finish_reason is not None and output.finish_reason is None:
                self.core.finish(output.seq_id)
        except BaseException as error:  # whatever a tokenizer raised: text belongs to its request only
            self.core.cancel(output.request_id)
            self.fail_request(output.request_id, error)
            return
        self._outbox.add(active.listener, event)
        if event.usage is not None:
            del self.active[output.request_id]

    def fail_request(self, request_id: str, error: BaseException) -> None:
        """Make a request active no more; its listener gets a `RequestFailedError`. Ignores other ids."""
        if (failed := self.active.pop(request_id, None)) is None:
            return
        told = RequestFailedError(f"request {request_id!r} has failed: {described(error)}", request_id)
        told.__cause__ = error
        self._outbox.add(failed.listener, told)

    def step(self) -> None:
        """Run one step of the core, and pass on what it gave.

        `core.step()` returns a list of outputs, one token each, and `take_output` handles one. Requests that
        failed in the step have none: `_take_failures` handles these, which come by `core.take_failures()`.
        Beam searches that have ended have none either, and are left to `_end_searches`.

        Last comes `_note_step` with a `StepTime`: the seconds in `core.step`, and those after it until here,
        by `time.perf_counter()`. What `core.step` raises is not caught: the fault is the engine's.

        >>> from unittest.mock import Mock
        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.core = EngineCore(PagedBatchManager(8, 4, 2), ())
        >>> loop.active["a"] = ActiveRequest(Mock(), print)
        >>> loop.core.take_failures = lambda: [("a", ArithmeticError("broken"))]
        >>> loop.step(); loop._deliver()
        [RequestFailedError("request 'a' has failed: broken")]
        """
        start = perf_counter()
        outputs = self.core.step()
        computed = perf_counter()
        for output in outputs:
            self.take_output(output)
        self._take_failures()
        self._end_searches()
        self._note_step(StepTime(computed - start, perf_counter() - computed))

    def _take_failures(self) -> None:
        """Fail the requests that the core has ended with an error in this step.

        Not a part of `step`: an error refers to the frame of `step`. If a variable of `step` referred to the
        error, both would stay in memory.
        """
        for request_id, error in self.core.take_failures():
            self.fail_request(request_id, error)

    def _end_searches(self) -> None:
        """Put the only event of each beam search that has ended into `_outbox`."""
        for request_id in self.core.take_ended_searches():
            ended = self.active.pop(request_id, None)
            if ended is not None and isinstance(ended.request, SearchState):
                self._outbox.add(ended.listener, *ended.request.end())

    def _note_step(self, times: StepTime) -> None:
        """After a step: keep its times, and publish how full the engine is."""
        self.step_times.append(times)
        self._is_crowded = True  # if any request waits: this step has passed it over
        self._publish()
        assert self.core.has_work or not self.active, "a request has ended without its last event"

    # The loop.

    def run_once(self) -> None:
        """One iteration: run the tasks that were posted, make a step, deliver what came of both.

        The tasks come first, all of them (`_inbox.run(wait=...)`). Only if no request is active, wait for a
        task: a waiting thread costs nothing. Then, if `time.monotonic()` has reached `_deadline`, every
        active request is cancelled: a task may have set the deadline. There is one `step`, if a request is
        active and no task has set `_stopping`; what it raises is not caught, and ends the thread.
        `_tell_watchers` shows what has changed in the pool, and `_deliver` calls the listeners, both in every
        iteration: a cancelled request has its last event without a step. If no request is active after that,
        `_end_drains(None)` ends all drains: a drain is over when its last events have been delivered.

        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> answer = loop._inbox.post(lambda: "a task has run")
        >>> loop.run_once()
        >>> answer.result()
        'a task has run'
        """
        self._inbox.run(wait=not self.active)
        if monotonic() >= self._deadline:
            self.cancel(list(self.active))
        if self.active and not self._stopping:
            self.step()
        self._tell_watchers()
        self._deliver()
        if not self.active:
            self._end_drains(None)

    def run(self) -> None:
        """The thread: iterations until a task calls `stop`. The first task must be `begin`.

        Whatever is raised, every client that waits is told.
        """
        try:
            while not self._stopping:
                self.run_once()
            if self.active:
                self.cancel([*self.active])
            self._end(None)
        except BaseException as error:  # unforeseen, and no client may wait for ever
            self._end(error)

    # The end, which tasks ask for as well.

    def drain(self, timeout: float | None, drained: Future[None]) -> None:
        """Refuse new requests from now on; `drained` is done when none is active any more.

        New requests get the error that `draining` makes (`self.refusal`); a refusal that is there already
        stays. `run_once` ends the futures in `_drained`. Requests that are active after `timeout` seconds are
        cancelled then (`_deadline`, a moment of `time.monotonic()`); of several drains the earliest deadline
        counts. None: this drain has no deadline. A timeout of 0 or below: at once, in this iteration.

        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.drain(timeout=30.0, drained=Future())
        >>> loop.refusal()
        EngineStoppingError('the engine is draining: it takes no more requests')
        """
        self.refusal = self.refusal or draining
        self._drained.append(drained)
        if timeout is not None:
            self._deadline = min(self._deadline, monotonic() + timeout)

    def stop(self) -> None:
        """Let this iteration be the last, without a step."""
        self._stopping = True

    def free_core(self) -> None:
        """Free the core, with the KV pool. Only for a thread that has ended."""
        self._watch = None
        vars(self).pop("core", None)  # absent if it could not be made

    def _end(self, error: BaseException | None) -> None:
        """Refuse all new requests and tasks, and end the active ones; error: what the thread has died of."""
        self.refusal = refusal = stopped if error is None else partial(dead, error)
        self._inbox.close(refusal)
        for active in self.active.values():
            self._outbox.add(active.listener, refusal())
        self.active.clear()
        self._outbox.deliver()
        self._end_drains(None if error is None else refusal())

    def _end_drains(self, error: Exception | None) -> None:
        """Every drain is over; error: what the thread has died of, None where all requests have ended."""
        for drained in self._drained:
            if error is None:
                resolve(drained, None)
            else:
                fail(drained, error)
        self._drained.clear()

    # Watchers of the pool.

    def watch(self, watcher: PoolListener) -> None:
        """Show a watcher what is in the pool, and from now on what changes. ValueError without a pool."""
        if not isinstance(self.core.manager, PagedBatchManager):
            raise ValueError("only batching='paged' has blocks to watch")
        self._tell_watchers()  # of what came before, which is not this one's
        watch = self._watch or BlockWatch(self.core.manager)
        watcher(watch.so_far())
        self._watch = watch
        self._watchers.append(watcher)

    def unwatch(self, watcher: PoolListener) -> None:
        """Show a watcher nothing more; without any, the pool is not compared."""
        self._watchers = [other for other in self._watchers if other is not watcher]
        self._watch = self._watch if self._watchers else None

    def _tell_watchers(self) -> None:
        """Show what has changed in the pool in this iteration; a watcher that raises is removed."""
        if self._watch is None or (change := self._watch.look()).is_empty:
            return
        for watcher in list(self._watchers):
            try:
                watcher(change)
            except BaseException:  # as a listener's: it must not stop the engine
                self.unwatch(watcher)

    # What leaves the thread.

    def _deliver(self) -> None:
        """Call each listener with its events; cancel the requests of those that raise."""
        lost = {id(listener) for listener in self._outbox.deliver()}
        if lost:
            self.cancel(
                [request_id for request_id, active in self.active.items() if id(active.listener) in lost]
            )

    def _publish(self) -> None:
        """Let other threads, and admission control, see how full the engine is."""
        stats = self.stats = self.core.stats
        waiting, running = stats.num_waiting_requests, stats.num_running
        self._is_crowded = self._is_crowded and waiting > 0
        self._admission.occupancy = Occupancy(self._num_seen, waiting, running, self._is_crowded)
