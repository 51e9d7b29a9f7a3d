"""Day 2.7, task 6: sequences finish, their slots are reused, and no output depends on the rest of the batch.

The tests also use `cancel` and `commit`, which are given.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import DuplicateRequestError

from common.toy_models import recompute_everything, tiny_model
from common.toy_requests import REQUESTS, answers, ids, limits, prompt

# Task 6: DenseBatchManager.finish


def with_model(slots: int, budget: int = 512) -> DenseBatchManager:
    """A manager with a model; keys and values are float32, so storing them does not round."""
    return DenseBatchManager(slots, 64, model=tiny_model(), max_batched_tokens=budget, kv_dtype=mx.float32)


def test_task_6_finishing_a_sequence_frees_its_slot() -> None:
    """Oracle: by hand."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.finish("a")
    assert ids(manager.running) == ["b"]
    assert manager.capacity.num_free == 1
    assert manager.has_work
    manager.finish("b")
    assert manager.capacity.num_free == 2
    assert not manager.has_work


def test_task_6_finishing_a_finished_sequence_raises_key_error() -> None:
    """Oracle: the docstring.

    Common mistake: freeing the slot a second time, so that two sequences share it.
    """
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.process_batch()
    manager.finish("a")
    for name in ("a", "unknown"):
        with pytest.raises(KeyError):
            manager.finish(name)
    with pytest.raises(KeyError):
        manager.sequence("a")
    assert manager.capacity.num_free == 2


def test_task_6_finishing_a_waiting_sequence_frees_no_slot() -> None:
    """Oracle: by hand."""
    manager = DenseBatchManager(1, 16)
    manager.add_request([5], "a", limits())
    manager.add_request([6], "b", limits())
    manager.process_batch()
    manager.finish("b")
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], [])
    assert manager.capacity.num_free == 0


@pytest.mark.parametrize("name", ["a/0", "a/1", "a/2"])
def test_task_6_the_id_of_a_pending_fork_ends_its_leader(name: str) -> None:
    """Oracle: by hand: the prompt is incomplete, so all three ids stand for the leader, which has a slot.

    Common mistake: looking for the argument in `_slot_of`, so that the leader's slot is never free again.
    """
    manager = DenseBatchManager(3, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits(n=3))
    manager.process_batch()
    assert manager.capacity.num_free == 2
    manager.finish(name)
    assert ids(manager.running) == []
    assert manager.capacity.num_free == 3, f"finish({name!r}) ended a/0, but did not free its slot"


def test_task_6_a_sequence_can_finish_during_its_prefill() -> None:
    """Oracle: by hand."""
    manager = DenseBatchManager(1, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    manager.process_batch()
    manager.finish("a")
    assert manager.capacity.num_free == 1
    assert len(manager.process_batch()) == 0
    assert not manager.has_work


def test_task_6_the_next_request_starts_in_the_freed_slot() -> None:
    """Oracle: by hand: first come, first served, one at a time."""
    manager, order = DenseBatchManager(1, 16), []
    for name in ("c", "a", "b"):
        manager.add_request([1, 2], name, limits())
    while manager.has_work:
        (name,) = manager.process_batch()
        order.append(name)
        manager.finish(name)
    assert order == ["c", "a", "b"]


def test_task_6_completions_finish_one_by_one() -> None:
    """Oracle: by hand: each frees its own slot, and the others continue."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=3))
    manager.commit(dict.fromkeys(manager.process_batch(), 7))
    manager.finish("a/0")
    assert manager.capacity.num_free == 1
    assert set(manager.process_batch()) == {"a/1", "a/2"}
    manager.finish("a/2")
    manager.finish("a/1")
    assert manager.capacity.num_free == 3


def test_task_6_the_id_of_a_finished_request_can_be_reused() -> None:
    """Oracle: the docstring of `add_request`: only ids of unfinished requests are rejected."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.process_batch()
    with pytest.raises(DuplicateRequestError):
        manager.add_request([7], "a", limits())
    manager.finish("a")
    assert manager.add_request([7], "a", limits())
    assert manager.sequence("a").prompt == (7,)


def test_task_6_a_slot_is_freed_once_even_if_the_id_of_its_request_is_reused() -> None:
    """Oracle: by hand: the new request with this id waits and has no slot.

    Common mistake: a slot that is still recorded under the id is freed twice and given to two sequences.
    """
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.process_batch()
    manager.finish("a")
    manager.add_request([7], "a", limits())
    manager.finish("a")
    assert manager.capacity.num_free == 2


@pytest.mark.parametrize("name", list(REQUESTS))
def test_task_6_a_single_request_gets_the_tokens_of_a_loop_without_cache(name: str) -> None:
    """Oracle: a plain loop that recomputes everything. The last position of the cache is used too."""
    tokens, params = REQUESTS[name]
    assert params.max_tokens is not None
    found = answers(with_model(1), {name: (tokens, params)})
    assert found == {name: recompute_everything(tiny_model(), tokens, params.max_tokens)}


@pytest.mark.parametrize(
    ("slots", "budget", "every"), [(5, 512, 0), (5, 8, 0), (5, 8, 2), (2, 6, 0), (3, 16, 5)]
)
def test_task_6_a_request_gets_the_same_tokens_in_any_batch(slots: int, budget: int, every: int) -> None:
    """Oracle: each request run separately.

    Requests start together or join later; slots and budget are scarce.
    """
    separate: dict[str, list[int]] = {}
    for name, request in REQUESTS.items():
        separate |= answers(with_model(1), {name: request})
    assert answers(with_model(slots, budget), REQUESTS, every) == separate


def test_task_6_a_cache_can_be_filled_to_its_last_position() -> None:
    """Oracle: by hand: 64 tokens are the prompt's 3 and 61 outputs; the slot is free afterwards."""
    manager = with_model(1)
    found = answers(manager, {"a": (prompt(3, 50), limits(None))})
    assert len(found["a"]) == 61
    assert manager.capacity.num_free == 1


def test_task_6_a_reused_slot_keeps_nothing_of_its_last_sequence() -> None:
    """Oracle: a new manager. A cache that is not reset appends to the old tokens."""
    manager = with_model(2)
    answers(manager, {"old": (prompt(40, 51), limits(20)), "older": (prompt(30, 52), limits(9))})
    assert answers(manager, REQUESTS) == answers(with_model(2), REQUESTS)


def test_task_6_slots_of_finished_completions_can_be_reused() -> None:
    """Oracle: each request run separately; greedy tokens are the same for all completions of a prompt."""
    tokens, _ = REQUESTS["r0"]
    found = answers(with_model(3, 8), {"a": (tokens, limits(9, n=3)), **REQUESTS})
    want = recompute_everything(tiny_model(), tokens, 9)
    assert [found[f"a/{i}"] for i in range(3)] == [want, want, want]
    assert {name: found[name] for name in REQUESTS} == answers(with_model(5), REQUESTS)


def test_task_6_cancelling_a_waiting_request_removes_it() -> None:
    """Oracle: by hand: it had no slot, so none is freed."""
    manager = DenseBatchManager(1, 16)
    for name in "abc":
        manager.add_request([5, 6], name, limits())
    manager.process_batch()
    manager.cancel("b")
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["c"])
    assert manager.capacity.num_free == 0


def test_task_6_cancelling_a_running_request_frees_its_slot() -> None:
    """Oracle: by hand: the next request starts in the freed slot."""
    manager = DenseBatchManager(1, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    manager.add_request([2], "b", limits())
    manager.process_batch()
    manager.cancel("a")
    assert manager.capacity.num_free == 1
    assert list(manager.process_batch()) == ["b"]


def test_task_6_cancelling_unknown_or_finished_requests_is_ignored() -> None:
    """Oracle: the docstring: cancelling twice or too late is not an error."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5], "a", limits())
    manager.add_request([6], "b", limits())
    manager.process_batch()
    manager.finish("b")
    for name in ("unknown", "b", "b", "a/0"):
        manager.cancel(name)
    assert ids(manager.running) == ["a"]
    assert manager.capacity.num_free == 1
    manager.cancel("a")
    manager.cancel("a")
    assert manager.capacity.num_free == 2
    assert not manager.has_work


def test_task_6_cancelling_does_not_affect_requests_with_similar_ids() -> None:
    """Oracle: by hand: "r1" is neither "r10" nor a separate request named "r1/0"."""
    manager = DenseBatchManager(3, 16)
    for name in ("r10", "r1", "r1/0"):
        manager.add_request([5], name, limits())
    manager.process_batch()
    manager.cancel("r1")
    assert ids(manager.running) == ["r10", "r1/0"]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_task_6_cancelling_at_any_step_ends_all_completions(steps: int) -> None:
    """Oracle: by hand: they wait, have computed part of their prompt, are forked, or decode.

    All slots are freed, and no id stays in use.
    """
    manager = DenseBatchManager(3, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=3))
    for _ in range(steps):
        manager.commit(dict.fromkeys(manager.process_batch(), 7))
    manager.cancel("a")
    assert manager.capacity.num_free == 3
    assert not manager.has_work
    assert (ids(manager.running), ids(manager.waiting)) == ([], [])
    for i in range(3):
        with pytest.raises(KeyError):
            manager.sequence(f"a/{i}")
    manager.add_request([1, 2], "a", limits(n=3))
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}


def test_task_6_cancelling_frees_the_slots_reserved_for_forks() -> None:
    """Oracle: by hand: the request that waited for these slots starts."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits(n=2))
    manager.add_request([2], "b", limits(n=2))
    manager.process_batch()
    manager.cancel("a")
    assert set(manager.process_batch()) == {"b/0", "b/1"}


def test_task_6_cancelling_ends_the_remaining_completions() -> None:
    """Oracle: by hand: three slots, each freed once."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=3))
    manager.process_batch()
    manager.finish("a/1")
    manager.cancel("a")
    assert manager.capacity.num_free == 3
    assert not manager.has_work


def test_task_6_cancelling_does_not_change_the_tokens_of_other_requests() -> None:
    """Oracle: each run separately; two others are cancelled, one during its prefill, one while decoding."""
    manager = with_model(4, 12)
    core, found = EngineCore(manager, eos_token_ids=()), {}
    for name in ("r0", "r2"):
        core.add_request(name, *REQUESTS[name])
    core.add_request("long", prompt(40, 60), limits(5))
    core.add_request("short", prompt(2, 61), limits(30))
    for step in range(100):
        if step in (2, 6):
            core.cancel("long" if step == 2 else "short")
        for output in core.step():
            found.setdefault(output.seq_id, []).append(output.token)
    assert not core.has_work
    for name in ("r0", "r2"):
        tokens, params = REQUESTS[name]
        assert found[name] == recompute_everything(tiny_model(), tokens, params.max_tokens)


@pytest.mark.parametrize("seed", range(8))
def test_task_6_a_long_random_run_conserves_slots_and_keeps_the_order_of_arrival(seed: int) -> None:
    """Oracle: the invariants: a slot is free or has one sequence; requests start in order of arrival."""
    rng = np.random.default_rng(seed)
    slots, budget = int(rng.integers(1, 5)), int(rng.integers(5, 30))
    manager, arrivals = DenseBatchManager(slots, 32, max_batched_tokens=budget), []
    for step in range(150):
        if rng.random() < 0.4:
            arrivals.append(f"r{step}")
            params = limits(int(rng.integers(1, 9)), n=int(rng.integers(1, slots + 1)))
            manager.add_request([1] * int(rng.integers(1, 20)), arrivals[-1], params)
        if arrivals and rng.random() < 0.2:
            manager.cancel(arrivals[int(rng.integers(len(arrivals)))])
        ready = manager.process_batch()
        assert manager.capacity.num_free + len(manager.running) == slots
        assert len(set(ids(manager.running))) == len(manager.running)
        manager.commit(dict.fromkeys(ready, 5))
        for seq_id in list(ready):
            sequence = manager.sequence(seq_id)
            if sequence.num_tokens == sequence.max_len:
                manager.finish(seq_id)
        order = [arrivals.index(sequence.request_id) for sequence in [*manager.running, *manager.waiting]]
        assert order == sorted(order), "a request was overtaken"
    for _ in range(2000):
        ready = manager.process_batch()
        manager.commit(dict.fromkeys(ready, 5))
        for seq_id in list(ready):
            sequence = manager.sequence(seq_id)
            if sequence.num_tokens == sequence.max_len:
                manager.finish(seq_id)
        if not manager.has_work:
            break
    assert not manager.has_work, "every request must finish"
    assert manager.capacity.num_free == slots
