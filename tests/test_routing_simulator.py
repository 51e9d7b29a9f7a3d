"""The fleet simulator: traces, the model of a step's time, and runs of whole fleets.

What holds for any trace and policy is a property; what a policy is expected to gain is tested on a trace on
which the gain is large.
"""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promises import check_all_returned, check_pages
from tiny_llm_routing.policies import POLICIES, PrefixAware
from tiny_llm_routing.prompt_blocks import PromptBlocks
from tiny_llm_routing.served import Served, Summary, percentile, summarize
from tiny_llm_routing.simulated_replica import ReplicaSizes, SimulatedReplica
from tiny_llm_routing.simulator import FleetOptions, Simulator
from tiny_llm_routing.step_time import StepTime, StepWork, relative_errors
from tiny_llm_routing.traces import TRACES, Conversation, Sizes, Trace, Turn
from tiny_model import examples

STEP_TIME = StepTime(0.006, 0.002, 0.002, 0.000002)
SMALL = Sizes(num_systems=3, system=(8, 24), text=(1, 9), outputs=(1, 6), turns=(1, 4), think_seconds=0.1)
FEW_BLOCKS = ReplicaSizes(num_blocks=40, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)


def options(num_replicas: int, **changes: object) -> FleetOptions:
    return replace(FleetOptions(num_replicas, STEP_TIME), **changes)  # type: ignore[arg-type]


def run(trace: Trace, policy: str, fleet: FleetOptions) -> list[Served]:
    return Simulator(trace, POLICIES[policy], fleet).run()


def figures(trace: Trace, policy: str, fleet: FleetOptions) -> Summary:
    return summarize(run(trace, policy, fleet), fleet.num_replicas)


# ---- traces ----


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_depends_only_on_its_seed_and_survives_json(name: str) -> None:
    trace = TRACES[name](20, 2.0, 1, SMALL)
    assert trace == TRACES[name](20, 2.0, 1, SMALL) != TRACES[name](20, 2.0, 2, SMALL)
    assert Trace.of_json(trace.to_json()) == trace
    arrivals = [conversation.arrival for conversation in trace.conversations]
    assert arrivals == sorted(arrivals)


@pytest.mark.parametrize("name", TRACES)
def test_arrivals_have_the_mean_rate(name: str) -> None:
    last = TRACES[name](2000, 5.0, 1, SMALL).conversations[-1].arrival
    assert last == pytest.approx(400, rel=0.1)


def test_bursts_arrive_in_two_of_each_eight_seconds() -> None:
    trace = TRACES["bursts"](500, 5.0, 1, SMALL)
    assert all(conversation.arrival % 8 < 2 for conversation in trace.conversations)


def test_the_first_system_prompt_is_used_most() -> None:
    trace = TRACES["shared"](900, 5.0, 1, SMALL)
    counts = sorted((conversation.system for conversation in trace.conversations), key=len)
    uses = sorted(counts.count(system) for system in set(counts))
    assert len(uses) == 3
    assert uses[2] > 1.5 * uses[1] > 1.5 * uses[0], "1 : 1/2 : 1/3"


# ---- the time of a step ----


def test_work_counts_every_pair_of_a_token_and_one_that_it_attends_to() -> None:
    spans = [(0, 5), (7, 8), (3, 9)]
    pairs = sum(position + 1 for start, stop in spans for position in range(start, stop))
    assert StepWork.of(spans) == StepWork(prefill_rows=11, decode_rows=1, attended=pairs)


WORKS = st.builds(StepWork, st.integers(0, 512), st.integers(0, 64), st.integers(0, 10**5))
POSITIVE = st.floats(1e-4, 1e-2)


@settings(max_examples=examples(100))
@given(st.builds(StepTime, POSITIVE, POSITIVE, POSITIVE, st.floats(1e-7, 1e-5)), st.integers(0, 99))
def test_a_linear_cost_is_found_again(truth: StepTime, seed: int) -> None:
    numbers = Random(seed)
    works = [
        StepWork(numbers.randint(0, 512), numbers.randint(0, 64), numbers.randint(0, 100_000))
        for _ in range(40)
    ]
    found = StepTime.fit([(work, truth.seconds(work)) for work in works])
    assert tuple(found) == pytest.approx(tuple(truth), rel=1e-3, abs=1e-9)
    assert relative_errors(found, [(work, 2 * truth.seconds(work)) for work in works])[0] == pytest.approx(
        0.5
    )


@settings(max_examples=examples(100))
@given(st.lists(st.tuples(WORKS, st.floats(1e-3, 10)), min_size=1, max_size=30))
def test_no_coefficient_is_negative_and_the_fit_is_no_worse_than_a_constant(
    steps: list[tuple[StepWork, float]],
) -> None:
    found = StepTime.fit(steps)
    assert min(found) >= 0
    inverse = [1 / seconds for _, seconds in steps]
    constant = StepTime(sum(inverse) / sum(value * value for value in inverse), 0, 0, 0)

    def error(model: StepTime) -> float:
        return sum(one**2 for one in relative_errors(model, steps))

    assert error(found) <= error(constant) * (1 + 1e-6) + 1e-9


def test_no_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="no steps"):
        StepTime.fit([])


# ---- what was measured ----


def test_a_summary_of_two_requests() -> None:
    first = Served("0", "a", 1.0, 2.0, 4.0, 100, 50, 20)
    second = Served("1", "b", 2.0, 2.5, 3.0, 100, 0, 10)
    summary = summarize([first, second], 4)
    assert summary == Summary(2, 0.25, 0.5, 1.0, 1.0, 30 / 3, 110 * 4 / 180)
    with pytest.raises(ValueError, match="no request"):
        summarize([], 4)


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(
    values: list[int], percent: int
) -> None:
    found = percentile(values, percent)
    enough = [v for v in values if 100 * sum(w <= v for w in values) >= percent * len(values)]
    assert found == min(enough)


# ---- a simulated replica ----


def test_a_step_takes_as_long_as_its_work_and_answers_come_as_given() -> None:
    replica = SimulatedReplica(
        "a", replace(FEW_BLOCKS, max_num_batched_tokens=8), StepTime(1.0, 0.1, 0.01, 0.0)
    )
    assert replica.start_step() is None
    replica.add("x", list(range(10)), "", [7, 8])
    assert replica.start_step() == pytest.approx(1.8)
    assert replica.end_step() == []
    assert replica.start_step() == pytest.approx(1.2)
    assert [token[:3] for token in replica.end_step()] == [("x", True, False)]
    assert replica.manager.sequence("x").outputs == [7]
    assert replica.start_step() == pytest.approx(1.01)
    assert [token[:3] for token in replica.end_step()] == [("x", False, True)]
    assert replica.start_step() is None
    assert replica.report(5.0).hashes == frozenset(PromptBlocks.of(range(8), 4).hashes)


# ---- whole fleets ----

CASES = st.tuples(
    st.sampled_from([*TRACES]), st.integers(1, 12), st.sampled_from([0.5, 5.0, 50.0]), st.integers(0, 99)
)


@settings(max_examples=examples(80))
@given(CASES, st.sampled_from([*POLICIES]), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.7]))
def test_every_request_is_answered_once_and_pages_are_conserved(
    case: tuple[str, int, float, int], policy: str, num_replicas: int, routers: int, delay: float
) -> None:
    """With few blocks, so that sequences are preempted and blocks evicted."""
    name, count, rate, seed = case
    trace = TRACES[name](count, rate, seed, SMALL)
    fleet = options(
        num_replicas, sizes=FEW_BLOCKS, report_delay=delay, report_period=0.3, num_routers=routers
    )
    simulator = Simulator(trace, POLICIES[policy], fleet)
    served = simulator.run()
    turns = {f"{i}.{j}" for i, one in enumerate(trace.conversations) for j in range(len(one.turns))}
    assert sorted(one.request_id for one in served) == sorted(turns)
    assert sum(one.num_prompt_tokens for one in served) == sum(
        conversation.num_prompt_tokens() for conversation in trace.conversations
    )
    for one in served:
        assert one.arrival < one.first_token <= one.end
        assert 0 <= one.num_cached_tokens < one.num_prompt_tokens
    for replica in simulator.replicas.values():
        check_pages(replica.manager)
        check_all_returned(replica.manager)
    for _, view in simulator._routers:
        assert not view._routed
        view.expire(1e9)
        assert len(view._index) == 0
        assert all(one.queued_tokens.value == one.unfinished.value == 0 for one in view.replicas)


@pytest.mark.parametrize("name", TRACES)
def test_the_same_seed_gives_the_same_result(name: str) -> None:
    trace = TRACES[name](15, 5.0, 3, SMALL)
    assert run(trace, "prefix", options(3)) == run(trace, "prefix", options(3))


@pytest.mark.parametrize("name", TRACES)
def test_with_one_replica_all_policies_give_the_same_result(name: str) -> None:
    trace = TRACES[name](15, 5.0, 3, SMALL)
    results = [run(trace, policy, options(1)) for policy in POLICIES]
    assert results == [results[0]] * len(POLICIES)


def test_a_follow_up_finds_the_answer_before_it_in_the_cache() -> None:
    turns = (Turn(tuple(range(100, 130)), 35), Turn(tuple(range(200, 210)), 5, think_seconds=1.0))
    trace = Trace("chat", (Conversation(0.0, (), turns),))
    first, second = run(trace, "prefix", options(4))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 64)  # 30 + 34: the last is not computed
    assert second.arrival == first.end + 1.0
    assert second.replica == first.replica
    assert run(trace, "round-robin", options(4))[1].num_cached_tokens == 0


def test_equal_texts_with_different_salts_share_nothing() -> None:
    turn = Turn(tuple(range(100, 105)), 2)
    system = tuple(range(1000, 1100))
    trace = Trace("salts", tuple(Conversation(1.0 * i, system, (turn,), str(i % 2)) for i in range(4)))
    assert [one.num_cached_tokens for one in run(trace, "prefix", options(1))] == [0, 0, 96, 96]
    replicas = [one.replica for one in run(trace, "prefix", options(2, report_delay=60.0))]
    assert replicas == ["replica-0", "replica-1"] * 2, "the router sees no common prefix either"


def test_a_prompt_that_is_computed_is_not_queued_any_more() -> None:
    """The second request comes during the first one's answer, and no report has come."""
    system = tuple(range(1000, 1100))
    trace = Trace(
        "two",
        (Conversation(1.0, system, (Turn((1,), 300),)), Conversation(2.0, system, (Turn((2,), 1),))),
    )
    second, first = Simulator(trace, lambda: PrefixAware(0), options(3, report_delay=60.0)).run()
    assert second.first_token < first.end
    assert second.replica == first.replica


def test_shared_prompts_are_found_more_often_and_answered_sooner_with_the_prefix_policy() -> None:
    """Eight replicas cannot all cache 32 system prompts of about 768 tokens."""
    trace = TRACES["shared"](240, 6.0, 0, Sizes(num_systems=32))
    fleet = options(8, sizes=ReplicaSizes(num_blocks=512))
    found = {policy: figures(trace, policy, fleet) for policy in POLICIES}
    assert found["prefix"].hit_rate > found["round-robin"].hit_rate + 0.2
    assert found["prefix"].hit_rate > found["least-loaded"].hit_rate + 0.2
    assert found["prefix"].ttft_p50 < 0.7 * found["round-robin"].ttft_p50
    assert found["prefix"].ttft_p99 < found["round-robin"].ttft_p99


def test_on_unrelated_prompts_the_prefix_policy_costs_nothing() -> None:
    trace = TRACES["unrelated"](120, 3.0, 0, Sizes())
    prefix, least = (figures(trace, policy, options(8)) for policy in ("prefix", "least-loaded"))
    assert prefix.hit_rate == least.hit_rate == 0
    assert prefix.ttft_p99 <= 1.1 * least.ttft_p99


def test_without_reports_the_router_still_balances_what_it_has_sent() -> None:
    trace = TRACES["shared"](120, 4.0, 0, Sizes(num_systems=16))
    silent = options(8, report_delay=60.0)  # older than is believed
    blind, round_robin = figures(trace, "prefix", silent), figures(trace, "round-robin", options(8))
    assert blind.hit_rate > round_robin.hit_rate
    assert blind.ttft_p99 < round_robin.ttft_p99


def test_a_policy_sees_only_reports_that_have_arrived() -> None:
    """The second request comes when only reports can tell where the first one went."""
    system, turn = tuple(range(1000, 1100)), Turn((1, 2, 3), 2)
    trace = Trace("two", (Conversation(0.0, system, (turn,)), Conversation(30.0, system, (turn,))))

    def go_to_the_same(**changes: object) -> bool:
        first, second = run(trace, "prefix", options(3, max_staleness=10.0, **changes))
        return first.replica == second.replica

    assert go_to_the_same(report_period=1.0)
    assert not go_to_the_same(report_period=100.0)
    assert not go_to_the_same(report_period=1.0, report_delay=20.0)


def test_routers_learn_from_reports_what_others_have_sent() -> None:
    """Each turn of a conversation goes to another router, which knows its prefix only from reports."""
    trace = TRACES["chats"](30, 1.0, 0, Sizes(num_systems=8))
    one, three, blind = (
        figures(trace, "prefix", options(4, num_routers=number, report_delay=delay))
        for number, delay in ((1, 0.05), (3, 0.05), (3, 60.0))
    )
    assert one.hit_rate == pytest.approx(three.hit_rate, abs=0.03)
    assert three.hit_rate > blind.hit_rate + 0.1
