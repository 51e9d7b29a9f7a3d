"""The loop: ids instead of requests, `else` instead of an early return, tuples instead of lists."""

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from time import monotonic, perf_counter

from .delivery import Listener
from .engine_loop import ActiveRequest, Request, StepTime
from .inbox import draining
from .output_processor import RequestState
from .token_output import TokenOutput


class EngineLoop:
    """The exercises only."""

    def add(self, requests: Seq[Request], listener: Listener) -> None:
        """What has begun is known by its ids; the figures are published in either case."""
        begun = []
        self._num_seen = self._num_seen + len(requests)
        try:
            refusal = self.refusal
            if refusal is not None:
                raise refusal()
            for one in requests:
                one.begin(self.core)
                begun.append(one.request_id)
        except BaseException:
            for name in begun:
                self.core.cancel(name)
            self._publish()
            raise
        for one in requests:
            self.active[one.request_id] = ActiveRequest(one, listener)
        self._publish()

    def cancel(self, request_ids: Seq[str]) -> None:
        """First the memory, then the events."""
        for name in request_ids:
            if name not in self.active:
                continue
            request, listener = self.active.pop(name)
            self.core.cancel(name)
            for event in request.abort():
                self._outbox.add(listener, event)
        self._publish()

    def take_output(self, output: TokenOutput) -> None:
        """The event goes to the outbox where nothing was raised."""
        name = output.request_id
        request, listener = self.active.get(name, (None, None))
        if not isinstance(request, RequestState):
            return
        try:
            event = request.push(output)
            if event.finish_reason and not output.finish_reason:
                self.core.finish(output.seq_id)
        except BaseException as error:
            self.core.cancel(name)
            self.fail_request(name, error)
        else:
            self._outbox.add(listener, event)
            if event.usage:
                self.active.pop(name)

    def step(self) -> None:
        """Three readings of the clock."""
        times = [perf_counter()]
        outputs = self.core.step()
        times.append(perf_counter())
        for one in outputs:
            self.take_output(one)
        self._take_failures()
        self._end_searches()
        times.append(perf_counter())
        self._note_step(StepTime(times[1] - times[0], times[2] - times[1]))

    def run_once(self) -> None:
        """Whether any request is active is asked by its number."""
        self._inbox.run(wait=len(self.active) == 0)
        if self._deadline < monotonic():
            self.cancel(tuple(self.active))
        if len(self.active) and not self._stopping:
            self.step()
        self._tell_watchers()
        self._deliver()
        if len(self.active) == 0:
            self._end_drains(None)

    def drain(self, timeout: float | None, drained: Future[None]) -> None:
        """A deadline is moved only forward."""
        if self.refusal is None:
            self.refusal = draining
        self._drained += [drained]
        if timeout is not None and monotonic() + timeout < self._deadline:
            self._deadline = monotonic() + timeout
