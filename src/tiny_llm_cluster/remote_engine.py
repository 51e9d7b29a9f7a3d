"""The engine as the ingress sees it: requests are checked here, and run on one of the replicas.

It has the interface that the server needs (`ServedEngine`), so the server's routes do not know the
difference.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from hashlib import sha256
from itertools import count
from typing import Any, Protocol

from tiny_llm.delivery import Item, Listener
from tiny_llm.engine_core import sum_stats
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.request_maker import RequestMaker
from tiny_llm.sampling_params import MAX_SEED

from tiny_llm import (
    EngineDeadError,
    EngineStats,
    EngineStoppingError,
    PoolChange,
    QueueFullError,
    RequestEvent,
    RequestFailedError,
    SamplingParams,
    TinyLLMError,
)
from tiny_llm_routing.prompt_blocks import PromptBlocks

from .answers import NoReplicaError, ReplicaEndedError, ReplicaError, Replicas, Stream
from .calls import Accepted, Call, Events, Failure, Moved, Refused, ends_request
from .remote_request import RemoteRequest
from .stream_readers import ENDED_EARLY, Inbox, StreamReaders

ELSEWHERE = (QueueFullError, EngineStoppingError, EngineDeadError)  # another replica may take the call
MOST_ENDED = 2  # replicas that may end before they answer a call: it may be the call that ends them


class Routed(Protocol):
    """What the engine tells the routing, and asks it; `routing.Routing` is one."""

    @property
    def stats(self) -> Mapping[str, EngineStats]: ...
    @property
    def replicas(self) -> Sequence[str]: ...
    def begin(self, call_id: str) -> None: ...
    def started(self, call_id: str) -> None: ...
    def ended(self, call_id: str) -> None: ...


class RemoteEngine:
    """Runs requests on replicas. Belongs to one event loop; only `stats` may be read elsewhere.

    replicas: the way to them. routing: what their router knows. maker: makes and checks requests. new_stream:
    makes the empty stream of a prompt's blocks from a salt. seeds: for requests that have none, in order of
    their arrival here.
    """

    def __init__(
        self,
        replicas: Replicas,
        routing: Routed,
        maker: RequestMaker,
        new_stream: Callable[[str], TokenBlocks],
        seeds: Iterator[int],
    ) -> None:
        self._replicas = replicas
        self._readers = StreamReaders(replicas.open_stream)
        self._routing = routing
        self._maker = maker
        self._new_stream = new_stream
        self._seeds = seeds
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the calls that have not ended, by request id
        self.is_draining = False

    # What a request needs before it can be sent.

    def request(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str | None = None,
        visible: Collection[str] = (),
    ) -> RemoteRequest:
        """Make a request; raises as `Engine.request` does."""
        state = self._maker.request(prompt, params, request_id, visible)
        stream = self._new_stream(state.params.cache_salt)
        return RemoteRequest(state, visible, PromptBlocks.of_stream(state.prompt_token_ids, stream))

    def check_token_ids(self, tokens: Sequence[int]) -> list[int]:
        """As `Engine.check_token_ids`."""
        ids: list[int] = self._maker.check_token_ids(tokens)
        return ids

    def is_compiled(self, params: SamplingParams) -> bool:
        """As `Engine.is_compiled`."""
        return bool(self._maker.is_compiled(params))

    def check_admission(self) -> None:
        """Raise the error with which any request would be refused now. Replicas check their own queues."""
        if (refusal := self.refusal) is not None:
            raise refusal

    # Calls.

    def submit(self, requests: Sequence[RemoteRequest], deliver: Listener) -> Future[None]:
        """Send requests to a replica, all to the same one; returns at once.

        The future is done when a replica has accepted them. If one is full, stops, or ends before it
        answers, the next best is tried, each replica once. `deliver` is called in the event loop.
        """
        self.check_admission()
        accepted: Future[None] = Future()
        call = self._call(requests)
        self._routing.begin(call.call_id)
        task = asyncio.get_running_loop().create_task(self._run(call, requests, deliver, accepted))
        for request in requests:
            self._tasks[request.request_id] = task
        return accepted

    def cancel(self, request_id: str) -> None:
        """Cancel a request, and those that were submitted with it; an unknown id is ignored."""
        if (task := self._tasks.get(request_id)) is not None:
            task.cancel()

    async def _run(
        self, call: Call, requests: Sequence[RemoteRequest], deliver: Listener, accepted: Future[None]
    ) -> None:
        """Run a call to its end, and deliver its events."""
        unfinished = {request.request_id: request for request in requests}
        ids = [*unfinished]
        inbox = self._readers.add(ids)
        try:
            replica, stream = await self._accepted(call)
            accepted.set_result(None)
            try:
                async with aclosing(self._events(replica, stream, inbox)) as lists:
                    await self._deliver_all(call, lists, unfinished, deliver)
            finally:
                stream.cancel()
        except asyncio.CancelledError:
            if not accepted.done():
                accepted.set_exception(EngineStoppingError("the request was cancelled"))
            deliver([event for request in unfinished.values() for event in request.abort()])
        except Exception as error:
            if accepted.done():
                deliver([_failure(request, error) for request in unfinished.values()])
            else:
                accepted.set_exception(error)
        finally:
            self._routing.ended(call.call_id)
            self._readers.remove(ids)
            for request_id in ids:
                self._tasks.pop(request_id, None)

    def _call(self, requests: Sequence[RemoteRequest]) -> Call:
        """The call that carries requests; they have the same parameters."""
        first = requests[0]
        prompts = tuple(request.prompt_call(next(self._seeds)) for request in requests)
        return Call(prompts, first.params, first.visible, first.blocks, self._readers.ingress)

    async def _accepted(self, call: Call) -> tuple[str, Stream]:
        """Send a call until a replica accepts it; returns the replica and its further answers.

        A call that a replica refuses for lack of space, or because it stops, goes to the next one; so does a
        call whose replica ends, but not more than `MOST_ENDED` times. Raises the last such error at the end,
        and any other error of a replica at once.
        """
        num_ended = 0
        for _ in range(len(self._routing.replicas) + 1):
            stream = self._replicas.send(call)
            try:
                first = await anext(stream)
            except (ReplicaEndedError, StopAsyncIteration) as error:  # the router knows which one
                refusal: TinyLLMError = NoReplicaError(f"no replica has taken the request: {error}")
                stream.cancel()  # if only the way has broken, the replica must not go on
                num_ended += 1
                if num_ended > MOST_ENDED:
                    break
                continue
            except BaseException:  # the client has left
                stream.cancel()
                raise
            if isinstance(first, Accepted):
                return first.replica, stream
            assert isinstance(first, Refused)
            refusal = first.error
            if not isinstance(refusal, ELSEWHERE):
                break
            call = replace(call, refused_by=call.refused_by | {first.replica})
        raise refusal

    async def _events(self, replica: str, stream: Stream, inbox: Inbox) -> AsyncGenerator[Events, None]:
        """The events of an accepted call: those of its own stream, then those that come in a shared one."""
        self._readers.open(replica)
        async for answer in stream:
            if isinstance(answer, Moved):
                self._readers.follow(answer, inbox)
                async with aclosing(inbox.read()) as lists:
                    async for events in lists:
                        yield events
            else:
                yield answer

    async def _deliver_all(
        self,
        call: Call,
        lists: AsyncGenerator[Events, None],
        unfinished: dict[str, RemoteRequest],
        deliver: Listener,
    ) -> None:
        """Deliver the events of an accepted call until `unfinished`, its requests by id, is empty."""
        has_started = False
        async for events in lists:
            if not has_started:
                self._routing.started(call.call_id)
                has_started = True
            items: list[Item] = []
            for event in events:
                if (request := unfinished.get(event.request_id)) is not None:
                    items.append(_item(event, request))
                    if ends_request(event):
                        del unfinished[event.request_id]
            deliver(items)
            if not unfinished:
                return
        raise ReplicaEndedError(ENDED_EARLY)

    # The end, and figures.

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests; return when all others have ended. After `timeout` seconds, cancel them."""
        self.is_draining = True
        tasks = set(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
            self.stop()
            await asyncio.wait(tasks)
        self._readers.close()

    def stop(self) -> None:
        """Refuse new requests and cancel all others."""
        self.is_draining = True
        for task in set(self._tasks.values()):
            task.get_loop().call_soon_threadsafe(task.cancel)

    @property
    def refusal(self) -> Exception | None:
        """The error that any new request would get now; None while requests are taken."""
        if self.is_draining:
            return EngineStoppingError("the server is draining: it takes no new requests")
        if not self._routing.replicas:
            return NoReplicaError("no replica is ready: try again in some seconds")
        return None

    @property
    def replica_stats(self) -> Mapping[str, EngineStats]:
        """The figures of each replica, as it last reported them."""
        return self._routing.stats

    @property
    def stats(self) -> EngineStats:
        """The sum of the replicas' figures."""
        total: EngineStats = sum_stats(self._routing.stats.values())
        return total

    def watch_blocks(self, watcher: Callable[[PoolChange], None]) -> Callable[[], object]:
        """Not possible: the pools are elsewhere. Raises ValueError."""
        raise ValueError("the blocks of replicas cannot be watched")


def seeds_of(seed: int, ingress: str | None = None) -> Iterator[int]:
    """The seeds of requests without one, as `EngineCore` makes them from its own.

    ingress: the name of one of several ingresses. Each starts at another of 2**40 places, which depends on
    its name, so that they give different seeds.
    """
    first = 0 if ingress is None else int.from_bytes(sha256(ingress.encode()).digest()[:5])
    return ((seed + (number << 20)) % (MAX_SEED + 1) for number in count(first))


def _item(event: RequestEvent | Failure, request: RemoteRequest) -> Item:
    """An event of a replica as the engine would deliver it; the request counts it."""
    if isinstance(event, Failure):
        return _failure(request, ReplicaError(event.reason))
    request.note(event)
    return event


def _failure(request: RemoteRequest, cause: Exception) -> RequestFailedError:
    """The error that ends a request."""
    failure = RequestFailedError(f"request {request.request_id!r} has failed: {cause}", request.request_id)
    failure.__cause__ = cause
    return failure
