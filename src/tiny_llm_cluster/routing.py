"""What a process knows of the replicas, and where its calls go.

Ray Serve's router has an event loop of its own, and the ingress another one: a lock protects the fleet.
"""

from collections.abc import Mapping, Sequence
from threading import Lock
from time import time
from typing import Any, ClassVar

from tiny_llm import EngineStats
from tiny_llm_routing.fleet import MAX_STALENESS, Fleet
from tiny_llm_routing.policies import make_policy
from tiny_llm_routing.reports import ReplicaReport

from .calls import Call
from .messages import stats_of


class Routing:
    """Where calls go, and what the replicas last said. Any thread may use it.

    policy: a name of `POLICIES`. max_staleness: as in `Fleet`.
    """

    _of_deployments: ClassVar[dict[str, "Routing"]] = {}

    def __init__(self, policy: str = "prefix", max_staleness: float = MAX_STALENESS) -> None:
        self._policy = make_policy(policy)
        self._fleet = Fleet(max_staleness=max_staleness)
        self._stats: dict[str, EngineStats] = {}
        self._calls: set[str] = set()  # begun and not ended: Serve's router may name a call after its end
        self._lock = Lock()
        self._now = 0.0

    @classmethod
    def of(cls, deployment: str) -> "Routing":
        """The routing of a deployment in this process, which its router fills."""
        return cls._of_deployments.setdefault(deployment, cls())

    def configure(self, policy: str, max_staleness: float) -> None:
        """Set the policy and the bound on staleness, before the first call."""
        with self._lock:
            self._policy, self._fleet = make_policy(policy), Fleet(max_staleness=max_staleness)

    @property
    def stats(self) -> Mapping[str, EngineStats]:
        """The figures of each replica, as it last reported them."""
        return self._stats

    @property
    def replicas(self) -> Sequence[str]:
        """The names of the replicas that calls may go to."""
        with self._lock:
            return [replica.name for replica in self._fleet.replicas]

    def update(self, replicas: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the replicas that run, and the routing stats of each: empty until its first report."""
        with self._lock:
            now = self._time()
            self._fleet.set_replicas(replicas, now)
            for name, message in replicas.items():
                if message:
                    self._fleet.take_report(name, ReplicaReport.of_message(message["report"]), now)
            self._stats = {name: stats_of(one["stats"]) for name, one in replicas.items() if one}

    def remove(self, replica: str) -> None:
        """Forget a replica that has died."""
        with self._lock:
            self._fleet.remove(replica)
            self._stats = {name: stats for name, stats in self._stats.items() if name != replica}

    def begin(self, call_id: str) -> None:
        """Note that a call will be sent; until it has ended, it counts as load of its replica."""
        with self._lock:
            self._calls.add(call_id)

    def rank(self, call: Call) -> list[str]:
        """The replicas in the order in which the call should try them; it counts as load of the first."""
        with self._lock:
            now = self._time()
            names = self._policy.rank(call.blocks, self._fleet, now)
            names.sort(key=lambda name: name in call.refused_by)
            if names and call.call_id in self._calls:
                self._fleet.routed(call.call_id, call.blocks, names[0], now)
            return names

    def routed(self, call: Call, replica: str) -> None:
        """Note where a call went, which may be another replica than the first of its rank."""
        with self._lock:
            if call.call_id in self._calls:
                self._fleet.routed(call.call_id, call.blocks, replica, self._time())

    def started(self, call_id: str) -> None:
        """Note that a call's first token came."""
        with self._lock:
            self._fleet.started(call_id, self._time())

    def ended(self, call_id: str) -> None:
        """Note that a call has ended, for any reason."""
        with self._lock:
            self._calls.discard(call_id)
            self._fleet.ended(call_id, self._time())

    def _time(self) -> float:
        """The time of day, which replicas on other machines use too; it never goes back."""
        self._now = max(self._now, time())
        return self._now
