"""`/live`: what happens in the pool, as it happens, for the page and for whoever else watches.

Server-sent events. The first says what there is (`pool`), each later one what the steps since then have
changed (`steps`). Numbers and request ids only: nobody's text. Nothing is looked at while nobody watches.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, closing
from time import monotonic
from typing import Any, NamedTuple

from fastapi import APIRouter, Response

from tiny_llm import Engine, EngineStats, PoolChange, SequenceView

from .errors import refused
from .service import Service
from .sse import EventStream

FRAME_SECONDS = 0.05  # twenty messages a second at most
MOST_STEPS = 2000  # that wait for a slow reader; then he is told anew what there is


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.get("/live", response_class=Response, include_in_schema=False)
    async def live() -> Response:
        """What happens in the pool, as server-sent events."""
        if service.llm.engine_config.batching != "paged":
            raise refused("there are no blocks to watch with --batching dense", code="no_blocks")
        return EventStream(_Watcher(service).messages())

    return routes


class _Step(NamedTuple):
    """What a step has changed, and how full the engine was then."""

    moment: float
    change: PoolChange
    stats: EngineStats


class _Ear:
    """Hears of every step in the engine's thread, and keeps it in `steps` for the event loop's.

    news: set whenever there are more of them. is_late: so many of them waited that it hears no more.
    """

    def __init__(self, engine: Engine, news: asyncio.Event) -> None:
        self.steps: list[_Step] = []
        self._engine = engine
        self._news = news
        self._loop = asyncio.get_running_loop()
        self.is_late = False
        self._is_closed = False
        self._stop: Callable[[], object] | None = None

    async def open(self) -> None:
        """Returns when the first step is there, which says what there is."""
        self._stop = await asyncio.to_thread(self._engine.watch_blocks, self)

    def close(self) -> None:
        """Never waits, and works at any time, also while it is being opened."""
        self._is_closed = True
        if self._stop is not None:
            self._stop()

    def take(self) -> list[_Step]:
        """The steps since this was last asked."""
        taken, self.steps = self.steps, []
        return taken

    def __call__(self, change: PoolChange) -> None:
        """Something has changed. Raises once it is closed: then the engine tells it no more."""
        if self._is_closed:
            raise EOFError
        self._loop.call_soon_threadsafe(self._keep, _Step(monotonic(), change, self._engine.stats))

    def _keep(self, step: _Step) -> None:
        if len(self.steps) < MOST_STEPS:
            self.steps.append(step)
        else:
            self.is_late = True
            self.close()
        self._news.set()


class _Watcher:
    """Tells one client."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tables: dict[str, Any] = {}
        self._news = asyncio.Event()

    async def messages(self) -> AsyncGenerator[str | None, None]:
        """What is sent; None where nothing has happened for a while."""
        service = self._service
        with service.until_the_end(self._news.set):
            while not service.is_ending:
                with closing(_Ear(service.llm.engine, self._news)) as ear:
                    await ear.open()
                    async with aclosing(self._until_late(ear)) as messages:
                        async for message in messages:
                            yield message

    async def _until_late(self, ear: _Ear) -> AsyncGenerator[str | None, None]:
        """Everything from now on, until so much waits for its reader that he had better begin anew."""
        yield json.dumps(self._pool(ear.steps.pop(0)))
        while not ear.is_late and not self._service.is_ending:
            if not await self._wait(self._service.config.keep_alive):
                yield None
            if ear.steps:
                yield json.dumps({"type": "steps", "steps": [self._step(step) for step in ear.take()]})
                await asyncio.sleep(FRAME_SECONDS)

    async def _wait(self, seconds: float) -> bool:
        """True when there is something new: a step, or the end."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    def _pool(self, step: _Step) -> dict[str, Any]:
        """All that there is."""
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
            "events": [[kind.value, block, holders, other] for kind, block, holders, other in change.events],
            "sequences": [self._sequence(view) for view in change.sequences],
            "ended": change.ended,
            "stats": _stats(step.stats),
        }

    def _sequence(self, view: SequenceView) -> dict[str, Any]:
        """A sequence; its tables only where they are not what they were."""
        told: dict[str, Any] = {
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
            told["tables"] = [{"first": table.first, "blocks": table.blocks} for table in view.tables]
        return told


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
    }
