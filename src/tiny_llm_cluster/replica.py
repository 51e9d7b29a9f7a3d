"""A replica: one engine in a process of its own, which Ray Serve starts, watches, drains and replaces."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import time
from typing import Any

from ray import serve
from tiny_llm.delivery import AsyncListener, Item
from tiny_llm.errors import described
from tiny_llm.kernels import compiled_available, compiled_kernel
from tiny_llm.output_processor import RequestState

from tiny_llm import LLM, RequestEvent, RequestFailedError, TinyLLMError
from tiny_llm_routing.reports import read_report

from .calls import Accepted, Call, Events, Failure, Moved, OpenStream, Refused, ends_request
from .messages import stats_message
from .shared_stream import SharedStream, SharedStreams, StreamClosedError


class EngineReplica:
    """The class of the replicas' deployment.

    engine_options: the arguments of `LLM`, with its `model`. threads: of the kernels; None: one for each
    processor.
    """

    def __init__(self, engine_options: Mapping[str, Any], threads: int | None = None) -> None:
        if threads is not None and compiled_available():
            compiled_kernel("set_num_threads")(threads)
        self._llm = LLM(**engine_options)
        self._streams = SharedStreams()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def run(self, call: Call) -> AsyncGenerator[Accepted | Refused | Moved | Events, None]:
        """Run a call: yield whether it is accepted, then the events of its requests as they come.

        Once the ingress has a shared stream here, yields `Moved`, puts the further events there, and yields
        nothing more; it still runs until all requests have ended. They are cancelled if the call is, or if
        the ingress has gone.
        """
        listener = AsyncListener()
        try:
            requests = await asyncio.to_thread(self._requests, call)
            await asyncio.wrap_future(self._llm.engine.submit(requests, listener))
        except TinyLLMError as error:
            yield Refused(self._name, error)
            return
        unfinished = {prompt.request_id for prompt in call.prompts}
        shared: SharedStream | None = None
        try:
            yield Accepted(self._name)
            while unfinished:
                events = _events(await listener.next_items(), unfinished)
                if shared is None and not call.has_large_events:
                    shared = self._streams.join(call.ingress)
                    if shared is not None:
                        yield Moved(shared.number)
                if shared is None:
                    yield events
                else:
                    shared.put(events)
        except StreamClosedError:
            return  # the ingress has gone
        finally:
            if shared is not None:
                shared.leave(Failure(request_id, "its replica has cancelled it") for request_id in unfinished)
            for request_id in unfinished:
                self._llm.engine.cancel(request_id)

    async def events(self, request: OpenStream) -> AsyncGenerator[Events, None]:
        """Open a shared stream, and yield its events. Ends at once if it was meant for another replica."""
        if request.replica == self._name:
            async for events in self._streams.read(request.ingress, request.number):
                yield events

    def is_ready(self) -> bool:
        """True: a replica that answers has loaded its model."""
        return True

    async def record_routing_stats(self) -> dict[str, Any]:
        """What this replica has cached and has to do, for the router and `/metrics`; called by Serve.

        Waits for the end of a step, outside the event loop, which passes events on.
        """
        engine, core, config = self._llm.engine, self._llm.core, self._llm.engine_config
        read = partial(read_report, core.manager, time(), max_waiting=config.max_num_waiting)
        report = await asyncio.to_thread(engine.call, read)
        return {"report": report.as_message(), "stats": stats_message(engine.stats)}

    def check_health(self) -> None:
        """Raise the error of an engine that has ended; Serve then replaces this replica."""
        if (refusal := self._llm.engine.refusal) is not None:
            raise refusal

    def __del__(self) -> None:
        """Stop the engine; Serve calls this when the replica's calls have ended."""
        if hasattr(self, "_llm"):
            self._llm.close()

    def _requests(self, call: Call) -> list[RequestState]:
        """Make the engine's requests; new grammars are compiled here too."""
        engine = self._llm.engine
        return [
            engine.request(
                list(one.token_ids), replace(call.params, seed=one.seed), one.request_id, call.visible
            )
            for one in call.prompts
        ]


def _events(items: Sequence[Item], unfinished: set[str]) -> list[RequestEvent | Failure]:
    """The engine's items in a form that can travel; removes the requests that end from `unfinished`.

    The end of the engine ends all of them.
    """
    events: list[RequestEvent | Failure] = []
    for item in items:
        if isinstance(item, RequestEvent):
            found: list[RequestEvent | Failure] = [item]
        elif isinstance(item, RequestFailedError):
            found = [Failure(item.request_id, described(item.__cause__ or item))]
        else:
            found = [Failure(request_id, described(item)) for request_id in unfinished]
        events += found
        unfinished.difference_update(event.request_id for event in found if ends_request(event))
    return events
