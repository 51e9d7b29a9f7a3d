"""The engine: one way out of `call`, and a generator that leaves by `return`."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial

from .delivery import AsyncListener, Listener
from .engine import Request, T, _check_callable
from .outputs import RequestEvent
from .prompts import PromptType
from .sampling_params import SamplingParams


class Engine:
    """The exercises only."""

    def submit(self, requests: Seq[Request], deliver: Listener) -> Future[None]:
        """The refusal is read once."""
        checked = self._submittable(requests, deliver)
        refusal = self._loop.refusal
        if refusal is not None:
            raise refusal()
        self._admission.admit(len(checked))
        return self._inbox.post(partial(self._loop.add, requests=checked, listener=deliver))

    def call(self, function: Callable[[], T]) -> T:
        """Both ways give one value."""
        _check_callable("function", function)
        is_mine = threading.current_thread() == self._thread
        return function() if is_mine else self._inbox.post(function).result()

    async def generate(
        self, prompt: PromptType, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestEvent, None]:
        """A loop without a condition: a list of events with a usage is the last."""
        self.refuse_to_wait("Engine.generate")
        request, events = self.request(prompt, params, request_id), AsyncListener()
        queued = self.submit([request], events)
        is_over = False
        try:
            await asyncio.wrap_future(queued)
            while True:
                for event in await events.next():
                    is_over = is_over or event.usage is not None
                    yield event
                if is_over:
                    return
        finally:
            if not is_over:
                self._inbox.post(partial(self._loop.forget, (request,)))
