"""The engine requests of one HTTP request: submitted together, awaited together and cancelled together.

A run that is abandoned for any reason is cancelled, and its blocks are free before the next step. A choice
that fails has the finish_reason "error" and the other choices continue: the answer is an error (HTTP 500)
only if every choice has failed.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import NamedTuple, Self

from tiny_llm.delivery import AsyncListener, Gathering, Item

from tiny_llm import RequestEvent

from .errors import ApiError
from .metrics import RequestStats
from .served_model import ServedEngine, ServedRequest


class PromptEvent(NamedTuple):
    """An event of one of a run's prompts. prompt: the prompt's index."""

    prompt: int
    event: RequestEvent


class Run:
    """The engine requests of one HTTP request: `begin` it, read its `steps`, always `cancel` it at the end.

    stats: counts the events. timeout: seconds until the run is aborted; None: no limit. prompts: the token
    ids of each prompt.
    """

    def __init__(
        self,
        engine: ServedEngine,
        requests: Sequence[ServedRequest],
        stats: RequestStats,
        timeout: float | None = None,
    ) -> None:
        self.prompts = [request.prompt_token_ids for request in requests]
        self._engine = engine
        self.stats = stats
        self._indices = {request.request_id: index for index, request in enumerate(requests)}
        self._gathering = Gathering(requests)
        self._listener = AsyncListener()
        self._timeout = timeout
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout

    @classmethod
    async def begin(
        cls,
        engine: ServedEngine,
        requests: Sequence[ServedRequest],
        stats: RequestStats,
        timeout: float | None = None,
    ) -> Self:
        """Queue the requests in the engine, all or none. Raises as `Engine.submit` and its future do."""
        run = cls(engine, requests, stats, timeout)
        accepted = False
        try:
            await asyncio.wrap_future(engine.submit(requests, run._listener))
            accepted = True
        finally:
            if not accepted:
                run._cancel_all()
        return run

    @property
    def is_unfinished(self) -> bool:
        """Whether the engine still has unfinished completions of this run."""
        return bool(self._gathering.unfinished)

    async def steps(self, patience: float) -> AsyncGenerator[list[PromptEvent], None]:
        """Yield the events of each step until all requests have finished.

        After `patience` seconds without an event, yields an empty list. Raises the engine's error if all
        requests have failed, and `ApiError` if they time out. Unfinished requests are cancelled when the
        generator raises or is closed.
        """
        with _calling_when_silent(lambda: self._listener.put([]), patience, self._deadline) as end_silence:
            try:
                while self._gathering.unfinished:
                    items = await self._listener.next_items()
                    end_silence()
                    yield self._events_of(items)
            finally:
                self.cancel()

    async def events(self) -> AsyncGenerator[PromptEvent, None]:
        """Yield the same events one at a time, without the empty lists."""
        async with aclosing(self.steps(60.0)) as steps:
            async for step in steps:
                for event in step:
                    yield event

    def cancel(self) -> None:
        """Cancel the unfinished requests because the client disconnected; do nothing if all finished."""
        self._abort("abort")

    def _abort(self, reason: str) -> None:
        """Cancel the unfinished requests; the metrics count them under `reason`."""
        if self._gathering.unfinished:
            self.stats.finish_rest(reason)
            self._cancel_all()

    def _cancel_all(self) -> None:
        for request_id in self._gathering.unfinished:
            self._engine.cancel(request_id)
        self._gathering.unfinished.clear()

    def _events_of(self, items: list[Item]) -> list[PromptEvent]:
        if not items and self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
            self._abort("timeout")
            raise ApiError(
                503,
                f"the request did not finish within {self._timeout:g} seconds (--request-timeout)",
                code="timeout",
            )
        events = self._gathering.take(items)
        for event in events:
            self.stats.add(event)
        try:
            self._gathering.check()
        except Exception:  # all requests have failed, or the engine has stopped
            self._abort("error")
            raise
        return [PromptEvent(self._indices[event.request_id], event) for event in events]


@contextmanager
def _calling_when_silent(
    tell: Callable[[], None], patience: float, deadline: float | None
) -> Iterator[Callable[[], None]]:
    """Call `tell` after every `patience` seconds of silence, and at the deadline if there is one.

    Gives a function that ends a silence. It is called for each token, so it only notes the time; setting a
    timer each time would take longer.
    """
    loop = asyncio.get_running_loop()
    since = loop.time()
    timer: asyncio.TimerHandle

    def end_silence() -> None:
        nonlocal since
        since = loop.time()

    def check() -> None:
        nonlocal timer
        if loop.time() >= since + patience:
            tell()
            end_silence()
        timer = loop.call_at(since + patience, check)

    timer = loop.call_at(since + patience, check)
    last = None if deadline is None else loop.call_at(deadline, tell)
    try:
        yield end_silence
    finally:
        timer.cancel()
        if last is not None:
            last.cancel()
