"""Simulates many replicas behind one endpoint: any number of replicas, on one core, in less than real time.

The router's policy and its view of the fleet are the real ones, and so are each replica's scheduler and
prefix cache. Only the model is missing: a step takes as long as `StepTime` says, and answers are drawn from
the trace's seed. Nothing depends on the machine, so the same arguments give the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from .fleet import MAX_STALENESS, Fleet
from .policies import RoutingPolicy
from .prompt_blocks import PromptBlocks
from .reports import ReplicaReport
from .served import Served
from .simulated_replica import ReplicaSizes, SimulatedReplica, Token
from .step_time import StepTime
from .traces import Trace


@dataclass(frozen=True)
class FleetOptions:
    """A simulated fleet; times are in seconds.

    num_routers: routers that do not know what the others have sent; the turns of a conversation go to them in
    turn. report_period: between two reports of a replica. report_delay: from when a report is made until the
    routers have it. network_delay: from a router to a replica.
    """

    num_replicas: int
    step_time: StepTime
    sizes: ReplicaSizes = field(default_factory=ReplicaSizes)
    num_routers: int = 1
    report_period: float = 1.0
    report_delay: float = 0.05
    network_delay: float = 0.002
    max_staleness: float = MAX_STALENESS


class _Router(NamedTuple):
    """A router: its policy, and its view of the fleet."""

    policy: RoutingPolicy
    fleet: Fleet


@dataclass
class _Request:
    """A request on its way, from its arrival to its last token."""

    conversation: int
    turn: int
    prompt: list[int]
    arrival: float
    router: _Router
    replica: str
    first_token: float = 0.0


class Simulator:
    """One run of a trace on a fleet.

    make_policy: makes the policy of each router. replicas: the simulated replicas, by name; after `run` they
    are idle.
    """

    def __init__(self, trace: Trace, make_policy: Callable[[], RoutingPolicy], options: FleetOptions) -> None:
        self._trace = trace
        self._options = options
        names = [f"replica-{number}" for number in range(options.num_replicas)]
        self.replicas = {name: SimulatedReplica(name, options.sizes, options.step_time) for name in names}
        self._routers = [
            _Router(make_policy(), Fleet(names, max_staleness=options.max_staleness))
            for _ in range(options.num_routers)
        ]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []  # a heap
        self._numbers = count()  # events at the same time happen in the order in which they were planned
        self._requests: dict[str, _Request] = {}
        self._served: list[Served] = []

    def run(self) -> list[Served]:
        """Serve the whole trace; return its requests in the order in which they ended. Call it once."""
        for index, conversation in enumerate(self._trace.conversations):
            self._at(conversation.arrival, partial(self._arrive, index, 0, [*conversation.system]))
        for place, replica in enumerate(self.replicas.values()):
            first = self._options.report_period * place / len(self.replicas)
            self._at(first, partial(self._make_report, replica))
        while self._events:
            now, _, happen = heappop(self._events)
            happen(now)
        return self._served

    def _at(self, moment: float, happen: Callable[[float], None]) -> None:
        heappush(self._events, (moment, next(self._numbers), happen))

    def _arrive(self, conversation: int, turn: int, before: list[int], now: float) -> None:
        """Route a turn of a conversation; before: the tokens before its new text."""
        script = self._trace.conversations[conversation]
        prompt = [*before, *script.turns[turn].text]
        request_id = f"{conversation}.{turn}"
        blocks = PromptBlocks.of(prompt, self._options.sizes.block_size, script.salt)
        router = self._routers[(conversation + turn) % len(self._routers)]
        name = router.policy.rank(blocks, router.fleet, now)[0]
        router.fleet.routed(request_id, blocks, name, now)
        self._requests[request_id] = _Request(conversation, turn, prompt, now, router, name)
        self._at(now + self._options.network_delay, partial(self._reach, request_id))

    def _reach(self, request_id: str, now: float) -> None:
        """Queue a request at its replica."""
        request = self._requests[request_id]
        replica = self.replicas[request.replica]
        salt = self._trace.conversations[request.conversation].salt
        answer = self._trace.answer(request.conversation, request.turn)
        replica.add(request_id, request.prompt, salt, answer)
        if not replica.is_busy:
            self._start_step(replica, now)

    def _start_step(self, replica: SimulatedReplica, now: float) -> None:
        seconds = replica.start_step()
        if seconds is not None:
            self._at(now + seconds, partial(self._end_step, replica))

    def _end_step(self, replica: SimulatedReplica, now: float) -> None:
        for token in replica.end_step():
            if token.is_first:
                request = self._requests[token.request_id]
                request.first_token = now
                request.router.fleet.started(token.request_id, now)
            if token.is_last:
                self._end(token, now)
        self._start_step(replica, now)

    def _end(self, token: Token, now: float) -> None:
        """Record a request, and plan the next turn of its conversation."""
        request = self._requests.pop(token.request_id)
        request.router.fleet.ended(token.request_id, now)
        turns = self._trace.conversations[request.conversation].turns
        answer = self._trace.answer(request.conversation, request.turn)
        self._served.append(
            Served(
                request_id=token.request_id,
                replica=request.replica,
                arrival=request.arrival,
                first_token=request.first_token,
                end=now,
                num_prompt_tokens=len(request.prompt),
                num_cached_tokens=token.num_cached_tokens,
                num_outputs=len(answer),
            )
        )
        if request.turn + 1 < len(turns):
            after = now + turns[request.turn + 1].think_seconds
            before = [*request.prompt, *answer]
            self._at(after, partial(self._arrive, request.conversation, request.turn + 1, before))

    def _make_report(self, replica: SimulatedReplica, now: float) -> None:
        """Send a report on its way, and plan the next one unless all requests have their answers."""
        report = replica.report(now)
        self._at(now + self._options.report_delay, partial(self._take_report, replica.name, report))
        if len(self._served) < self._trace.num_requests:
            self._at(now + self._options.report_period, partial(self._make_report, replica))

    def _take_report(self, name: str, report: ReplicaReport, now: float) -> None:
        for router in self._routers:
            router.fleet.take_report(name, report, now)
