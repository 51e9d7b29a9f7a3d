"""The engine of the ingress, with replicas that are scripted: no Ray, no model."""

import asyncio
import pickle
from collections import deque
from collections.abc import Iterable
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_llm.delivery import AsyncListener, Gathering
from tiny_llm.layer_groups import group_layers
from tiny_llm.outputs import RequestMetrics
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.request_maker import RequestMaker
from tiny_llm.sampling_params import MAX_SEED

from promises import policies
from tiny_llm import (
    EngineCore,
    EngineDeadError,
    EngineStats,
    EngineStoppingError,
    QueueFullError,
    RequestEvent,
    RequestFailedError,
    RequestUsage,
    SamplingParams,
    TinyLLMError,
)
from tiny_llm_cluster import MESSAGE_LIMIT
from tiny_llm_cluster.answers import ReplicaEndedError, ReplicaError
from tiny_llm_cluster.calls import Accepted, Call, Failure, OpenStream, PromptCall, Refused
from tiny_llm_cluster.remote_engine import MOST_ENDED, RemoteEngine, seeds_of
from tiny_llm_cluster.remote_model import _new_stream
from tiny_llm_cluster.remote_request import RemoteRequest
from tiny_llm_cluster.routing import Routing as ClusterRouting
from tiny_llm_routing.prompt_blocks import PromptBlocks
from tiny_llm_routing.reports import read_report
from tiny_llm_server import ServerConfig
from tiny_llm_server.service import Service

Answer = Any  # what a scripted replica yields or raises, or a function that is awaited


def usage(tokens: int) -> RequestUsage:
    return RequestUsage(3, tokens, 0, RequestMetrics(0.0))


def event(request_id: str, index: int = 0, *, reason: str | None = None, ends: bool = False) -> RequestEvent:
    return RequestEvent(request_id, index, "x", (7,), finish_reason=reason, usage=usage(1) if ends else None)


class Script:
    """The answers of one replica to one call."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self.answers = deque(answers)
        self.is_cancelled = False

    def __aiter__(self) -> "Script":
        return self

    async def __anext__(self) -> Any:
        if not self.answers:
            raise StopAsyncIteration
        answer = self.answers.popleft()
        if callable(answer):
            answer = await answer()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self) -> None:
        self.is_cancelled = True


class Routing:
    """Replicas by name, and what the engine has told."""

    def __init__(self, *replicas: str) -> None:
        self.replicas = list(replicas)
        self.stats: dict[str, EngineStats] = {}
        self.told: list[tuple[str, str]] = []

    def begin(self, call_id: str) -> None:
        self.told.append(("begin", call_id))

    def started(self, call_id: str) -> None:
        self.told.append(("started", call_id))

    def ended(self, call_id: str) -> None:
        self.told.append(("ended", call_id))


class Bench:
    """An engine whose calls are answered by scripts, one after the other.

    shared: the scripts of shared streams, in the order in which they are opened; those after them are silent.
    """

    def __init__(
        self,
        *scripts: Iterable[Answer],
        replicas: Iterable[str] = ("a", "b"),
        shared: Iterable[Iterable[Answer]] = (),
    ) -> None:
        self.scripts = deque(Script(script) for script in scripts)
        self.shared = deque(Script(script) for script in shared)
        self.calls: list[Call] = []
        self.sent: list[Script] = []
        self.opened: list[OpenStream] = []
        self.routing = Routing(*replicas)
        maker = RequestMaker(None, vocab_size=26, max_num_seqs=4, max_model_len=64)
        self.engine = RemoteEngine(self, self.routing, maker, partial(TokenBlocks, 4), seeds_of(0))

    def send(self, call: Call) -> Script:
        self.calls.append(call)
        self.sent.append(self.scripts.popleft())
        return self.sent[-1]

    def open_stream(self, request: OpenStream) -> Script:
        self.opened.append(request)
        return self.shared.popleft() if self.shared else Script([forever])

    def request(self, request_id: str = "r", **params: Any) -> RemoteRequest:
        state: Any = FakeState(request_id, SamplingParams(**params))
        return RemoteRequest(state, (), PromptBlocks.of(state.prompt_token_ids, 4))

    async def run(self, *requests: RemoteRequest) -> list[RequestEvent]:
        """Submit requests and return all their events. Raises what a server would see."""
        listener, gathering = AsyncListener(), Gathering(requests)
        await asyncio.wrap_future(self.engine.submit(requests, listener))
        events: list[RequestEvent] = []
        while gathering.unfinished:
            events += gathering.take(await listener.next_items())
            gathering.check()
        return events


class FakeState:
    """The part of a `RequestState` that a remote request reads."""

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self.request_id, self.params = request_id, params
        self.prompt_token_ids = (1, 2, 3)


def run(bench: Bench, *requests: RemoteRequest) -> list[RequestEvent]:
    return asyncio.run(asyncio.wait_for(bench.run(*requests), 30))


async def forever() -> None:
    await asyncio.Event().wait()


def test_events_arrive_in_order_and_the_routing_learns_of_the_first_token_and_of_the_end() -> None:
    bench = Bench([Accepted("a"), [event("r")], [event("r", reason="length", ends=True)]])
    assert [one.finish_reason for one in run(bench, bench.request())] == [None, "length"]
    assert bench.routing.told == [("begin", "r"), ("started", "r"), ("ended", "r")]
    assert bench.sent[0].is_cancelled, "nothing of the call may stay on the replica"


def test_a_call_carries_all_prompts_and_the_blocks_of_the_first() -> None:
    ends = [event(name, reason="stop", ends=True) for name in ("r", "s")]
    bench = Bench([Accepted("a"), ends])
    run(bench, bench.request("r"), bench.request("s"))
    [call] = bench.calls
    assert [prompt.request_id for prompt in call.prompts] == ["r", "s"]
    assert call.blocks.num_tokens == 3


@pytest.mark.parametrize(
    "error", [QueueFullError("full"), EngineStoppingError("stops"), EngineDeadError("dead")]
)
def test_a_replica_that_cannot_take_a_call_is_left_out_next_time(error: TinyLLMError) -> None:
    bench = Bench([Refused("a", error)], [Accepted("b"), [event("r", reason="stop", ends=True)]])
    assert len(run(bench, bench.request())) == 1
    assert [call.refused_by for call in bench.calls] == [frozenset(), frozenset({"a"})]


def test_the_client_gets_the_error_if_all_replicas_are_full() -> None:
    full = QueueFullError("2 requests wait and max_num_waiting is 2")
    bench = Bench(*([Refused(name, full)] for name in "aba"))
    with pytest.raises(QueueFullError, match="max_num_waiting is 2"):
        run(bench, bench.request())
    assert bench.routing.told == [("begin", "r"), ("ended", "r")]


def test_an_error_of_the_request_itself_is_not_tried_elsewhere() -> None:
    bench = Bench([Refused("a", TinyLLMError("wrong"))])
    with pytest.raises(TinyLLMError, match="wrong"):
        run(bench, bench.request())
    assert len(bench.calls) == 1


def test_a_replica_that_ends_before_it_accepts_loses_nothing() -> None:
    bench = Bench([ReplicaEndedError("ended")], [Accepted("b"), [event("r", reason="stop", ends=True)]])
    assert [one.finish_reason for one in run(bench, bench.request())] == ["stop"]
    assert bench.sent[0].is_cancelled, "perhaps only the way to the replica has broken"


def test_a_replica_that_ends_in_the_middle_fails_the_unfinished_completions_only() -> None:
    bench = Bench(
        [Accepted("a"), [event("r", 0, reason="length")], [event("r", 1)], ReplicaEndedError("gone")]
    )
    events = run(bench, bench.request(n=2))
    assert [(one.index, one.finish_reason) for one in events] == [(0, "length"), (1, None), (1, "error")]
    assert events[-1].error == "gone"
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 2


def test_a_stream_that_stops_without_an_end_is_an_error() -> None:
    bench = Bench([Accepted("a"), [event("r")]])
    with pytest.raises(RequestFailedError, match="ended its answer too early"):
        run(bench, bench.request())


def test_a_request_that_fails_on_its_replica_does_not_end_its_neighbour() -> None:
    bench = Bench([Accepted("a"), [Failure("r", "broken")], [event("s", reason="stop", ends=True)]])
    events = run(bench, bench.request("r"), bench.request("s"))
    assert [(one.request_id, one.finish_reason) for one in events] == [("r", "error"), ("s", "stop")]


def test_cancelling_ends_the_call_on_its_replica() -> None:
    bench = Bench([Accepted("a"), [event("r")], forever])

    async def leave() -> None:
        listener = AsyncListener()
        await asyncio.wrap_future(bench.engine.submit([bench.request()], listener))
        await listener.next()
        bench.engine.cancel("unknown")
        bench.engine.cancel("r")
        [last] = await listener.next()
        assert last.finish_reason == "abort"

    asyncio.run(asyncio.wait_for(leave(), 30))
    assert bench.sent[0].is_cancelled
    assert bench.routing.told[-1] == ("ended", "r")


def test_cancelling_before_a_replica_has_accepted_ends_the_call_there_too() -> None:
    bench = Bench([forever])

    async def leave() -> None:
        accepted = bench.engine.submit([bench.request()], AsyncListener())
        await asyncio.sleep(0.01)
        assert bench.sent
        bench.engine.cancel("r")
        with pytest.raises(EngineStoppingError, match="cancelled"):
            await asyncio.wrap_future(accepted)

    asyncio.run(asyncio.wait_for(leave(), 30))
    assert bench.sent[0].is_cancelled
    assert bench.routing.told == [("begin", "r"), ("ended", "r")]


def test_a_call_that_ends_its_replicas_does_not_end_all_of_them() -> None:
    names = [f"replica-{i}" for i in range(9)]
    bench = Bench(*([ReplicaEndedError("ended")] for _ in names), replicas=names)
    with pytest.raises(EngineStoppingError, match="no replica has taken the request: ended"):
        run(bench, bench.request())
    assert len(bench.calls) == MOST_ENDED + 1


def test_a_call_at_which_a_replica_fails_is_not_tried_elsewhere() -> None:
    bench = Bench([ReplicaError("the replica failed: broken")])
    with pytest.raises(ReplicaError, match="broken"):
        run(bench, bench.request())
    assert len(bench.calls) == 1


def test_a_replica_that_answers_nothing_is_not_waited_for() -> None:
    bench = Bench([], [Accepted("b"), [event("r", reason="stop", ends=True)]])
    assert [one.finish_reason for one in run(bench, bench.request())] == ["stop"]


@pytest.mark.parametrize(("timeout", "reason"), [(None, "stop"), (0.01, "abort")])
def test_draining_refuses_new_requests_and_waits_for_the_others(timeout: float | None, reason: str) -> None:
    released = asyncio.Event()

    async def later() -> list[RequestEvent]:
        await released.wait()
        return [event("r", reason="stop", ends=True)]

    async def drain() -> None:
        bench, listener = Bench([Accepted("a"), later]), AsyncListener()
        await asyncio.wrap_future(bench.engine.submit([bench.request()], listener))
        draining = asyncio.create_task(bench.engine.drain(timeout))
        await asyncio.sleep(0)
        with pytest.raises(EngineStoppingError, match="draining"):
            bench.engine.submit([bench.request("late")], listener)
        if timeout is None:
            released.set()
        await draining
        assert [one.finish_reason for one in await listener.next()] == [reason]

    asyncio.run(asyncio.wait_for(drain(), 30))


def test_without_replicas_requests_are_refused_at_once() -> None:
    bench = Bench(replicas=())
    with pytest.raises(EngineStoppingError, match="no replica is ready"):
        run(bench, bench.request())
    assert isinstance(bench.engine.refusal, EngineStoppingError)


def test_a_request_without_a_seed_gets_the_one_that_a_single_engine_would_give() -> None:
    """Oracle: the seeds of `EngineCore`."""
    scripts = [[Accepted("a"), [event(name, reason="stop", ends=True)]] for name in "rst"]
    bench = Bench(*scripts)
    for request in (bench.request("r"), bench.request("s", seed=5), bench.request("t")):
        run(bench, request)
    core = EngineCore(PagedBatchManager(8, 4, 4), ())
    for name, seed in (("r", None), ("s", 5), ("t", None)):
        core.add_request(name, [1, 2, 3], SamplingParams(seed=seed))
    expected = [core.manager.sequence(name).seed for name in "rst"]
    assert [call.prompts[0].seed for call in bench.calls] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("seed", [0, 7, MAX_SEED])
def test_no_two_ingresses_give_the_same_seeds(seed: int) -> None:
    """Also an ingress that replaces one of them has another name."""
    names = [None, *(f"ingress{i}" for i in range(40))]
    seeds = [given for name in names for given in islice(seeds_of(seed, name), 100)]
    assert len({*seeds}) == len(seeds) == 4100
    assert all(0 <= given <= MAX_SEED for given in seeds)
    assert [*islice(seeds_of(seed, "ingress1"), 9)] == [*islice(seeds_of(seed, "ingress1"), 9)]


@pytest.mark.parametrize("windows", [(None,), (None, 5), (5, None), (None, 4, 7)])
def test_the_ingress_hashes_a_prompt_as_replicas_do(windows: tuple[int | None, ...]) -> None:
    """Oracle: what a replica's prefix cache keeps of the same prompt, also if layers have windows."""
    groups = group_layers(windows)
    manager = PagedBatchManager(80, 3, 4, policies=policies(True, prefix=True, groups=groups), groups=groups)
    prompt = [*range(14)]
    manager.add_request(prompt, "r", SamplingParams(max_tokens=1, cache_salt="s"))
    manager.process_batch()
    kept = read_report(manager, 0.0).hashes
    layout = PageLayout(tuple(groups), 3, 64)
    for salt, known in (("s", 4), ("", 0)):
        blocks = PromptBlocks.of_stream(prompt, _new_stream(layout, salt))
        assert len(blocks.hashes) == 4
        assert len(kept.intersection(blocks.hashes)) == known


@pytest.mark.parametrize("replicas", [(), ("a",)])
def test_a_server_without_replicas_is_unavailable_and_a_draining_one_is_draining(
    replicas: tuple[str, ...],
) -> None:
    bench = Bench(replicas=replicas)
    service = Service(lambda: None, ServerConfig())  # type: ignore[arg-type, return-value]
    service._llm = SimpleNamespace(engine=bench.engine)  # type: ignore[assignment]
    assert service.status.value == ("ready" if replicas else "unavailable")
    asyncio.run(bench.engine.drain())
    assert service.status.value == "draining"


@pytest.mark.parametrize("late", ["rank", "routed"])
def test_a_call_that_has_ended_is_no_load_if_the_router_names_it_later(late: str) -> None:
    """A client that leaves early: Serve's router works in another thread, and may be behind."""
    routing = ClusterRouting()
    routing.update({"a": {}})
    call = Call((PromptCall("r", (1, 2, 3), 0),), SamplingParams(), (), PromptBlocks.of((1, 2, 3), 4))
    [replica] = routing._fleet.replicas
    routing.begin("r")
    assert routing.rank(call) == ["a"]
    assert (replica.queued_tokens.value, replica.unfinished.value) == (3, 1)
    routing.ended("r")
    routing.rank(call) if late == "rank" else routing.routed(call, "a")
    assert (replica.queued_tokens.value, replica.unfinished.value) == (0, 0)


def all_errors(base: type[TinyLLMError] = TinyLLMError) -> list[type[TinyLLMError]]:
    return [base, *(kind for one in base.__subclasses__() for kind in all_errors(one))]


@pytest.mark.parametrize("kind", all_errors())
def test_errors_survive_the_way_between_processes(kind: type[TinyLLMError]) -> None:
    for arguments in (("a message",), ("a message", "second")):
        try:
            error = kind(*arguments)
        except TypeError:
            continue
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_ray_takes_long_messages() -> None:
    """The log-probabilities of a prompt of 8,000 tokens have more than Ray's usual 4 MiB."""
    from ray.serve._private.constants import RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH as LIMIT

    assert str(LIMIT) in MESSAGE_LIMIT.values()
