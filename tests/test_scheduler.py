"""Priorities with aging: the order in which requests are served, and that every request is served."""

from collections.abc import Sequence

import pytest
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler import AgedPriority


def order(priorities: Sequence[int], patience: int) -> list[int]:
    """The order in which requests that arrived in this order are served; of equal keys the earlier first."""
    key = AgedPriority(patience).key
    return sorted(range(len(priorities)), key=lambda number: (key(number, priorities[number]), number))


def test_a_request_is_overtaken_by_urgent_ones_that_arrive_soon_after_it() -> None:
    """Oracle: by hand: priority 1 is overtaken by the two of priority 0 that arrive 1 and 2 later."""
    assert order([1, 0, 0, 0, 0], 3) == [1, 2, 0, 3, 4]


def test_an_urgent_request_overtakes_waiting_ones() -> None:
    """Oracle: by hand, patience 3: the last one, of priority 0, overtakes arrivals 1 and 2 before it."""
    assert order([1, 1, 1, 1, 0], 3) == [0, 1, 4, 2, 3]


def test_requests_of_one_priority_keep_the_order_of_arrival() -> None:
    """Oracle: the order of arrival; a key that multiplies the number is wrong for some priorities."""
    for priority in (-3, 0, 5):
        assert order([priority] * 6, 4) == list(range(6))


@pytest.mark.parametrize("patience", [0, 1, 2, 7])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2, -1), (0, 3), (-1, 2)])
def test_each_level_of_priority_outweighs_patience_later_arrivals(patience: int, low: int, high: int) -> None:
    """Oracle: the docstring, counted: `patience` later arrivals for each level of priority between them."""
    for later in range(1, 40):
        passes = order([high, *[high] * (later - 1), low], patience).index(later) == 0
        assert passes == (later < patience * (high - low))


def test_a_key_is_fixed_when_a_request_arrives() -> None:
    """Oracle: the same call twice, with others between: a later arrival must not change the key."""
    policy = AgedPriority(5)
    first = policy.key(3, 2)
    for number in range(4, 40):
        policy.key(number, number % 3)
    assert policy.key(3, 2) == first


def test_every_request_is_served_eventually() -> None:
    """Oracle: by hand: patience 4, 5 levels lower: of endless urgent requests exactly 19 overtake it."""
    assert order([5, *[0] * 100], 4).index(0) == 19


def test_the_paged_manager_serves_waiting_requests_in_the_order_of_their_keys() -> None:
    """Oracle: by hand: one sequence at a time, patience 2. Larger numbers first is wrong, so is no aging."""
    manager = PagedBatchManager(8, 4, 1, max_model_len=8, policies=Policies(priority_key=AgedPriority(2).key))
    for number, priority in enumerate([1, 0, 0, 2, 0, -1]):
        manager.add_request([1, 2], str(number), SamplingParams(max_tokens=1, priority=priority), 0)
    ran = []
    while manager.has_work:
        manager.process_batch()
        [one] = manager.running
        ran.append(one.seq_id)
        manager.finish(one.seq_id)
    # The keys are 2, 1, 2, 7, 4 and 3.
    assert "".join(ran) == "102543"
