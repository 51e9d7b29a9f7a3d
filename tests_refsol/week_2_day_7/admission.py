"""Day 2.7, tasks 2 and 3: requests are queued or rejected, and start when enough slots are free."""

import pytest
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.errors import DuplicateRequestError, RequestTooLargeError
from tiny_llm.sampling_params import SamplingParams

from common.toy_requests import ids, limits

# Task 2: DenseBatchManager.add_request


def test_task_2_a_new_request_waits_without_a_slot() -> None:
    """Oracle: by hand: it is queued and gets a slot only when it is admitted."""
    manager = DenseBatchManager(2, 16)
    assert not manager.has_work
    assert manager.add_request([5, 6, 7], "a", limits(), seed=9) is True
    assert manager.has_work
    assert (ids(manager.waiting), ids(manager.running)) == (["a"], [])
    assert manager.capacity.num_free == 2
    sequence = manager.sequence("a")
    assert (sequence.seq_id, sequence.request_id, sequence.prompt) == ("a", "a", (5, 6, 7))
    assert (sequence.params, sequence.seed) == (limits(), 9)
    assert (sequence.outputs, sequence.num_computed, sequence.num_forks) == ([], 0, 0)


def test_task_2_requests_wait_in_the_order_of_their_arrival() -> None:
    """Oracle: by hand; sorting by name or length gives another order."""
    manager = DenseBatchManager(2, 16)
    for name, length in (("m", 3), ("z", 1), ("a", 2)):
        manager.add_request([1] * length, name, limits())
    assert ids(manager.waiting) == ["m", "z", "a"]


def test_task_2_the_prompt_is_copied() -> None:
    """Oracle: by hand: the caller may change the list later."""
    manager, tokens = DenseBatchManager(2, 16), [5, 6, 7]
    manager.add_request(tokens, "a", limits())
    tokens.append(8)
    assert manager.sequence("a").prompt == (5, 6, 7)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(1, 4), (4, 7), (13, 16), (None, 16)])
def test_task_2_max_len_is_limited_by_the_request_or_by_the_cache(
    max_tokens: int | None, max_len: int
) -> None:
    """Oracle: by hand: 3 prompt tokens plus the outputs, or the 16 positions of the cache."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits(max_tokens))
    assert manager.sequence("a").max_len == max_len


def test_task_2_without_parameters_the_default_sampling_params_are_used() -> None:
    """Oracle: by hand: `SamplingParams()` means 16 tokens and one completion."""
    manager = DenseBatchManager(2, 32)
    manager.add_request([5, 6, 7], "a")
    assert manager.sequence("a").params == SamplingParams()
    assert manager.sequence("a").max_len == 19


def test_task_2_parallel_completions_wait_as_one_leader_with_all_their_ids() -> None:
    """Oracle: by hand: three completions are a leader and two pending forks."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=3))
    assert ids(manager.waiting) == ["a/0"]
    leader = manager.sequence("a/0")
    assert (leader.request_id, leader.num_forks) == ("a", 2)
    assert manager.sequence("a/1") is manager.sequence("a/2") is leader


def test_task_2_an_empty_prompt_is_rejected() -> None:
    """Oracle: the docstring; nothing changes."""
    manager = DenseBatchManager(2, 16)
    with pytest.raises(ValueError):
        manager.add_request([], "a", limits())
    assert not manager.has_work
    assert ids(manager.waiting) == []


TOO_LARGE = {
    "prompt_and_outputs_too_long": (13, limits(4)),
    "no_position_for_one_output": (16, limits(1)),
    "no_position_for_any_output": (16, limits(None)),
    "prompt_too_long": (40, limits(None)),
    "more_completions_than_slots": (2, limits(n=3)),
}


@pytest.mark.parametrize(("length", "params"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_task_2_a_request_that_could_never_run_is_rejected(length: int, params: SamplingParams) -> None:
    """Oracle: by hand, for 2 slots of 16 tokens: 17 tokens, no position for an output, or 3 completions.

    Nothing changes: the id is free for a request that can run.
    """
    manager = DenseBatchManager(2, 16)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * length, "a", params)
    assert not manager.has_work
    assert manager.add_request([1] * 12, "a", limits(4, n=2))
    assert ids(manager.waiting) == ["a/0"]


@pytest.mark.parametrize(
    ("name", "n"), [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b/0", 1), ("b/1", 1), ("c", 2)]
)
def test_task_2_an_id_in_use_is_rejected(name: str, n: int) -> None:
    """Oracle: the docstring: "a" is in use, "b", whose completions are "b/0" and "b/1", and "c/1".

    Two completions of a request "c" would be "c/0" and "c/1".
    """
    manager = DenseBatchManager(2, 16)
    manager.add_request([1, 2], "a", limits())
    manager.add_request([3, 4], "b", limits(n=2))
    manager.add_request([7], "c/1", limits())
    with pytest.raises(DuplicateRequestError):
        manager.add_request([5, 6], name, limits(n=n))
    assert ids(manager.waiting) == ["a", "b/0", "c/1"]
    assert [manager.sequence(name).prompt for name in ("a", "b/1", "c/1")] == [(1, 2), (3, 4), (7,)]


# Task 3: DenseBatchManager.admit


def queued(slots: int, *requests: tuple[str, int]) -> DenseBatchManager:
    """A manager in which requests wait, in this order: an id and a number of completions each."""
    manager = DenseBatchManager(slots, 16, max_batched_tokens=4)
    for name, n in requests:
        manager.add_request([1, 2], name, limits(n=n))
    return manager


def test_task_3_a_request_starts_when_a_slot_is_free() -> None:
    """Oracle: by hand: it runs in a slot, and nothing is computed yet."""
    manager = queued(2, ("a", 1))
    manager.admit()
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.capacity.num_free == 1
    assert manager.sequence("a").num_computed == 0


def test_task_3_the_oldest_waiting_request_starts_first() -> None:
    """Oracle: by hand: there are slots for two of four; sorting by name gives another order."""
    manager = queued(2, ("d", 1), ("c", 1), ("b", 1), ("a", 1))
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["d", "c"], ["b", "a"])
    assert manager.capacity.num_free == 0


def test_task_3_admitting_again_changes_nothing_while_all_slots_are_taken() -> None:
    """Oracle: by hand."""
    manager = queued(1, ("a", 1), ("b", 1))
    for _ in range(3):
        manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["b"])


def test_task_3_admitting_without_waiting_requests_changes_nothing() -> None:
    """Oracle: by hand."""
    manager = queued(2)
    manager.admit()
    assert manager.capacity.num_free == 2


def test_task_3_a_request_starts_only_if_every_completion_gets_a_slot() -> None:
    """Oracle: by hand: one slot is free, and "b" needs two. "c", which needs one, does not overtake it."""
    manager = queued(2, ("a", 1), ("b", 2), ("c", 1))
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["b/0", "c"])
    assert manager.capacity.num_free == 1


def test_task_3_slots_reserved_for_the_forks_of_running_leaders_stay_reserved() -> None:
    """Oracle: by hand: the leader holds one of two slots, and its pending fork needs the other.

    Common mistake: counting only the slots in use, which leaves none for the fork.
    """
    manager = queued(2, ("a", 2))
    manager.admit()
    manager.add_request([2], "b", limits())
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0"], ["b"])
    assert manager.capacity.num_free == 1


def test_task_3_slots_are_reserved_for_the_forks_of_all_requests_that_start_together() -> None:
    """Oracle: by hand: two leaders and their two pending forks need all four slots; "c" waits."""
    manager = queued(4, ("a", 2), ("b", 2), ("c", 1))
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0", "b/0"], ["c"])
    assert manager.capacity.num_free == 2


def test_task_3_requests_are_admitted_until_the_slots_are_used() -> None:
    """Oracle: by hand: 2 + 1 + 2 completions are five slots; with four the last request waits."""
    requests = (("a", 2), ("b", 1), ("c", 2))
    for slots, running in ((5, ["a/0", "b", "c/0"]), (4, ["a/0", "b"]), (3, ["a/0", "b"]), (2, ["a/0"])):
        manager = queued(slots, *requests)
        manager.admit()
        assert ids(manager.running) == running, slots


def test_task_3_a_request_is_accepted_while_the_slots_that_it_needs_are_in_use() -> None:
    """Oracle: by hand: "b" needs both slots, and one is free; it can run when "a" has ended.

    Common mistake: comparing the number of completions with the free slots, in `add_request` (task 2).
    """
    manager = queued(2, ("a", 1))
    manager.admit()
    assert manager.add_request([6, 7], "b", limits(n=2))
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["b/0"])
