"""The serving engine as its clients see it: `generate` for coroutines, `submit` and `call` for threads.

The thread behind it (`engine_loop`) owns every array. Functions go to it through an inbox, and events come
back: numbers and texts in frozen records. An array comes out evaluated: a lazy one belongs to its thread.
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
        """Queue requests, all of them or none; returns at once a future that is done when they are queued.

        deliver: the listener: a callback that is called in the engine's thread, at most once an iteration,
        with a list of all that this brought for these requests: events, or an error that ended one of them.
        It must return at once. If it raises, its requests are cancelled.

        Refused at once, in the thread that calls: TypeError for what is no request or cannot be called
        (`_submittable` checks both and returns the requests); the error that `_loop.refusal` makes where it
        is set (`EngineStoppingError`, `EngineDeadError`); `QueueFullError` where more than `max_num_waiting`
        would wait (`_admission.admit`). In that order: a request that is refused must not count as waiting.

        Then the engine's thread queues them between two steps, by `_loop.add`. What that raises, the future
        raises: ValueError for an empty prompt and for what the batch manager cannot do,
        `RequestTooLargeError`, and `DuplicateRequestError`, also for a request that was submitted before.
        Post a `partial` of the loop's method: a lambda would hold the engine, whose thread ends when nothing
        holds it any more.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> engine = Engine(lambda: EngineCore(PagedBatchManager(8, 4, 2), ()), None, 26, EngineConfig())
        >>> print(engine.submit([], deliver=print).result())
        None
        >>> engine.stop()
        """
        requests = self._submittable(requests, deliver)
        if (refusal := self.refusal) is not None:
            raise refusal
        self._admission.admit(len(requests))
        return self._inbox.post(partial(self._loop.add, requests, deliver))

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread (`_thread`), between two steps: its value, or what it raises.

        Waits until it has run. In the engine's own thread it runs at once: that thread would wait for itself.
        Compare threads, not their idents: a new thread may get the ident of one that has ended. Arrays in
        the value must be evaluated, because a lazy array belongs to its thread. Raises TypeError for what
        cannot be called (`_check_callable`), and `EngineStoppingError` or `EngineDeadError` where the engine
        has ended.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> engine = Engine(lambda: EngineCore(PagedBatchManager(8, 4, 2), ()), None, 26, EngineConfig())
        >>> engine.call(lambda: engine.call(lambda: 7))
        7
        >>> engine.stop()
        """
        _check_callable("function", function)
        if threading.current_thread() is self._thread:
            return function()
        return self._inbox.post(function).result()

    async def generate(
        self, prompt: PromptType, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestEvent, None]:
        """Complete a prompt: an event for each token, in order; the last one has the request's `usage`.

        prompt: a text, which is encoded here, or token ids. params: None: the defaults. request_id: None: a
        new number. `self.request` makes the request of these three, and `submit` queues it; `AsyncListener`
        is the callback that brings its events into the caller's event loop. Wait with `await` only, never in
        `result()`, which would stop every other client of that event loop.

        A request that is cancelled ends with finish_reason "abort"; of several completions, one that fails
        ends with "error", and the others go on. The generator ends with the event that has a `usage`: a
        finish_reason says only that one completion has ended.

        A client may leave at any time, while it waits to be queued too: by `break`, `aclose`, an exception,
        or the cancellation of its task. Then `_loop.forget`, posted to the inbox, cancels the request before
        the next step, and nothing is awaited any more. A request that has ended is not cancelled.

        Nothing happens before the first event is asked for. That raises `WrongThreadError` in the engine's
        own thread (`refuse_to_wait`), and what `request` and `submit` raise. Later events raise
        `RequestFailedError` if the whole request has failed, and `EngineDeadError`.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> engine = Engine(lambda: EngineCore(PagedBatchManager(8, 4, 2), ()), None, 26, EngineConfig())
        >>> async def first(events):
        ...     return await anext(events)
        >>> asyncio.run(first(engine.generate([26])))
        Traceback (most recent call last):
        ValueError: token id 26 is outside the vocabulary (0 to 25)
        >>> engine.stop()
        """
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
