"""Shared streams: the events of an ingress's calls on one replica, in one stream. No Ray runs, no model."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.delivery import Item, Listener
from tiny_llm.outputs import RequestMetrics
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.request_maker import RequestMaker

from tiny_llm import EngineDeadError, RequestEvent, RequestFailedError, RequestUsage, SamplingParams
from tiny_llm_cluster.answers import ReplicaEndedError
from tiny_llm_cluster.calls import Call, Events, Moved, OpenStream
from tiny_llm_cluster.remote_engine import RemoteEngine, seeds_of
from tiny_llm_cluster.remote_request import RemoteRequest
from tiny_llm_cluster.replica import EngineReplica
from tiny_llm_cluster.shared_stream import MOST_EVENTS, SharedStream, SharedStreams, StreamClosedError
from tiny_llm_cluster.stream_readers import StreamReaders
from tiny_llm_routing.prompt_blocks import PromptBlocks

IDLE = 0.02
LATE = 30.0  # longer than any test
USAGE = RequestUsage(2, 14, 0, RequestMetrics(0.0))


def event(request_id: str, token: int = 0, usage: RequestUsage | None = None) -> RequestEvent:
    reason = None if usage is None else "length"
    return RequestEvent(request_id, 0, "x", (token,), finish_reason=reason, usage=usage)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def joined(idle: float) -> tuple[SharedStreams, SharedStream, "asyncio.Task[list[Any]]"]:
    """A stream with one call, and the task that reads it."""
    streams = SharedStreams(idle)
    reading = asyncio.create_task(events_of(streams.read("ingress", 0)))
    await asyncio.sleep(0)
    stream = streams.join("ingress")
    assert stream is not None
    return streams, stream, reading


async def events_of(stream: AsyncIterator[Events]) -> list[Any]:
    return [event async for events in stream for event in events]


def test_what_is_put_between_two_reads_comes_as_one_list() -> None:
    async def check() -> None:
        streams = SharedStreams(LATE)
        reader = streams.read("ingress", 3)
        first = asyncio.create_task(anext(reader))
        await asyncio.sleep(0)
        stream = streams.join("ingress")
        assert stream is not None
        assert stream.number == 3
        stream.put([event("r", 1)])
        stream.put([event("s", 1), event("r", 2)])
        assert await first == [event("r", 1), event("s", 1), event("r", 2)]
        stream.put([event("r", 3)])
        assert await anext(reader) == [event("r", 3)]
        await reader.aclose()

    run(check())


def test_a_stream_without_calls_ends_and_no_call_can_join_it() -> None:
    async def check() -> None:
        streams = SharedStreams(IDLE)
        assert await events_of(streams.read("ingress", 0)) == []
        assert streams.join("ingress") is None

    run(check())


def test_a_stream_with_a_call_does_not_end_before_its_last_events() -> None:
    async def check() -> None:
        _, stream, reading = await joined(IDLE)
        await asyncio.sleep(4 * IDLE)
        stream.put([event("r")])
        stream.leave()
        assert await reading == [event("r")]
        with pytest.raises(StreamClosedError):
            stream.put([event("r")])

    run(check())


def test_a_call_that_leaves_without_events_lets_the_stream_end() -> None:
    async def check() -> None:
        _, stream, reading = await joined(IDLE)
        await asyncio.sleep(2 * IDLE)
        stream.leave()
        assert await reading == []

    run(check())


def test_a_call_learns_that_the_reader_has_gone() -> None:
    async def check() -> None:
        streams, stream, reading = await joined(LATE)
        reading.cancel()
        await asyncio.wait([reading])
        with pytest.raises(StreamClosedError):
            stream.put([event("r")])
        assert streams.join("ingress") is None

    run(check())


def test_the_end_of_an_old_stream_does_not_close_a_new_one() -> None:
    async def check() -> None:
        streams = SharedStreams(LATE)
        old, new = streams.read("ingress", 0), streams.read("ingress", 1)
        tasks = [asyncio.ensure_future(anext(reader)) for reader in (old, new)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        stream = streams.join("ingress")
        assert stream is not None
        assert stream.number == 1
        assert streams.join("another") is None
        stream.put([event("r")])
        assert await tasks[1] == [event("r")]
        await new.aclose()

    run(check())


class Replica:
    """One replica's shared streams, as an ingress opens them; `error` ends all that are open."""

    def __init__(self, idle: float = LATE) -> None:
        self.streams = SharedStreams(idle)
        self.opened: list[OpenStream] = []
        self.error = asyncio.get_running_loop().create_future()

    def open_stream(self, request: OpenStream) -> "Opened":
        self.opened.append(request)
        return Opened(self.streams.read(request.ingress, request.number), self.error)

    def join(self, readers: StreamReaders) -> SharedStream:
        stream = self.streams.join(readers.ingress)
        assert stream is not None
        return stream


class Opened:
    """A generator that runs in another process: it does not wait for its reader, and the way can fail."""

    def __init__(self, lists: AsyncGenerator[Any, None], error: "asyncio.Future[Exception]") -> None:
        self._lists, self._error = lists, error
        self._answers: deque[Any] = deque()
        self._has_come = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())
        error.add_done_callback(self._fail)

    async def _run(self) -> None:
        async with aclosing(self._lists) as lists:
            async for answer in lists:
                self._come(answer)
        self._come(StopAsyncIteration())

    def _fail(self, error: "asyncio.Future[Exception]") -> None:
        self._task.cancel()
        self._come(error.result())

    def _come(self, answer: Any) -> None:
        self._answers.append(answer)
        self._has_come.set()

    def __aiter__(self) -> "Opened":
        return self

    async def __anext__(self) -> Any:
        while not self._answers:
            self._has_come.clear()
            await self._has_come.wait()
        answer = self._answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self) -> None:
        self._error.remove_done_callback(self._fail)
        self._task.cancel()


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def test_each_call_gets_its_own_events_and_a_call_that_has_ended_none() -> None:
    async def check() -> None:
        replica = Replica()
        readers = StreamReaders(replica.open_stream)
        one, two = readers.add(["r", "s"]), readers.add(["t"])
        readers.open("a")
        readers.open("a")
        await settle()
        stream = replica.join(readers)
        for inbox in (one, two):
            readers.follow(Moved(stream.number), inbox)
        readers.remove(["t"])
        stream.put([event("r", 1), event("s", 1), event("t", 1), event("r", 2), event("unknown")])
        assert await anext(one.read()) == [event("r", 1), event("s", 1)]
        assert await anext(one.read()) == [event("r", 2)]
        assert len(replica.opened) == 1
        readers.close()
        await settle()
        with pytest.raises(ReplicaEndedError):
            await anext(one.read())

    run(check())


@pytest.mark.parametrize("error", [ReplicaEndedError("gone"), ValueError("unforeseen")])
def test_calls_whose_stream_fails_get_its_error_after_their_events(error: Exception) -> None:
    async def check() -> None:
        replica, other = Replica(), Replica()
        of = {"a": replica, "b": other}
        readers = StreamReaders(lambda request: of[request.replica].open_stream(request))
        inboxes = {name: readers.add([name]) for name in ("on a", "late on a", "on b")}
        for name in of:
            readers.open(name)
        await settle()
        streams = {name: one.join(readers) for name, one in of.items()}
        readers.follow(Moved(streams["a"].number), inboxes["on a"])
        readers.follow(Moved(streams["b"].number), inboxes["on b"])
        streams["a"].put([event("on a", 1), event("late on a")])
        await settle()
        streams["a"].put([event("on a", 2)])
        await settle()
        replica.error.set_result(error)
        await settle()
        readers.open("a")  # a new stream of the same replica carries nothing of the old one's calls
        readers.follow(Moved(streams["a"].number), inboxes["late on a"])
        lists = inboxes["on a"].read()
        assert await anext(lists) == [event("on a", 1)]
        assert await anext(lists) == [event("on a", 2)]
        with pytest.raises(ReplicaEndedError, match=str(error)):
            await anext(lists)
        lists = inboxes["late on a"].read()
        assert await anext(lists) == [event("late on a")]
        with pytest.raises(ReplicaEndedError, match="too early"):
            await anext(lists)
        streams["b"].put([event("on b")])
        assert await anext(inboxes["on b"].read()) == [event("on b")]
        readers.close()
        await settle()

    run(check())


def test_a_stream_that_has_ended_is_opened_anew_for_the_next_call() -> None:
    async def check() -> None:
        replica = Replica(IDLE)
        readers = StreamReaders(replica.open_stream)
        while len(replica.opened) < 2:
            readers.open("a")
            await asyncio.sleep(IDLE)
        assert [request.number for request in replica.opened] == [0, 1]
        assert replica.join(readers).number == 1
        readers.close()
        await settle()

    run(check())


def test_a_long_list_is_read_in_parts() -> None:
    async def check() -> None:
        streams = SharedStreams(LATE)
        reader = streams.read("ingress", 0)
        first = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        stream = streams.join("ingress")
        assert stream is not None
        stream.put([event("r", i) for i in range(MOST_EVENTS + 1)])
        assert len(await first) == MOST_EVENTS
        assert await anext(reader) == [event("r", MOST_EVENTS)]
        await reader.aclose()

    run(check())


def test_events_of_a_replica_that_a_call_has_left_are_ignored() -> None:
    async def check() -> None:
        replicas = {"a": Replica(), "b": Replica()}
        readers = StreamReaders(lambda request: replicas[request.replica].open_stream(request))
        inbox = readers.add(["r"])
        for name in replicas:
            readers.open(name)
        await settle()
        streams = {name: one.join(readers) for name, one in replicas.items()}
        streams["a"].put([event("r", 1)])
        await settle()
        readers.follow(Moved(streams["b"].number), inbox)
        streams["a"].put([event("r", 2)])
        streams["b"].put([event("r", 3)])
        lists = inbox.read()
        assert await anext(lists) == [event("r", 3)]
        replicas["a"].error.set_result(ReplicaEndedError("gone"))
        await settle()
        streams["b"].put([event("r", 4)])
        assert await anext(lists) == [event("r", 4)]
        readers.close()
        await settle()

    run(check())


def test_a_stream_does_not_belong_to_the_request_that_opened_it() -> None:
    """Ray Serve cancels what was begun in the context of a request whose client has left."""
    variable: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    async def check() -> None:
        replica = Replica()

        def open_stream(request: OpenStream) -> Opened:
            seen.append(variable.get())
            return replica.open_stream(request)

        readers = StreamReaders(open_stream)
        variable.set("of a client")
        readers.open("a")
        await settle()
        readers.close()
        await settle()

    run(check())
    assert seen == ["none"]


def test_a_stream_that_cannot_be_opened_is_tried_again_for_the_next_call() -> None:
    tried: list[OpenStream] = []

    def open_stream(request: OpenStream) -> Opened:
        tried.append(request)
        raise ValueError("unforeseen")

    async def check() -> None:
        readers = StreamReaders(open_stream)
        for _ in range(2):
            readers.open("a")
            await settle()

    run(check())
    assert len(tried) == 2


class FakeEngine:
    """Runs requests of one completion each, whose next tokens a test asks for."""

    def __init__(self) -> None:
        self.listeners: dict[str, Listener] = {}
        self.cancelled: set[str] = set()

    def request(self, tokens: list[int], params: SamplingParams, request_id: str, visible: object) -> str:
        return request_id

    def submit(self, requests: Sequence[str], listener: Listener) -> "Future[None]":
        self.listeners.update(dict.fromkeys(requests, listener))
        accepted: Future[None] = Future()
        accepted.set_result(None)
        return accepted

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)
        self.listeners.pop(request_id, None)

    def deliver(self, request_id: str, *items: Item) -> None:
        if request_id in self.listeners:
            self.listeners[request_id](list(items))


class Way:
    """One replica and an ingress, in one process."""

    def __init__(self, idle: float) -> None:
        self.engine = FakeEngine()
        self.replica = EngineReplica.__new__(EngineReplica)
        self.replica._llm = SimpleNamespace(engine=self.engine, close=lambda: None)
        self.replica._name, self.replica._streams = "a", SharedStreams(idle)
        self.error = asyncio.get_running_loop().create_future()
        self.opened: list[Opened] = []
        self.calls: list[Opened] = []
        routing: Any = SimpleNamespace(replicas=["a"], begin=str, started=str, ended=str)
        maker = RequestMaker(None, vocab_size=26, max_num_seqs=4, max_model_len=64)
        self.ingress = RemoteEngine(self, routing, maker, partial(TokenBlocks, 4), seeds_of(0))
        self.got: dict[str, list[Item]] = {}

    def send(self, call: Call) -> Opened:
        self.calls.append(Opened(self.replica.run(call), asyncio.get_running_loop().create_future()))
        return self.calls[-1]

    def open_stream(self, request: OpenStream) -> Opened:
        self.opened.append(Opened(self.replica.events(request), self.error))
        return self.opened[-1]

    async def begin(self, *request_ids: str, **params: Any) -> None:
        requests = []
        for request_id in request_ids:
            self.got[request_id] = []
            state: Any = SimpleNamespace(
                request_id=request_id, params=SamplingParams(**params), prompt_token_ids=(1, 2)
            )
            requests.append(RemoteRequest(state, (), PromptBlocks.of((1, 2), 4)))
        await asyncio.wrap_future(self.ingress.submit(requests, self._take))

    def _take(self, items: list[Item]) -> None:
        for item in items:
            assert isinstance(item, RequestEvent | RequestFailedError)
            self.got[item.request_id].append(item)

    def break_streams(self) -> None:
        self.error.set_result(ReplicaEndedError("gone"))
        self.error = asyncio.get_running_loop().create_future()

    def num_ends(self, request_id: str) -> int:
        return sum(
            isinstance(item, RequestFailedError) or item.usage is not None for item in self.got[request_id]
        )

    def tokens(self, request_id: str) -> list[int]:
        items = self.got[request_id]
        return [token for item in items if isinstance(item, RequestEvent) for token in item.token_ids]

    def has_failed(self, request_id: str) -> bool:
        return any(isinstance(item, RequestFailedError) for item in self.got[request_id])


@given(seed=st.integers(0, 1 << 32), num_calls=st.integers(1, 5), may_break=st.booleans())
def test_every_call_gets_all_its_events_once_and_in_order(seed: int, num_calls: int, may_break: bool) -> None:
    """Calls begin, get tokens and are cancelled in any order, while the shared stream ends and breaks."""
    numbers = random.Random(seed)

    async def check() -> None:
        way = Way(idle=0.0)
        sent: dict[str, int] = {}
        cancelled: set[str] = set()
        waiting = [f"call {i}" for i in range(num_calls)]
        while waiting or sent.keys() - cancelled:
            action = numbers.randrange(8)
            if action == 0 and waiting:
                await way.begin(waiting[-1])
                sent[waiting.pop()] = 0
            elif action == 1 and may_break:
                way.break_streams()
            elif action == 3 and sent and numbers.random() < 0.1:
                name = numbers.choice([*sent])
                way.engine.deliver(name, RequestFailedError("broken", name))
                way.engine.listeners.pop(name, None)
            elif action == 2 and sent and numbers.random() < 0.1:
                name = numbers.choice([*sent])
                cancelled.add(name)
                way.ingress.cancel(name)
            else:
                for name in numbers.sample([*sent], numbers.randint(0, len(sent))):
                    way.engine.deliver(name, event(name, sent[name]))
                    sent[name] += 1
            for _ in range(numbers.randrange(4)):
                await asyncio.sleep(0)
            for name in [name for name in sent if sent[name] > 12]:
                way.engine.deliver(name, event(name, sent.pop(name), USAGE))
        await way.ingress.drain()
        assert way.opened
        assert not way.ingress._readers._inboxes, "a server that runs for long must not keep them"
        for name in way.got:
            tokens = way.tokens(name)
            assert tokens == list(range(len(tokens)))
            if name not in cancelled and not way.has_failed(name):
                assert len(tokens) == 14
            assert way.num_ends(name) == 1

    run(check())


def test_requests_of_an_ingress_that_has_gone_are_cancelled() -> None:
    async def check() -> None:
        way = Way(LATE)
        await way.begin("r")
        while not way.opened:
            await asyncio.sleep(0)
        await settle()
        way.engine.deliver("r", event("r"))
        await settle()
        assert way.tokens("r") == [0]
        way.opened[0].cancel()
        await settle()
        assert not way.engine.cancelled
        way.engine.deliver("r", event("r", 1))
        await settle()
        assert way.engine.cancelled == {"r"}
        await way.ingress.drain(0)

    run(check())


def test_a_stream_ends_after_its_last_call() -> None:
    async def check() -> None:
        way = Way(IDLE)
        await way.begin("r")
        while not way.replica._streams._of:
            await asyncio.sleep(0)
        way.engine.deliver("r", event("r", 0), event("r", 1, USAGE))
        while way.replica._streams._of:
            await asyncio.sleep(IDLE)
        assert (way.tokens("r"), way.engine.cancelled) == ([0, 1], set())
        await way.ingress.drain()

    run(check())


def test_a_request_that_fails_after_it_has_moved_leaves_nothing_at_the_ingress() -> None:
    async def check() -> None:
        way = Way(LATE)
        await way.begin("r")
        await way.begin("neighbour")
        while not way.replica._streams._of:
            await asyncio.sleep(0)
        way.engine.deliver("r", event("r"))
        await settle()
        way.engine.deliver("r", RequestFailedError("broken", "r"))
        await settle()
        assert [*way.ingress._tasks] == ["neighbour"]
        assert [*way.ingress._readers._inboxes] == ["neighbour"]
        assert way.num_ends("r") == 1
        await way.ingress.drain(0)

    run(check())


@pytest.mark.parametrize("has_moved", [False, True])
def test_an_engine_that_ends_ends_each_request_once(has_moved: bool) -> None:
    async def check() -> None:
        way = Way(LATE)
        await way.begin("r", "s", prompt_logprobs=None if has_moved else 0)
        while not way.replica._streams._of:
            await asyncio.sleep(0)
        way.engine.deliver("r", event("r"))
        await settle()
        dead = EngineDeadError("the engine died")
        way.engine.deliver("r", event("r", 1, USAGE), dead, dead)
        await settle()
        assert (way.num_ends("r"), way.has_failed("r"), way.num_ends("s")) == (1, False, 1)
        assert "the engine died" in str(way.got["s"][-1])
        assert not way.ingress._tasks
        await way.ingress.drain(0)

    run(check())


def test_a_call_that_ends_on_its_replica_only_is_not_waited_for() -> None:
    async def check() -> None:
        way = Way(LATE)
        await way.begin("r")
        while not way.replica._streams._of:
            await asyncio.sleep(0)
        way.engine.deliver("r", event("r"))
        await settle()
        way.calls[0].cancel()
        await settle()
        assert (way.num_ends("r"), way.has_failed("r")) == (1, True)
        assert way.engine.cancelled == {"r"}
        await way.ingress.drain(0)

    run(check())


def test_a_call_with_large_events_does_not_hold_up_others() -> None:
    async def check() -> None:
        way = Way(LATE)
        await way.begin("r", prompt_logprobs=5)
        while not way.replica._streams._of:
            await asyncio.sleep(0)
        way.engine.deliver("r", event("r"))
        await settle()
        assert way.tokens("r") == [0]
        [shared] = way.replica._streams._of.values()
        assert shared._num_calls == 0
        await way.ingress.drain(0)

    run(check())


def test_a_stream_that_was_meant_for_another_replica_ends_at_once() -> None:
    async def check() -> None:
        way = Way(LATE)
        assert await events_of(way.replica.events(OpenStream("ingress", "b", 0))) == []
        assert way.replica._streams.join("ingress") is None

    run(check())


def test_nothing_of_a_drained_ingress_stays() -> None:
    async def check() -> None:
        before = asyncio.all_tasks()
        way = Way(LATE)
        await way.begin("r")
        await settle()
        way.engine.deliver("r", event("r", 0, USAGE))
        await way.ingress.drain()
        await settle()
        assert asyncio.all_tasks() == before

    run(check())
