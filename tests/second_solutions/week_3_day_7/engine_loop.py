"""The engine's thread, which owns every array: an iteration runs tasks, makes one step, delivers its events.

A step's tokens become text here, and each listener, a callback, gets the events of its own requests. Knows
nothing of the callers: tasks come through an inbox, and events go to listeners.
"""

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from time import monotonic, perf_counter

from .delivery import Listener
from .inbox import draining
from .output_processor import RequestState
from .token_output import TokenOutput


class EngineLoop:
    def add(self, requests: Seq[Request], listener: Listener) -> None:
        """Queue requests in the core, all of them or none; then all are active, with this listener.

        `request.begin(self.core)` queues one request, or raises: ValueError for an empty prompt,
        `RequestTooLargeError`, `QueueFullError`, `DuplicateRequestError` for an id in use. Then those of this
        call that were queued before are cancelled in the core, no others (an id in use belongs to another
        request), and the error is raised. Where `self.refusal` is set, the error that it makes is raised
        instead, before any request begins.

        Accepted or refused, the requests are added to `_num_seen`, and `_publish` shows it: until then
        admission control counts them as waiting.

        >>> from unittest.mock import Mock
        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.core = EngineCore(PagedBatchManager(8, 4, 2), ())
        >>> loop.add([Mock(request_id="a"), Mock(request_id="b")], listener=print)
        >>> list(loop.active)
        ['a', 'b']
        """
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
        else:
            for request in requests:
                self.active[request.request_id] = ActiveRequest(request, listener)
        finally:
            self._num_seen += len(requests)
            self._publish()

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
            if active is None:
                continue
            self.core.cancel(request_id)
            self._outbox.add(active.listener, *active.request.abort())
        self._publish()

    def take_output(self, output: TokenOutput) -> None:
        """Give one token to its request, and put the event that it makes into `_outbox`.

        `request.push(output)` returns the event. Three things may follow:

        - The event has a finish_reason and the output has none: a stop string in the text has ended this
          completion. The core does not know that yet: `core.finish(output.seq_id)` ends it before the next
          step. Where the output has a finish_reason, the core has ended it already.
        - The event has a `usage`: it is the request's last, and the request is active no more.
        - `push` or `finish` raises, whatever it is (a tokenizer written in Rust may raise a BaseException):
          only this request fails. It is cancelled in the core, and `fail_request` tells its listener.

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
        except BaseException as error:
            self.core.cancel(output.request_id)
            self.fail_request(output.request_id, error)
            return
        self._outbox.add(active.listener, event)
        if event.usage is not None:
            del self.active[output.request_id]

    def step(self) -> None:
        """Run one step of the core, and pass on what it gave.

        `core.step()` returns a list of outputs, one token each, and `take_output` handles one. Requests that
        failed in the step have none: `_take_failures` handles these, which come by `core.take_failures()`.
        Beam searches that have ended have none either, and are left to `_end_searches`.

        Last comes `_note_step` with a `StepTime`: the seconds in `core.step`, and those after it until here,
        by `perf_counter`. What `core.step` raises is not caught: it is the engine's fault, not a request's.

        >>> from unittest.mock import Mock
        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.core = EngineCore(PagedBatchManager(8, 4, 2), ())
        >>> loop.active["a"] = ActiveRequest(Mock(), print)
        >>> loop.core.take_failures = lambda: [("a", ArithmeticError("broken"))]
        >>> loop.step(); loop._deliver()
        [RequestFailedError("request 'a' has failed: broken")]
        """
        begun = perf_counter()
        outputs = self.core.step()
        stepped = perf_counter()
        for output in outputs:
            self.take_output(output)
        self._take_failures()
        self._end_searches()
        self._note_step(StepTime(stepped - begun, perf_counter() - stepped))

    def run_once(self) -> None:
        """One iteration: run the tasks that were posted, make a step, deliver what came of both.

        The tasks come first, all of them (`_inbox.run(wait=...)`). Only where no request is active, wait for
        one: a waiting thread costs nothing. Then, if `monotonic()` is past `_deadline`, every active request
        is cancelled. There is one `step`, if a request is active and no task has set `_stopping`; what it
        raises is not caught, and ends the thread. `_tell_watchers` shows what has changed in the pool, and
        `_deliver` calls the listeners, both in every iteration: a cancelled request has its last event
        without a step. Where no request is active after that, `_end_drains(None)` ends all drains.

        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> answer = loop._inbox.post(lambda: "a task has run")
        >>> loop.run_once()
        >>> answer.result()
        'a task has run'
        """
        self._inbox.run(wait=not self.active)
        if monotonic() >= self._deadline:
            self.cancel([*self.active])
        if self.active and not self._stopping:
            self.step()
        self._tell_watchers()
        self._deliver()
        if not self.active:
            self._end_drains(None)

    def drain(self, timeout: float | None, drained: Future[None]) -> None:
        """Refuse new requests from now on; `drained` is done when none is active any more.

        New requests get the error that `draining` makes (`self.refusal`); a refusal that is there already
        stays. `run_once` ends the futures in `_drained`. Requests that are active after `timeout` seconds are
        cancelled then (`_deadline`, on the clock of `monotonic`); of several drains the earliest deadline
        counts. None: this drain has no deadline. A timeout of 0 or below: at once, in this iteration.

        >>> loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
        >>> loop.drain(timeout=30.0, drained=Future())
        >>> loop.refusal()
        EngineStoppingError('the engine is draining: it takes no more requests')
        """
        if self.refusal is None:
            self.refusal = draining
        self._drained.append(drained)
        if timeout is not None:
            self._deadline = min(self._deadline, monotonic() + timeout)
