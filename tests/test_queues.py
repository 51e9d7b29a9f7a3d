"""The queues of requests keep the order of plain sorted lists, at a cost that does not grow.

Oracle: `Lists`, queues that are sorted lists and are searched from end to end.
"""

import gc
import sys
from bisect import insort
from collections.abc import Callable, Iterable
from time import process_time
from types import FrameType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.errors import DuplicateRequestError
from tiny_llm.queues import RequestQueues
from tiny_llm.ranked_queue import RankedQueue
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler import AgedPriority
from tiny_llm.sequence import Sequence, SequenceState, completion_ids

from tiny_llm import EngineCore, PagedBatchManager
from tiny_model import examples

KEY = AgedPriority(patience=3).key


def leader(request_id: str, n: int = 1, priority: int = 0) -> Sequence:
    return Sequence(
        seq_id=completion_ids(request_id, n)[0],
        request_id=request_id,
        prompt=(1, 2),
        params=SamplingParams(n=n, priority=priority),
        seed=0,
        max_len=9,
        num_forks=n - 1,
    )


class Lists:
    """The oracle: the ids that wait, run or are set aside, by rank; every question is a search."""

    def __init__(self) -> None:
        self.waiting: list[tuple[tuple[int, int, int], str]] = []
        self.running: list[tuple[tuple[int, int, int], str]] = []
        self.represented: dict[str, list[str]] = {}  # ids that a leader still represents
        self.request_of: dict[str, str] = {}
        self.isolated: str | None = None
        self.num_arrived = 0

    def add(self, request_id: str, n: int, priority: int) -> None:
        first, *others = completion_ids(request_id, n)
        insort(self.waiting, ((KEY(self.num_arrived, priority), self.num_arrived, 0), first))
        self.num_arrived += 1
        self.represented[first] = others
        self.request_of.update(dict.fromkeys([first, *others], request_id))

    def in_use(self, ids: Iterable[str]) -> bool:
        return any(name in self.request_of or name in self.request_of.values() for name in ids)

    @property
    def may_run(self) -> list[str]:
        return [name for _, name in self.waiting if self.isolated in (None, self.request_of[name])]

    def move(self, name: str, source: str, target: str) -> None:
        [entry] = [one for one in getattr(self, source) if one[1] == name]
        getattr(self, source).remove(entry)
        insort(getattr(self, target), entry)

    def fork(self, name: str) -> None:
        [(rank, _)] = [one for one in self.running if one[1] == name]
        for place, fork in enumerate(self.represented.pop(name, []), start=1):
            insort(self.running, ((*rank[:2], place), fork))

    def end(self, name: str) -> None:
        self.waiting = [one for one in self.waiting if one[1] != name]
        self.running = [one for one in self.running if one[1] != name]
        for gone in (name, *self.represented.pop(name, [])):
            del self.request_of[gone]


class QueuesLikeLists(RuleBasedStateMachine):
    """Random requests, starts, returns to waiting, forks, ends and fault isolations, in both."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: RequestQueues[Sequence] = RequestQueues(KEY)
        self.lists = Lists()

    @rule(name=st.sampled_from("abcdef"), n=st.integers(1, 3), priority=st.integers(-2, 2))
    def add(self, name: str, n: int, priority: int) -> None:
        ids = completion_ids(name, n)
        if self.lists.in_use((name, *ids)):
            with pytest.raises(DuplicateRequestError, match=f"'{name}' is in use"):
                self.queues.refuse_id_in_use(name, ids)
            return
        self.queues.refuse_id_in_use(name, ids)
        self.queues.add(leader(name, n, priority))
        self.lists.add(name, n, priority)

    @precondition(lambda self: self.lists.may_run)
    @rule()
    def start_next(self) -> None:
        name = self.lists.may_run[0]
        assert self.queues.start_next().seq_id == name
        self.lists.move(name, "waiting", "running")

    @precondition(lambda self: self.lists.running)
    @rule(at=st.integers(0, 9))
    def return_to_waiting(self, at: int) -> None:
        name = self.lists.running[at % len(self.lists.running)][1]
        assert [one.seq_id for one in self.queues.return_to_waiting(self.queues[name])] == [name]
        self.lists.move(name, "running", "waiting")

    @precondition(lambda self: self.lists.running)
    @rule(at=st.integers(0, 9))
    def fork(self, at: int) -> None:
        name = self.lists.running[at % len(self.lists.running)][1]
        if self.lists.represented.get(name):
            self.queues.fork(self.queues[name])
        self.lists.fork(name)

    @precondition(lambda self: self.lists.running)
    @rule(at=st.integers(0, 9))
    def end_one(self, at: int) -> None:
        name = self.lists.running[at % len(self.lists.running)][1]
        if not self.lists.represented.get(name):
            assert self.queues.end(name).state is SequenceState.FINISHED
            self.lists.end(name)

    @rule(name=st.sampled_from("abcdef"))
    def cancel(self, name: str) -> None:
        active = [seq for _, seq in [*self.lists.waiting, *self.lists.running]]
        own = {seq for seq in active if self.lists.request_of[seq] == name}
        ids = self.queues.remove_pending_forks(name)
        assert set(ids) == own
        for seq_id in ids:
            self.queues.end(seq_id)
            self.lists.end(seq_id)

    @rule(name=st.sampled_from([*"abcdef", None]))
    def isolate(self, name: str | None) -> None:
        self.queues.isolate(name)
        self.lists.isolated = name

    @invariant()
    def both_agree(self) -> None:
        queues, lists = self.queues, self.lists
        waiting = [name for _, name in lists.waiting]
        assert [one.seq_id for one in queues.waiting] == lists.may_run
        assert [one.seq_id for one in queues.set_aside] == [
            one for one in waiting if one not in lists.may_run
        ]
        assert [one.seq_id for one in queues.running] == [name for _, name in lists.running]
        assert len(queues) == len(lists.request_of)
        assert queues.num_waiting_requests == len({lists.request_of[name] for name in waiting})
        for name in "abcdef":
            assert queues.has_request(name) == (name in lists.request_of.values())
        assert len(queues.waiting) == len(lists.may_run)


QueuesLikeLists.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestQueuesLikeLists = QueuesLikeLists.TestCase


def test_a_queue_is_a_sequence_in_order_of_ranks() -> None:
    queue: RankedQueue[Sequence] = RankedQueue()
    members = [leader(name) for name in "abc"]
    for rank, member in zip([(2, 0, 0), (0, 1, 0), (1, 2, 0)], members, strict=True):
        member.rank = rank
        queue.add(member)
    a, b, c = members
    assert queue == [b, c, a]
    assert (queue.first(), queue[0], queue[1], queue[-1], queue[1:]) == (b, b, c, a, [c, a])
    queue.discard(b)
    queue.discard(b)
    assert (queue.first(), len(queue), b in queue, a in queue) == (c, 2, False, True)
    assert bool(queue)
    for member in (a, c):
        queue.discard(member)
    assert not queue
    with pytest.raises(IndexError):
        queue.first()


def test_the_head_has_each_member_once_even_if_some_left_and_came_back() -> None:
    queue: RankedQueue[Sequence] = RankedQueue()
    members = [leader(str(number)) for number in range(20)]
    for number, member in enumerate(members):
        member.rank = (number, number, 0)
        queue.add(member)
    for member in (members[0], members[2], members[3]):
        queue.discard(member)
    for member in (members[2], members[0]):
        queue.add(member)
    expected = [members[place] for place in (0, 1, 2, 4)]
    assert queue.head(4) == queue.head(4) == expected
    assert queue.head(99) == list(queue)
    assert len(queue.head(99)) == 19


def test_members_that_are_removed_after_a_lasting_head_leave_no_memory_behind() -> None:
    """A head that never leaves must not keep the ranks of all members that came and left after it."""
    queue: RankedQueue[Sequence] = RankedQueue()
    for number in range(10_000):
        member = leader(str(number))
        member.rank = (number, number, 0)
        queue.add(member)
        if number:
            queue.discard(member)
    assert len(queue._heap) < 100


def _seconds(num_requests: int) -> float:
    """Processor time to queue this many requests, to take fifty steps while they wait, and to cancel them."""
    manager = PagedBatchManager(600, 4, 8, max_batched_tokens=24)
    began = process_time()
    for number in range(num_requests):
        manager.add_request([1, 2, 3], str(number), SamplingParams(priority=-number))
    for _ in range(50):
        manager.process_batch()
    for number in reversed(range(num_requests)):
        manager.cancel(str(number))
    took = process_time() - began
    assert not manager.has_work
    return took


def test_twenty_thousand_requests_are_queued_and_cancelled_in_linear_time() -> None:
    """Ten times as many cost about ten times as much; a search for each would make it a hundred times."""
    _seconds(200)
    few, many = min(_seconds(2000) for _ in range(3)), _seconds(20_000)
    assert many < 40 * few


def _calls(function: Callable[[], object]) -> int:
    """The number of function calls, Python's and C's, that a call makes, without garbage collections."""
    count = 0

    def profiled(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(profiled)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("batching", ["paged", "dense"])
def test_the_cost_of_a_step_does_not_depend_on_the_waiting_requests(batching: str) -> None:
    """Counted: the calls of a step and of the statistics after it, with 10 waiting requests and 5,000."""
    counts = []
    for num_waiting in (10, 5000):
        manager = PagedBatchManager(40, 4, 4, max_batched_tokens=24) if batching == "paged" else dense()
        core = EngineCore(manager, ())
        for number in range(4 + num_waiting):
            core.add_request(str(number), [1, 2, 3], SamplingParams(max_tokens=30))
        for _ in range(2):
            manager.process_batch()
            manager.commit({sequence.seq_id: 5 for sequence in manager.running})
        assert len(manager.waiting) == num_waiting
        counts.append(_calls(manager.process_batch) + _calls(lambda core=core: core.stats))
    assert counts[0] == counts[1]


def dense() -> DenseBatchManager:
    return DenseBatchManager(4, 64, max_batched_tokens=24)
