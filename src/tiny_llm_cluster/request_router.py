"""Ray Serve's side of routing: asks a `Routing` where a call goes, and tells it what Serve knows.

Serve copies this module by value into other processes, so it must hold nothing but the class: the state is in
`routing`, where the ingress of the same process finds it.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tiny_llm_routing.fleet import MAX_STALENESS

from .calls import Call, OpenStream
from .routing import Routing


class PrefixRouter(RequestRouter):
    """Serve's interface to a `Routing`. Its options are the arguments of `initialize_state`."""

    def initialize_state(self, policy: str = "prefix", max_staleness: float = MAX_STALENESS) -> None:
        """Called by Serve when the router is made."""
        self._routing = Routing.of(self._deployment_id.name)
        self._routing.configure(policy, max_staleness)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas start or stop, and when one has reported."""
        self._routing.update({replica.replica_id.unique_id: replica.routing_stats for replica in replicas})
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call shows that a replica's process has ended."""
        self._routing.remove(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates in the order in which Serve should try them, one in each rank."""
        message = None if pending_request is None else _message_of(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if isinstance(message, Call):
            ranked = [name for name in self._routing.rank(message) if name in by_name]
        elif isinstance(message, OpenStream) and message.replica in by_name:
            return [[by_name[message.replica]]]
        else:
            return [candidate_replicas]
        known = dict.fromkeys((*ranked, *by_name))  # then those that have not reached the fleet yet
        return [[by_name[name]] for name in known]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has taken a call."""
        message = _message_of(pending_request)
        if isinstance(message, Call):
            self._routing.routed(message, replica_id.unique_id)


def _message_of(pending_request: PendingRequest) -> Any:
    """What a request carries to a replica; None for a method without arguments."""
    return next(iter(pending_request.args), None)
