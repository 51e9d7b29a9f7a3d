"""The engine's thread, which owns every array. An iteration runs tasks, runs one step and delivers events.

A client submits a request, which has an id. A request has `n` completions; each is a sequence in the core,
with a `seq_id`. In a step, a sequence produces an output: one token. Here the output becomes an event: the
text that the token adds. A completion's last event has a finish_reason; the request's last event has a
`usage`.

Listeners are callbacks. `_outbox` collects the events of each listener, and `_outbox.deliver()` calls each
listener with the list of its events; it returns the listeners that raised. Other threads send tasks through
an inbox.
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
from .inbox import Inbox, Refusal, dead_error, draining_error, fail, resolve, stopped_error
from .output_processor import RequestState
from .paged_batch import PagedBatchManager
from .search_state import SearchState
from .token_output import TokenOutput

Request = RequestState | SearchState
PoolListener = Callable[[PoolChange], None]

STEPS_KEPT = 256  # the number of steps whose times are kept


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: in the core, and in turning its tokens into text."""

    core: float
    text: float


class ActiveRequest(NamedTuple):
    """A request that has not ended, and the listener that gets its events."""

    request: Request
    listener: Listener


class EngineLoop:
    """Serves requests in its own thread. Other threads may only read `stats`, `step_times` and `refusal`.

    active: the requests that have not ended and have a listener, by request id. refusal: a function
    that makes the error for a new request; None while the engine takes new requests.
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
        self._num_seen = 0  # requests that have reached `add` so far, accepted or rejected
        self._is_crowded = False  # the last step left a request waiting
        self._drained: list[Future[None]] = []  # futures of `drain`, done when no request is active
        self._deadline = math.inf  # `time.monotonic()` at which all active requests are cancelled
        self._stopping = False
        self._watch: BlockWatch | None = None
        self._watchers: list[PoolListener] = []

    # Tasks: other threads post them to the inbox, and they run between two steps.

    def begin(self, make_core: Callable[[], EngineCore]) -> None:
        """Make the core; this is the first task. If `make_core` raises, so does this, and the thread ends."""
        self._stopping = True
        self.core = make_core()
        self._stopping = False
        self._publish()

    def add(self, requests: Seq[Request], listener: Listener) -> None:
        """Queue requests in the core, all of them or none; then all are active, with this listener.

        If `self.refusal` is set, raise the error that it makes before any request is queued. Otherwise
        `request.begin(self.core)` queues one request, or raises: ValueError for an empty prompt,
        `RequestTooLargeError`, `QueueFullError`, or `DuplicateRequestError` for an id in use. If one raises
        (any BaseException), cancel in the core the requests of this call that were queued before it, and
        raise the error again. Cancel no other request: an id in use belongs to another request.

        In all cases, accepted or rejected, add the number of requests to `_num_seen` and call `_publish`:
        until then admission control counts them as waiting.

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
        """End requests now: free their memory, and send their listeners the last events.

        Remove each request from `active` and cancel it in the core. `request.abort()` returns its last
        events, one with finish_reason "abort" for each unfinished completion; add them to `_outbox` for its
        listener, which gets them at the end of the iteration. Ignore the ids of unknown requests and of
        requests that have ended. At the end call `_publish`, so that other threads see the free capacity.

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
        """Cancel exactly these request objects, not another request that now has the id of an ended one."""
        known = [(request, self.active.get(request.request_id)) for request in requests]
        self.cancel([one.request_id for one, active in known if active is not None and active.request is one])

    # A step.

    def take_output(self, output: TokenOutput) -> None:
        """Pass one token to its request, and add the resulting event to `_outbox`.

        `request.push(output)` returns the event. Handle three cases:

        - The event has a finish_reason but the output has none: a stop string in the text has ended this
          completion, or its text cannot be decoded. The core does not know that yet, so call
          `core.finish(output.seq_id)`. If the output has a finish_reason, even a different one, the core has
          already ended the sequence.
        - The event has a `usage`: it is the request's last event. Remove the request from `active`.
        - `push` or `finish` raises (any BaseException: a tokenizer written in Rust may raise one). Only this
          request fails: drop the event, cancel the request in the core, and call `fail_request`, which
          notifies its listener. Therefore add the event to `_outbox` last.

        Text that cannot be decoded may lead to the first case or to the third; `push` decides. As long as
        another completion of the request has not failed, `push` returns an event with the reason "error". If
        there is no other, or all others have failed, it raises.

        Ignore an output whose request is not active (it failed earlier in this step, or was added to the core
        directly) or is not a `RequestState` (a beam search has no outputs).

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
        except BaseException as error:  # from the tokenizer: only this request fails
            self.core.cancel(output.request_id)
            self.fail_request(output.request_id, error)
            return
        self._outbox.add(active.listener, event)
        if event.usage is not None:
            del self.active[output.request_id]

    def fail_request(self, request_id: str, error: BaseException) -> None:
        """Remove a request from `active`; its listener gets a `RequestFailedError`. Ignores other ids."""
        if (failed := self.active.pop(request_id, None)) is None:
            return
        failure = RequestFailedError(f"request {request_id!r} has failed: {described(error)}", request_id)
        failure.__cause__ = error
        self._outbox.add(failed.listener, failure)

    def step(self) -> None:
        """Run one step of the core, and handle its results.

        1. `core.step()` returns a list of outputs, one token each; pass each to `take_output`.
        2. Call `_take_failures` and `_end_searches`, in any order, before or after the outputs: requests that
           failed in the step have no output, and beam searches that have ended have none either.
        3. After all of these, call `_note_step` with a `StepTime`: the seconds in `core.step`, and those from
           its end until now, by `time.perf_counter()`.

        Do not catch errors of `core.step`: they are a fault of the engine, not of a request.

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
        """Fail the requests that the core has ended with an error in this step (`core.take_failures()`).

        This is not part of `step`, because an error's traceback refers to the frame of `step`: if a variable
        of `step` referred to the error, both would stay in memory.
        """
        for request_id, error in self.core.take_failures():
            self.fail_request(request_id, error)

    def _end_searches(self) -> None:
        """Add the only event of each beam search that has ended to `_outbox`."""
        for request_id in self.core.take_ended_searches():
            ended = self.active.pop(request_id, None)
            if ended is not None and isinstance(ended.request, SearchState):
                self._outbox.add(ended.listener, *ended.request.end())

    def _note_step(self, times: StepTime) -> None:
        """After a step: store its times, and publish how full the engine is."""
        self.step_times.append(times)
        self._is_crowded = True  # if a request still waits, this step had no capacity for it
        self._publish()
        assert self.core.has_work or not self.active, "a request has ended without its last event"

    # The loop.

    def run_once(self) -> None:
        """One iteration: run the posted tasks, run a step, and deliver the events of both. In this order:

        1. Run all posted tasks (`_inbox.run(wait=...)`). Wait for a task only if no request is active: a
           thread that waits costs nothing.
        2. If `time.monotonic()` has reached `_deadline`, cancel every active request. (This comes after the
           tasks, because a task may set the deadline.)
        3. Call `step` once, if a request is active and no task has set `_stopping`. Do not catch what it
           raises: that ends the thread.
        4. Call `_tell_watchers`, for changes in the pool, and then `_deliver`, which calls the listeners:
           when a client gets an event, the watchers know the step that made it. Call both in every
           iteration: a cancelled request gets its last event without a step.
        5. If no request is active now, `_end_drains(None)` ends all drains: a drain is over when the last
           events have been delivered.

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
        """The body of the thread: iterations until a task calls `stop`. The first task must be `begin`.

        If an iteration raises, every waiting client gets the error.
        """
        try:
            while not self._stopping:
                self.run_once()
            if self.active:
                self.cancel([*self.active])
            self._end(None)
        except BaseException as error:  # unexpected, and no client may wait forever
            self._end(error)

    # Draining and stopping; `drain` and `stop` are tasks too.

    def drain(self, timeout: float | None, drained: Future[None]) -> None:
        """Reject new requests from now on; `drained` is done once no request is active.

        Set `self.refusal` to `draining_error`, unless a refusal is already set. Append `drained` to
        `_drained`, whose futures `run_once` completes. After `timeout` seconds, requests that are still
        active are cancelled: set `_deadline` to that time, on the clock of `time.monotonic()`. If there are
        several drains, the earliest deadline counts. A timeout of None sets no deadline; one of 0 or less
        cancels in this iteration.

        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.drain(timeout=30.0, drained=Future())
        >>> loop.refusal()
        EngineStoppingError('the engine is shutting down and accepts no more requests')
        """
        self.refusal = self.refusal or draining_error
        self._drained.append(drained)
        if timeout is not None:
            self._deadline = min(self._deadline, monotonic() + timeout)

    def stop(self) -> None:
        """Make this iteration the last one, without a step."""
        self._stopping = True

    def free_core(self) -> None:
        """Free the core, with the KV pool. Only for a thread that has ended."""
        self._watch = None
        vars(self).pop("core", None)  # absent if it could not be made

    def _end(self, error: BaseException | None) -> None:
        """Reject new requests and tasks and end the active ones. error: what ended the thread, if any."""
        self.refusal = refusal = stopped_error if error is None else partial(dead_error, error)
        self._inbox.close(refusal)
        for active in self.active.values():
            self._outbox.add(active.listener, refusal())
        self.active.clear()
        self._outbox.deliver()
        self._end_drains(None if error is None else refusal())

    def _end_drains(self, error: Exception | None) -> None:
        """Complete the future of every drain, with `error` if there is one."""
        for drained in self._drained:
            if error is None:
                resolve(drained, None)
            else:
                fail(drained, error)
        self._drained.clear()

    # Watchers of the pool.

    def watch(self, watcher: PoolListener) -> None:
        """Show a watcher the content of the pool, and its changes from now on. ValueError without a pool."""
        if not isinstance(self.core.manager, PagedBatchManager):
            raise ValueError("only batching='paged' has blocks to watch")
        self._tell_watchers()  # the others first: the new watcher's snapshot has these changes already
        watch = self._watch or BlockWatch(self.core.manager)
        watcher(watch.snapshot())
        self._watch = watch
        self._watchers.append(watcher)

    def unwatch(self, watcher: PoolListener) -> None:
        """Remove a watcher. Without watchers, changes in the pool are not tracked."""
        self._watchers = [other for other in self._watchers if other is not watcher]
        self._watch = self._watch if self._watchers else None

    def _tell_watchers(self) -> None:
        """Show watchers the changes of this iteration in the pool; a watcher that raises is removed."""
        if self._watch is None or (change := self._watch.poll()).is_empty:
            return
        for watcher in list(self._watchers):
            try:
                watcher(change)
            except BaseException:  # a watcher's error must not stop the engine
                self.unwatch(watcher)

    # Events and statistics for other threads.

    def _deliver(self) -> None:
        """Call each listener with its events; cancel the requests of listeners that raise."""
        lost = {id(listener) for listener in self._outbox.deliver()}
        if lost:
            self.cancel(
                [request_id for request_id, active in self.active.items() if id(active.listener) in lost]
            )

    def _publish(self) -> None:
        """Show other threads and admission control how full the engine is."""
        stats = self.stats = self.core.stats
        waiting, running = stats.num_waiting_requests, stats.num_running
        self._is_crowded = self._is_crowded and waiting > 0
        self._admission.occupancy = Occupancy(self._num_seen, waiting, running, self._is_crowded)
