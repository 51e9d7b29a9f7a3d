"""Routing policies: each ranks every replica once; the prefix-aware one weighs cached tokens and queues."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_llm_routing.fleet import Fleet
from tiny_llm_routing.policies import POLICIES, LeastLoaded, PrefixAware, RoundRobin, make_policy
from tiny_llm_routing.prompt_blocks import PromptBlocks
from tiny_llm_routing.reports import ReplicaReport
from tiny_model import examples

NAMES = [f"replica-{i}" for i in range(5)]


def prompt(num_tokens: int, stream: int = 0) -> PromptBlocks:
    return PromptBlocks.of(range(10_000 * stream, 10_000 * stream + num_tokens), 4)


REPORTS = st.builds(
    ReplicaReport,
    made_at=st.just(1.0),
    hashes=st.integers(0, 6).map(lambda n: frozenset(prompt(40).hashes[:n])),
    queued_tokens=st.integers(0, 60),
    num_running=st.integers(0, 3),
    num_waiting=st.integers(0, 3),
    is_full=st.booleans(),
)


def fleet_with(reports: list[ReplicaReport]) -> Fleet:
    fleet = Fleet(NAMES[: len(reports)])
    for name, report in zip(NAMES, reports, strict=False):
        fleet.take_report(name, report, 1.0)
    return fleet


@settings(max_examples=examples(200))
@given(st.sampled_from([*POLICIES]), st.lists(REPORTS, max_size=5), st.integers(1, 40))
def test_every_replica_is_ranked_once_and_full_ones_come_last(
    name: str, reports: list[ReplicaReport], length: int
) -> None:
    fleet, policy = fleet_with(reports), make_policy(name)
    for _ in range(3):
        ranked = policy.rank(prompt(length), fleet, 2.0)
        assert sorted(ranked) == NAMES[: len(reports)]
        is_full = {one.name: one.is_full for one in fleet.replicas}
        assert [is_full[one] for one in ranked] == sorted(is_full[one] for one in ranked)


@settings(max_examples=examples(200))
@given(st.lists(REPORTS, max_size=5), st.integers(1, 40), st.integers(0, 100))
def test_without_a_known_prefix_both_rank_alike(
    reports: list[ReplicaReport], length: int, sequence_cost: int
) -> None:
    fleet, aware, least = fleet_with(reports), PrefixAware(sequence_cost), LeastLoaded(sequence_cost)
    for stream in (1, 2, 3):
        blocks = prompt(length, stream)
        ranked = aware.rank(blocks, fleet, 2.0)
        assert ranked == least.rank(blocks, fleet, 2.0)
        if ranked:
            fleet.routed(f"r{stream}", blocks, ranked[0], 2.0)


@settings(max_examples=examples(200))
@given(st.lists(REPORTS, min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 100))
def test_the_best_replica_has_the_least_work(
    reports: list[ReplicaReport], length: int, sequence_cost: int
) -> None:
    fleet, blocks = fleet_with(reports), prompt(length)
    best = PrefixAware(sequence_cost).rank(blocks, fleet, 2.0)[0]

    def cost(report: ReplicaReport) -> tuple[bool, int, int]:
        hits = 0
        while hits < len(blocks.hashes) and blocks.hashes[hits] in report.hashes:
            hits += 1
        unfinished = report.num_running + report.num_waiting
        work = report.queued_tokens + max(1, length - 4 * hits) + sequence_cost * unfinished
        return report.is_full, work, unfinished

    costs = {name: cost(report) for name, report in zip(NAMES, reports, strict=False)}
    assert costs[best] == min(costs.values())


def test_a_cached_prefix_is_worth_as_many_tokens_in_the_queue_and_no_more() -> None:
    hashes = frozenset(prompt(401).hashes)
    for queued, best in ((399, 0), (401, 1)):
        fleet = fleet_with([ReplicaReport(1.0, hashes, queued), ReplicaReport(1.0)])
        assert PrefixAware().rank(prompt(401), fleet, 2.0)[0] == NAMES[best]
        assert LeastLoaded().rank(prompt(401), fleet, 2.0)[0] == NAMES[1]


@pytest.mark.parametrize("name", POLICIES)
def test_equal_replicas_are_chosen_in_turn(name: str) -> None:
    fleet, policy = fleet_with([ReplicaReport(1.0)] * 5), make_policy(name)
    assert [policy.rank(prompt(9, i), fleet, 2.0)[0] for i in range(10)] == NAMES * 2


def test_requests_with_one_prefix_do_not_all_go_to_one_replica() -> None:
    """The first replica that has the prefix becomes loaded: others compute it too."""
    fleet, policy = Fleet(NAMES), PrefixAware(16)
    for i in range(60):
        blocks = PromptBlocks.of([*range(100), *range(1000 * (i + 1), 1000 * (i + 1) + 50)], 4)
        fleet.routed(str(i), blocks, policy.rank(blocks, fleet, 0.0)[0], 0.0)
    counts = [one.unfinished.value for one in fleet.replicas]
    assert max(counts) <= 2 * min(counts)


def test_round_robin_goes_on_when_replicas_come_and_go() -> None:
    fleet, policy = Fleet(NAMES[:2]), RoundRobin()
    assert policy.rank(prompt(9), fleet, 0.0)[0] == NAMES[0]
    fleet.set_replicas(NAMES[1:4], 0.0)
    assert {policy.rank(prompt(9), fleet, 0.0)[0] for _ in range(3)} == set(NAMES[1:4])
    fleet.set_replicas([], 0.0)
    assert policy.rank(prompt(9), fleet, 0.0) == []


def test_an_unknown_policy_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'best'.*prefix, least-loaded, round-robin"):
        make_policy("best")
