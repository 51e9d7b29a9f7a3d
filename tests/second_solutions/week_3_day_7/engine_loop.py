"""The engine's thread, which owns every array. An iteration runs tasks, runs one step and delivers events.

A client submits a request, which has an id. A request has `n` completions; each is a sequence in the core,
with a `seq_id`. In a step, a sequence produces an output: one token. Here the output becomes an event: the
text that the token adds. A completion's last event has a finish_reason; the request's last event has a
`usage`.

Listeners are callbacks. `_outbox` collects the events of each listener, and `_outbox.deliver()` calls each
listener with the list of its events; it returns the listeners that raised. Other threads send tasks through
an inbox.
"""

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from time import monotonic, perf_counter

from .delivery import Listener
from .inbox import draining_error
from .output_processor import RequestState
from .token_output import TokenOutput


class EngineLoop:
    def add(self, requests: Seq[Request], listener: Listener) -> None:
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
        for request_id in request_ids:
            active = self.active.pop(request_id, None)
            if active is None:
                continue
            self.core.cancel(request_id)
            self._outbox.add(active.listener, *active.request.abort())
        self._publish()

    def take_output(self, output: TokenOutput) -> None:
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
        started = perf_counter()
        outputs = self.core.step()
        stepped = perf_counter()
        self._end_searches()
        self._take_failures()
        for output in outputs:
            self.take_output(output)
        self._note_step(StepTime(stepped - started, perf_counter() - stepped))

    def run_once(self) -> None:
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
        if self.refusal is None:
            self.refusal = draining_error
        self._drained.append(drained)
        if timeout is not None:
            self._deadline = min(self._deadline, monotonic() + timeout)
