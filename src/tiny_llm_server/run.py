"""Requests on their way through the engine: accepted together, waited for together, and cancelled together.

A run that is left before its end, however that happens, gives its pages back before the next step. A choice
that fails has the finish_reason "error", and the others go on: the answer is an error (HTTP 500) only where
every choice has failed.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

from tiny_llm.delivery import AsyncListener, Gathering
from tiny_llm.output_processor import RequestState

from tiny_llm import Engine, RequestEvent

from .errors import ApiError
from .metrics import RequestStats


@dataclass(frozen=True)
class PromptEvent:
    """What a step gave one of a run's prompts. prompt: its place among them."""

    prompt: int
    event: RequestEvent


class Run:
    """The requests of one HTTP request. `begin` it, then take its `steps`, and `cancel` it whatever happened.

    stats: counts all that they give. timeout: seconds that they may take. prompts: their tokens.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[RequestState],
        stats: RequestStats,
        timeout: float | None = None,
    ) -> None:
        self.prompts = [request.prompt_token_ids for request in requests]
        self._engine = engine
        self.stats = stats
        self._places = {request.request_id: place for place, request in enumerate(requests)}
        self._gathering = Gathering(requests)
        self._listener = AsyncListener()
        self._timeout = timeout
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout

    @classmethod
    async def begin(
        cls,
        engine: Engine,
        requests: Sequence[RequestState],
        stats: RequestStats,
        timeout: float | None = None,
    ) -> Self:
        """Queue requests in the engine, all or none. Raises what `Engine.submit` and its future raise."""
        run = cls(engine, requests, stats, timeout)
        accepted = False
        try:
            await asyncio.wrap_future(engine.submit(requests, run._listener))
            accepted = True
        finally:
            if not accepted:
                run._end_all()
        return run

    @property
    def is_unfinished(self) -> bool:
        """Whether the engine still has completions of it."""
        return bool(self._gathering.unfinished)

    async def steps(self, patience: float) -> AsyncGenerator[list[PromptEvent], None]:
        """What each step gives, until all requests have ended; nothing, after `patience` seconds of silence.

        Raises what the engine raises where all of them have failed, and `ApiError` when their time is over.
        Then, and when this is left early, those that have not ended are cancelled.
        """
        try:
            while self._gathering.unfinished:
                yield await self._next(patience)
        finally:
            self.cancel()

    async def events(self) -> AsyncGenerator[PromptEvent, None]:
        """The same, one by one, for whoever only waits."""
        async with aclosing(self.steps(60.0)) as steps:
            async for step in steps:
                for event in step:
                    yield event

    def cancel(self) -> None:
        """End what has not ended, because its client has left; nothing where all has ended."""
        self._end("abort")

    def _end(self, reason: str) -> None:
        """End what has not ended; `reason` is what the metrics count it under."""
        if self._gathering.unfinished:
            self.stats.finish_rest(reason)
            self._end_all()

    def _end_all(self) -> None:
        for request_id in self._gathering.unfinished:
            self._engine.cancel(request_id)
        self._gathering.unfinished.clear()

    async def _next(self, patience: float) -> list[PromptEvent]:
        left = patience if self._deadline is None else self._deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, min(left, patience))):
                items = await self._listener.next_items()
        except TimeoutError:
            if left <= patience:
                self._end("timeout")
                raise ApiError(
                    503, f"the request has not ended within {self._timeout:g} seconds", code="timeout"
                ) from None
            return []
        events = self._gathering.take(items)
        for event in events:
            self.stats.add(event)
        try:
            self._gathering.check()
        except Exception:  # all have failed, or the engine has ended
            self._end("error")
            raise
        return [PromptEvent(self._places[event.request_id], event) for event in events]
