"""The router's view of the replicas: which blocks each one has, and how much work waits there.

It knows what replicas report and what the router itself has sent. Reports are late, so both are combined: a
request counts as load from the moment at which it is routed, and its blocks as cached. What is older than
`max_staleness` is ignored.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from .block_index import BlockIndex
from .gauge import Gauge
from .prompt_blocks import PromptBlocks
from .reports import ReplicaReport

MAX_STALENESS = 10.0  # seconds: with a report each second, nine may be lost


class _Computed(NamedTuple):
    """The blocks of a request whose prompt was computed, and when."""

    moment: float
    hashes: tuple[bytes, ...]


class Replica:
    """What the router knows of a replica.

    name: its id. number: its place in the block index. queued_tokens: prompt tokens there that are neither
    computed nor cached. unfinished: its running and waiting sequences, and the requests on their way to it.
    is_full: whether its last report says that it takes no request. reported_at: when that report was made;
    None if there is none, or if it is too old. computed: the requests whose blocks no report has confirmed.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.queued_tokens = Gauge()
        self.unfinished = Gauge()
        self.is_full = False
        self.reported_at: float | None = None
        self.computed: deque[_Computed] = deque()


class _Routed(NamedTuple):
    """A request that has not ended: its blocks and its replica."""

    blocks: PromptBlocks
    replica: Replica


class Fleet:
    """All replicas that requests may be routed to.

    A block counts as cached at a replica if one of these is true:

    - the replica's last report has it, and was made less than `max_staleness` seconds ago;
    - it belongs to a request that was routed there and whose prompt is not computed;
    - the prompt was computed less than `max_staleness` seconds ago, and no report was made since.

    A replica's load is what its last report says and what this router has sent there and seen end since
    (`Gauge`); when the report is too old, it is only what this router has sent there.

    `now` is the time in seconds, on the clock of the reports' `made_at`; it must not decrease from call to
    call. Each routed request must end (`ended`), or its load stays. Late calls are ignored: those for a
    replica that has left, or for a request that has ended.

    Not thread-safe, and without locks: callers in several threads need one.
    """

    def __init__(self, replicas: Iterable[str] = (), *, max_staleness: float = MAX_STALENESS) -> None:
        if max_staleness <= 0:
            raise ValueError(f"max_staleness ({max_staleness}) must be more than 0 seconds")
        self.max_staleness = max_staleness
        self._index = BlockIndex()
        self._replicas: dict[str, Replica] = {}
        self._numbers: dict[int, Replica] = {}
        self._free_numbers: list[int] = []
        self._routed: dict[str, _Routed] = {}
        self._computed: deque[tuple[float, Replica]] = deque()  # when prompts were computed, and where
        self._reports: list[tuple[float, str]] = []  # a heap: when a replica's report expires
        self.set_replicas(replicas, 0.0)

    @property
    def replicas(self) -> Sequence[Replica]:
        """The replicas, in the order in which they were added."""
        return tuple(self._replicas.values())

    def set_replicas(self, names: Iterable[str], now: float) -> None:
        """Add the replicas that are new, and remove those that are not named."""
        self.expire(now)
        wanted = dict.fromkeys(names)
        for name in [name for name in self._replicas if name not in wanted]:
            self.remove(name)
        for name in wanted:
            if name not in self._replicas:
                number = self._free_numbers.pop() if self._free_numbers else len(self._replicas)
                self._replicas[name] = self._numbers[number] = Replica(name, number)
                self._index.add(number)

    def remove(self, name: str) -> None:
        """Forget a replica and all requests that were routed there."""
        replica = self._replicas.pop(name, None)
        if replica is not None:
            del self._numbers[replica.number]
            self._index.remove(replica.number)
            self._free_numbers.append(replica.number)
            replica.computed.clear()
            self._routed = {key: one for key, one in self._routed.items() if one.replica is not replica}

    def take_report(self, name: str, report: ReplicaReport, now: float) -> None:
        """Replace what a replica has reported; a report that is older than its last one is ignored.

        A report from the future, of a machine whose clock is wrong, counts as made now.
        """
        self.expire(now)
        replica, made_at = self._replicas.get(name), min(report.made_at, now)
        if replica is None or made_at + self.max_staleness <= now:
            return
        if replica.reported_at is not None and made_at < replica.reported_at:
            return
        replica.reported_at, replica.is_full = made_at, report.is_full
        replica.queued_tokens.take(report.queued_tokens, made_at)
        replica.unfinished.take(report.num_running + report.num_waiting, made_at)
        self._index.report(replica.number, report.hashes)
        self._confirm(replica, made_at)
        heappush(self._reports, (made_at + self.max_staleness, name))

    def routed(self, request_id: str, blocks: PromptBlocks, name: str, now: float) -> None:
        """Note that a request was sent to a replica: it is load there, and its blocks will be cached there.

        Its load is the tokens of its prompt that do not count as cached there now. A request that is routed
        again has ended at its first replica.
        """
        self.ended(request_id, now)
        replica = self._replicas.get(name)
        if replica is None:
            return
        num_blocks = self._index.match(blocks.hashes).get(replica.number, 0)
        replica.queued_tokens.add(request_id, blocks.num_uncached(num_blocks), now)
        replica.unfinished.add(request_id, 1, now)
        self._routed[request_id] = _Routed(blocks, replica)
        self._index.expect(replica.number, blocks.hashes)

    def started(self, request_id: str, now: float) -> None:
        """Note that a request's first token came: its prompt is computed."""
        self.expire(now)
        routed = self._routed.get(request_id)
        if routed is not None and request_id in routed.replica.queued_tokens:
            routed.replica.queued_tokens.remove(request_id, now)
            routed.replica.computed.append(_Computed(now, routed.blocks.hashes))
            self._computed.append((now, routed.replica))

    def ended(self, request_id: str, now: float) -> None:
        """Note that a request has ended, for any reason."""
        self.started(request_id, now)
        routed = self._routed.pop(request_id, None)
        if routed is not None:
            routed.replica.unfinished.remove(request_id, now)

    def cached_blocks(self, blocks: PromptBlocks, now: float) -> dict[str, int]:
        """Return how many of a prompt's first blocks each replica has; replicas with none are left out."""
        self.expire(now)
        return {self._numbers[number].name: n for number, n in self._index.match(blocks.hashes).items()}

    def num_cached_tokens(self, name: str, blocks: PromptBlocks, now: float) -> int:
        """Return how many of a prompt's first tokens a replica has; 0 for one that has left."""
        return self.cached_blocks(blocks, now).get(name, 0) * blocks.block_size

    def expire(self, now: float) -> None:
        """Drop what is too old. All methods with a `now` do this first."""
        while self._computed and self._computed[0][0] + self.max_staleness <= now:
            moment, replica = self._computed.popleft()
            self._confirm(replica, moment)
        while self._reports and self._reports[0][0] <= now:
            replica_or_none = self._replicas.get(heappop(self._reports)[1])
            if replica_or_none is not None:
                self._drop_report(replica_or_none, now)

    def _drop_report(self, replica: Replica, now: float) -> None:
        """Drop a replica's report if it is too old: there may be a newer one."""
        if replica.reported_at is not None and replica.reported_at + self.max_staleness <= now:
            replica.reported_at, replica.is_full = None, False
            replica.queued_tokens.forget()
            replica.unfinished.forget()
            self._index.report(replica.number, frozenset())

    def _confirm(self, replica: Replica, moment: float) -> None:
        """Stop expecting the blocks of prompts that were computed by then."""
        while replica.computed and replica.computed[0].moment <= moment:
            self._index.take_back(replica.number, replica.computed.popleft().hashes)
