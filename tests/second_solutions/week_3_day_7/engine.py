"""The serving engine's interface: `generate` and `chat` for coroutines, `submit` and `call` for threads.

The engine's thread (`engine_loop`) owns every array. Tasks go to it through an inbox; events come back as
frozen records of numbers and texts. An array that leaves the thread must be evaluated, because a lazy array
belongs to its thread.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial

from .delivery import AsyncListener, Listener
from .engine_loop import Request
from .outputs import RequestEvent
from .prompts import PromptType
from .sampling_params import SamplingParams


class Engine:
    def submit(self, requests: Seq[Request], deliver: Listener) -> Future[None]:
        requests = self._submittable(requests, deliver)
        if (refusal := self.refusal) is not None:
            raise refusal
        self._admission.admit(len(requests))
        return self._inbox.post(partial(self._loop.add, requests, deliver))

    def call(self, function: Callable[[], T]) -> T:
        _check_callable("function", function)
        if threading.current_thread() is self._thread:
            return function()
        return self._inbox.post(function).result()

    async def generate(
        self, prompt: PromptType, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestEvent, None]:
        self.refuse_to_wait("Engine.generate")
        request = self.request(prompt, params, request_id)
        listener = AsyncListener()
        queued = self.submit([request], listener)
        ended = False
        try:
            await asyncio.wrap_future(queued)
            while not ended:
                for event in await listener.next():
                    ended = event.usage is not None
                    yield event
        finally:
            if not ended:
                self._inbox.post(partial(self._loop.forget, [request]))
