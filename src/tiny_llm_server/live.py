"""`/live`: the changes of the pool, step by step, for the live page and other clients.

Server-sent events. The first has the whole state (`pool`); each later one has the changes of the steps since
the previous event (`steps`). They contain only numbers and request ids, never text. The engine is never
slowed down: a client that reads too slowly misses steps and gets the whole state again. Without clients,
nothing is collected.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, closing
from time import monotonic
from typing import Any, NamedTuple

from fastapi import APIRouter, Response

from tiny_llm import EngineStats, PoolChange, SequenceView

from .errors import refused
from .served_model import ServedEngine
from .service import Service
from .sse import EventStream

FRAME_SECONDS = 0.05  # between two messages
MAX_STEPS = 2000  # steps kept for a slow client; beyond that, it gets the whole state again


def router(service: Service) -> APIRouter:
    """Return the router with `/live`."""
    routes = APIRouter()

    @routes.get("/live", response_class=Response, include_in_schema=False)
    async def live() -> Response:
        """Stream the changes of the pool as server-sent events."""
        if service.llm.engine_config.batching != "paged":
            raise refused("--batching dense has no pool of blocks to watch", code="no_blocks")
        return EventStream(_Watcher(service).messages())

    return routes


class _Step(NamedTuple):
    """The changes of a step, and the engine's statistics after it. moment: seconds on the monotonic clock."""

    moment: float
    change: PoolChange
    stats: EngineStats


class _Collector:
    """Collects the engine's steps in `steps`: called in the engine's thread, read in the event loop.

    news: set for every new step. is_overrun: the limit was reached, and later steps are not collected.
    """

    def __init__(self, engine: ServedEngine, news: asyncio.Event) -> None:
        self.steps: list[_Step] = []
        self._engine = engine
        self._news = news
        self._loop = asyncio.get_running_loop()
        self.is_overrun = False
        self._is_closed = False
        self._stop: Callable[[], object] | None = None

    async def open(self) -> None:
        """Start; returns after the first step, which has the whole state."""
        self._stop = await asyncio.to_thread(self._engine.watch_blocks, self)

    def close(self) -> None:
        """Stop, without waiting. Can be called at any time, even during `open`."""
        self._is_closed = True
        if self._stop is not None:
            self._stop()

    def take(self) -> list[_Step]:
        """Return the steps since the last call."""
        taken, self.steps = self.steps, []
        return taken

    def __call__(self, change: PoolChange) -> None:
        """Take a step from the engine. Raises EOFError after `close`, which ends the subscription."""
        if self._is_closed:
            raise EOFError
        self._loop.call_soon_threadsafe(self._keep, _Step(monotonic(), change, self._engine.stats))

    def _keep(self, step: _Step) -> None:
        if len(self.steps) < MAX_STEPS:
            self.steps.append(step)
        else:
            self.is_overrun = True
            self.close()
        self._news.set()


class _Watcher:
    """The messages for one client."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tables: dict[str, Any] = {}
        self._news = asyncio.Event()

    async def messages(self) -> AsyncGenerator[str | None, None]:
        """Yield the messages, and None after `keep_alive` seconds without a step."""
        service = self._service
        with service.call_when_stopping(self._news.set):
            while not service.is_stopping:
                with closing(_Collector(service.llm.engine, self._news)) as collector:
                    await collector.open()
                    async with aclosing(self._until_overrun(collector)) as messages:
                        async for message in messages:
                            yield message

    async def _until_overrun(self, collector: _Collector) -> AsyncGenerator[str | None, None]:
        """Yield the whole state and then the steps, until the client is too slow or the server stops."""
        yield json.dumps(self._pool(collector.steps.pop(0)))
        while not collector.is_overrun and not self._service.is_stopping:
            if not await self._wait(self._service.config.keep_alive):
                yield None
            if collector.steps:
                yield json.dumps({"type": "steps", "steps": [self._step(step) for step in collector.take()]})
                await asyncio.sleep(FRAME_SECONDS)

    async def _wait(self, seconds: float) -> bool:
        """Wait until a step arrives or the server stops; return False if neither happens within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    def _pool(self, step: _Step) -> dict[str, Any]:
        """The whole state, from the first step of a collector."""
        llm, stats, self._tables = self._service.llm, step.stats, {}
        events = step.change.events
        kept = {event.block for event in events if event.kind.value == "cached"}
        held = {event.block: event.holders for event in events}
        return {
            "type": "pool",
            "t": step.moment,
            "model": self._service.model_name,
            "num_blocks": stats.num_blocks,
            "block_size": llm.engine_config.block_size,
            "num_host_blocks": stats.num_host_blocks,
            "max_num_seqs": llm.engine_config.max_num_seqs,
            "stats": _stats(stats),
            "blocks": [[block, holders, block in kept] for block, holders in held.items()],
            "sequences": [self._sequence(view) for view in step.change.sequences],
        }

    def _step(self, step: _Step) -> dict[str, Any]:
        change = step.change
        for seq_id in change.ended:
            self._tables.pop(seq_id, None)
        return {
            "t": step.moment,
            "events": [[one.kind.value, one.block, one.holders, one.other] for one in change.events],
            "sequences": [self._sequence(view) for view in change.sequences],
            "ended": change.ended,
            "stats": _stats(step.stats),
        }

    def _sequence(self, view: SequenceView) -> dict[str, Any]:
        """A sequence, with its block tables only if they have changed."""
        message: dict[str, Any] = {
            "id": view.seq_id,
            "request": view.request_id,
            "state": "running" if view.is_running else "waiting",
            "prompt": view.num_prompt_tokens,
            "outputs": view.num_outputs,
            "computed": view.num_computed,
            "cached": view.num_cached_tokens,
            "forks": view.num_forks,
            "host_blocks": view.num_host_blocks,
        }
        if self._tables.get(view.seq_id) != view.tables:
            self._tables[view.seq_id] = view.tables
            message["tables"] = [{"first": table.first, "blocks": table.blocks} for table in view.tables]
        return message


def _stats(stats: EngineStats) -> dict[str, int]:
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "swapped": stats.num_swapped,
        "preemptions": stats.num_preemptions,
        "prefix_queries": stats.prefix_cache_queries,
        "prefix_hits": stats.prefix_cache_hits,
        "free": stats.num_free_blocks,
        "cached": stats.num_cached_blocks,
        "guesses_right": stats.drafts.num_accepted_tokens,
        "guesses_wrong": stats.drafts.num_draft_tokens - stats.drafts.num_accepted_tokens,
    }
