"""The router's view of a fleet: what counts as cached and as load, after any order of events.

The oracle for the index and for what expires is a list of all events, from which `Model` derives the same
answers anew for each question.
"""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sampling_params import SamplingParams

from tiny_llm_routing.block_index import BlockIndex
from tiny_llm_routing.fleet import Fleet
from tiny_llm_routing.gauge import Gauge
from tiny_llm_routing.prompt_blocks import PromptBlocks, short_hash
from tiny_llm_routing.reports import ReplicaReport, read_report
from tiny_model import examples

STALENESS = 10.0
SIZE = 4
NAMES = ("a", "b")


def prompt(stream: int, num_blocks: int, extra: int = 1, salt: str = "") -> PromptBlocks:
    """A prompt of one of several texts, which have no block in common."""
    tokens = [1000 * stream + i for i in range(num_blocks * SIZE + extra)]
    return PromptBlocks.of(tokens, SIZE, salt)


# ---- blocks of prompts ----


def test_blocks_are_the_engines_hashes_shortened() -> None:
    stream = TokenBlocks(SIZE, "salt")
    stream.extend(range(11))
    blocks = PromptBlocks.of(range(11), SIZE, "salt")
    assert blocks.hashes == tuple(digest[:8] for digest in stream.hashes)
    assert (blocks.num_tokens, len(blocks.hashes)) == (11, 2)


@given(st.lists(st.integers(0, 3), min_size=SIZE, max_size=20), st.text(max_size=4), st.text(max_size=4))
def test_texts_with_different_salts_have_no_block_in_common(tokens: list[int], one: str, other: str) -> None:
    shared = set(PromptBlocks.of(tokens, SIZE, one).hashes) & set(PromptBlocks.of(tokens, SIZE, other).hashes)
    assert bool(shared) == (one == other)


# ---- reports ----


@given(
    st.builds(
        ReplicaReport,
        made_at=st.floats(0, 1e9),
        hashes=st.frozensets(st.binary(min_size=8, max_size=8)),
        queued_tokens=st.integers(0, 10**6),
        num_running=st.integers(0, 99),
        num_waiting=st.integers(0, 99),
        is_full=st.booleans(),
    )
)
def test_a_report_survives_its_message(report: ReplicaReport) -> None:
    message = pickle.loads(pickle.dumps(report.as_message()))
    assert ReplicaReport.of_message(message) == report
    assert len(message["hashes"]) == 8 * len(report.hashes)


def manager_with(prompts: Iterable[list[int]], *, steps: int, budget: int = 8) -> PagedBatchManager:
    """A manager without arrays that has run some steps; each sequence ends with its first token."""
    manager = PagedBatchManager(
        64, SIZE, 2, max_batched_tokens=budget, policies=Policies(prefix=PrefixSharing)
    )
    for index, tokens in enumerate(prompts):
        manager.add_request(tokens, str(index), SamplingParams(max_tokens=1))
    for _ in range(steps):
        for seq_id in list(manager.process_batch()):
            manager.commit({seq_id: 0})
            manager.finish(seq_id)
    return manager


def test_a_report_says_what_a_manager_caches_and_has_to_compute() -> None:
    manager = manager_with([list(range(20)), list(range(100, 117)), list(range(200, 207))], steps=1)
    report = read_report(manager, 3.0)
    assert report.hashes == frozenset(PromptBlocks.of(range(8), SIZE).hashes), "the first step's 8 tokens"
    assert report.queued_tokens == 11 + 16 + 7, "the last token of a running prompt is like a decode"
    assert (report.num_running, report.num_waiting, report.is_full) == (2, 1, False)
    assert read_report(manager, 3.0, max_waiting=1).is_full


def test_tokens_that_a_waiting_sequence_will_find_in_the_cache_are_not_queued() -> None:
    manager = manager_with([list(range(20))], steps=3)
    for index in range(70):  # more than are looked up
        manager.add_request([*range(18), 500 + index], f"w{index}", SamplingParams(max_tokens=1))
    assert read_report(manager, 0.0).queued_tokens == 70 * (19 - 16)
    manager.add_request(list(range(500, 519)), "other", SamplingParams(max_tokens=1))
    assert read_report(manager, 0.0).queued_tokens == 71 * (19 - 16), "the 71st counts like the others"


def test_a_report_that_is_cut_keeps_each_blocks_parent_and_drops_what_is_evicted_first() -> None:
    manager = manager_with([list(range(20)), list(range(100, 116))], steps=9)
    old, new = PromptBlocks.of(range(20), SIZE).hashes, PromptBlocks.of(range(100, 116), SIZE).hashes
    everything = {*old, *new}
    assert read_report(manager, 0.0).hashes == everything
    assert read_report(manager, 0.0, max_hashes=6).hashes == {*new, *old[:2]}
    manager.prefix.evict(3)
    assert read_report(manager, 0.0).hashes == {*new, *old[:2]}


def test_a_decode_is_not_queued() -> None:
    manager = manager_with([], steps=0)
    manager.add_request(list(range(7)), "0", SamplingParams(max_tokens=9))
    manager.commit(dict.fromkeys(manager.process_batch(), 5))
    assert (read_report(manager, 0.0).queued_tokens, read_report(manager, 0.0).num_running) == (0, 1)


def test_a_manager_without_a_prefix_cache_reports_no_blocks() -> None:
    manager = PagedBatchManager(64, SIZE, 2)
    manager.add_request(list(range(9)), "0")
    manager.add_request(list(range(9)), "1")
    assert read_report(manager, 0.0).queued_tokens == 18
    manager.process_batch()
    assert read_report(manager, 0.0).hashes == frozenset()


# ---- the index ----

HASHES = st.integers(0, 7).map(lambda number: b"%8d" % number)
CALLS = st.one_of(
    st.tuples(st.just("report"), st.integers(0, 3), st.frozensets(HASHES)),
    st.tuples(st.just("expect"), st.integers(0, 3), st.lists(HASHES, max_size=6).map(tuple)),
    st.tuples(st.just("take_back"), st.integers(0, 3), st.integers(0, 5)),
    st.tuples(st.just("remove"), st.integers(0, 3), st.none()),
)


@settings(max_examples=examples(400))
@given(st.lists(CALLS, max_size=40), st.lists(HASHES, max_size=8))
def test_the_index_matches_like_a_set_for_each_replica(
    calls: list[tuple[str, int, object]], asked: list[bytes]
) -> None:
    index = BlockIndex()
    reported: dict[int, frozenset[bytes]] = dict.fromkeys(range(4), frozenset())
    expected: dict[int, list[tuple[bytes, ...]]] = {replica: [] for replica in range(4)}
    for replica in range(4):
        index.add(replica)
    for name, replica, argument in calls:
        if name == "report":
            reported[replica] = argument  # type: ignore[assignment]
            index.report(replica, argument)  # type: ignore[arg-type]
        elif name == "expect":
            expected[replica].append(argument)  # type: ignore[arg-type]
            index.expect(replica, argument)  # type: ignore[arg-type]
        elif name == "take_back" and expected[replica]:
            taken = expected[replica].pop(argument % len(expected[replica]))  # type: ignore[operator]
            index.take_back(replica, taken)
        elif name == "remove":
            reported[replica], expected[replica] = frozenset(), []
            index.remove(replica)
            index.add(replica)
    held = {replica: set(reported[replica]).union(*expected[replica]) for replica in range(4)}
    assert len(index) == len(set[bytes]().union(*held.values())), "an entry without a holder remains"
    lengths = {
        replica: next((i for i, digest in enumerate(asked) if digest not in blocks), len(asked))
        for replica, blocks in held.items()
    }
    assert index.match(asked) == {replica: length for replica, length in lengths.items() if length}


# ---- the gauge ----


def test_a_gauge_corrects_a_report_by_what_has_changed_since() -> None:
    gauge = Gauge()
    gauge.add("early", 100, 1.0)
    gauge.add("late", 10, 3.0)
    assert gauge.value == 110
    gauge.take(150, 2.0)  # 100 of "early", and 50 that another router has sent
    assert gauge.value == 160
    gauge.remove("early", 4.0)
    assert gauge.value == 60
    gauge.take(55, 3.5)  # made before "early" was removed, but "early" was already computed in part
    assert gauge.value == 0, "not less than nothing"
    gauge.take(50, 4.5)
    assert gauge.value == 50
    gauge.forget()
    assert gauge.value == 10


def test_a_report_that_arrives_after_a_removal_but_was_made_before_does_not_bring_it_back() -> None:
    gauge = Gauge()
    gauge.add("x", 100, 1.0)
    gauge.remove("x", 3.0)
    gauge.take(100, 2.0)
    assert gauge.value == 0
    gauge.take(40, 1.0)
    assert gauge.value == 0, "an older report is ignored"


def test_what_came_and_went_after_a_report_was_made_does_not_count() -> None:
    gauge = Gauge()
    gauge.add("x", 100, 3.0)
    gauge.remove("x", 4.0)
    gauge.take(70, 2.0)
    assert gauge.value == 70


# ---- the fleet ----


@dataclass
class Sent:
    """A request in the model."""

    blocks: PromptBlocks
    replica: str
    computed_at: float | None = None
    has_ended: bool = False


@dataclass
class Model:
    """Everything that has happened; answers are derived from it anew each time."""

    sent: list[tuple[str, Sent]] = field(default_factory=list)
    reports: dict[str, ReplicaReport] = field(default_factory=dict)

    def current(self, request_id: str) -> Sent | None:
        return next((one for key, one in self.sent if key == request_id and not one.has_ended), None)

    def report(self, name: str, now: float) -> ReplicaReport | None:
        report = self.reports.get(name)
        return report if report is not None and report.made_at + STALENESS > now else None

    def has(self, name: str, digest: bytes, now: float) -> bool:
        report = self.report(name, now)
        if report is not None and digest in report.hashes:
            return True
        made_at = self.reports[name].made_at if name in self.reports else -1.0
        return any(
            digest in one.blocks.hashes
            and (one.computed_at is None or (made_at < one.computed_at and now < one.computed_at + STALENESS))
            for _, one in self.sent
            if one.replica == name
        )

    def num_cached(self, name: str, blocks: PromptBlocks, now: float) -> int:
        misses = (i for i, digest in enumerate(blocks.hashes) if not self.has(name, digest, now))
        return SIZE * next(misses, len(blocks.hashes))


IDS = st.sampled_from(["r0", "r1", "r2"])
PROMPTS = st.builds(prompt, st.integers(0, 1), st.integers(0, 5))
EVENTS = st.one_of(
    st.tuples(st.just("routed"), IDS, st.sampled_from(NAMES), PROMPTS),
    st.tuples(st.just("started"), IDS),
    st.tuples(st.just("ended"), IDS),
    st.tuples(
        st.just("report"), st.sampled_from(NAMES), PROMPTS, st.sampled_from([0.0, 1.0, 2.5, 9.0, 12.0])
    ),
    st.tuples(st.just("leave"), st.sampled_from(NAMES)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 4.0, 10.0])),
)


@settings(max_examples=examples(600))
@given(st.lists(EVENTS, max_size=40), st.lists(PROMPTS, min_size=1, max_size=3))
def test_what_counts_as_cached_follows_from_the_events(
    events: list[tuple], asked: list[PromptBlocks]
) -> None:
    fleet, model, now = Fleet(NAMES, max_staleness=STALENESS), Model(), 100.0
    for kind, *arguments in events:
        now += 0.25  # so that no two events happen at once
        if kind == "routed":
            request_id, name, blocks = arguments
            if (one := model.current(request_id)) is not None:
                one.has_ended, one.computed_at = True, one.computed_at or now
            fleet.routed(request_id, blocks, name, now)
            model.sent.append((request_id, Sent(blocks, name)))
        elif kind in ("started", "ended"):
            getattr(fleet, kind)(arguments[0], now)
            if (one := model.current(arguments[0])) is not None:
                one.computed_at = one.computed_at or now
                one.has_ended = kind == "ended"
        elif kind == "report":
            name, blocks, delay = arguments
            report = ReplicaReport(now - delay, frozenset(blocks.hashes))
            fleet.take_report(name, report, now)
            last = model.reports.get(name)
            if delay < STALENESS and (last is None or last.made_at <= report.made_at):
                model.reports[name] = report
        elif kind == "leave":
            fleet.remove(arguments[0])
            fleet.set_replicas(NAMES, now)  # a new replica with the old name
            model.sent = [(key, one) for key, one in model.sent if one.replica != arguments[0]]
            model.reports.pop(arguments[0], None)
        else:
            now += arguments[0]
        for blocks in asked:
            wanted = {name: model.num_cached(name, blocks, now) for name in NAMES}
            assert {name: fleet.num_cached_tokens(name, blocks, now) for name in NAMES} == wanted


@settings(max_examples=examples(400))
@given(st.lists(EVENTS, max_size=60))
def test_load_is_zero_again_when_all_requests_have_ended(events: list[tuple]) -> None:
    """Whatever the order of reports, starts and ends, and if replicas leave; nothing is kept for ever."""
    fleet, now = Fleet(NAMES, max_staleness=STALENESS), 100.0
    for kind, *arguments in events:
        now += 0.25
        if kind == "routed":
            request_id, name, blocks = arguments
            fleet.routed(request_id, blocks, name, now)
        elif kind in ("started", "ended"):
            getattr(fleet, kind)(arguments[0], now)
        elif kind == "report":
            name, blocks, delay = arguments
            report = ReplicaReport(now - delay, frozenset(blocks.hashes), 3 * len(blocks.hashes), 2, 1)
            fleet.take_report(name, report, now)
        elif kind == "leave":
            fleet.set_replicas([name for name in NAMES if name != arguments[0]], now)
            fleet.set_replicas(NAMES, now)
        else:
            now += arguments[0]
        assert all(min(one.queued_tokens.value, one.unfinished.value) >= 0 for one in fleet.replicas)
    for index in range(3):
        for _ in range(2):
            fleet.ended(f"r{index}", now)
    reported = {one.name for one in fleet.replicas if one.reported_at is not None}
    others = [one for one in fleet.replicas if one.name not in reported]
    assert all(one.queued_tokens.value == one.unfinished.value == 0 for one in others)
    for name in reported:
        fleet.take_report(name, ReplicaReport(now), now)
    assert all(one.queued_tokens.value == one.unfinished.value == 0 for one in fleet.replicas)
    fleet.expire(now + STALENESS)
    assert len(fleet._index) == 0
    assert not fleet._routed
    assert not fleet._computed
    assert not fleet._reports


def test_a_report_that_is_too_old_counts_for_nothing() -> None:
    fleet, blocks = Fleet(["a", "b"], max_staleness=STALENESS), prompt(0, 5)
    fleet.routed("x", prompt(1, 2), "a", 0.0)
    fleet.take_report("a", ReplicaReport(1.0, frozenset(blocks.hashes), 500, 3, 4, is_full=True), 2.0)
    [a, _] = fleet.replicas
    assert (fleet.num_cached_tokens("a", blocks, 10.9), a.queued_tokens.value, a.unfinished.value) == (
        20,
        500,
        7,
    )
    assert a.is_full
    assert (fleet.num_cached_tokens("a", blocks, 11.0), a.queued_tokens.value, a.unfinished.value) == (
        0,
        9,
        1,
    )
    assert not a.is_full
    fleet.take_report("a", ReplicaReport(0.9, frozenset(blocks.hashes)), 11.0)
    assert fleet.num_cached_tokens("a", blocks, 11.0) == 0, "too old when it arrives"


def test_a_report_says_which_blocks_of_computed_prompts_are_there() -> None:
    fleet, blocks, other = Fleet(["a"], max_staleness=STALENESS), prompt(0, 5), prompt(1, 3)
    fleet.routed("x", blocks, "a", 0.0)
    fleet.routed("y", other, "a", 0.0)
    fleet.started("x", 2.0)
    fleet.take_report("a", ReplicaReport(1.0), 3.0)
    assert fleet.cached_blocks(blocks, 3.0) == {"a": 5}, "the report was made before the prompt was computed"
    fleet.take_report("a", ReplicaReport(2.5, frozenset(blocks.hashes[:2])), 3.0)
    assert fleet.cached_blocks(blocks, 3.0) == {"a": 2}, "the others were evicted"
    assert fleet.cached_blocks(other, 30.0) == {"a": 3}, "this prompt still waits"
    assert fleet.cached_blocks(blocks, 30.0) == {}
    fleet.started("y", 31.0)
    assert fleet.cached_blocks(other, 40.9) == {"a": 3}, "no report has come"
    assert fleet.cached_blocks(other, 41.0) == {}


def test_a_report_that_was_overtaken_is_ignored() -> None:
    fleet, blocks = Fleet(["a"]), prompt(0, 5)
    fleet.take_report("a", ReplicaReport(2.0, frozenset(blocks.hashes), 7, 1, 1, is_full=True), 3.0)
    fleet.take_report("a", ReplicaReport(1.0, frozenset(), 9, 5, 5), 4.0)
    [a] = fleet.replicas
    assert (a.queued_tokens.value, a.unfinished.value, a.is_full) == (7, 2, True)
    assert fleet.cached_blocks(blocks, 4.0) == {"a": 5}
    assert fleet.cached_blocks(blocks, 12.0) == {}, "the older report changes nothing about the staleness"


def test_a_report_from_the_future_counts_as_made_now() -> None:
    fleet, blocks = Fleet(["a"], max_staleness=STALENESS), prompt(0, 5)
    fleet.take_report("a", ReplicaReport(1e6, frozenset(blocks.hashes)), 1.0)
    assert fleet.cached_blocks(blocks, 10.9) == {"a": 5}
    assert fleet.cached_blocks(blocks, 11.0) == {}


def test_a_request_is_load_with_the_tokens_that_are_not_cached_at_its_replica() -> None:
    fleet, first, second = Fleet(["a", "b"]), prompt(0, 5, extra=1), prompt(0, 7, extra=3)
    fleet.routed("first", first, "a", 1.0)
    fleet.routed("second", second, "a", 2.0)
    fleet.routed("third", second, "b", 3.0)
    a, b = fleet.replicas
    assert (a.queued_tokens.value, b.queued_tokens.value) == (21 + 31 - 20, 31)
    fleet.routed("second", second, "b", 4.0)  # it was sent elsewhere after all
    assert (a.queued_tokens.value, b.queued_tokens.value) == (21, 31 + 3)
    fleet.started("first", 5.0)
    assert (a.queued_tokens.value, a.unfinished.value) == (0, 1)
    fleet.ended("first", 6.0)
    assert a.unfinished.value == 0


def test_equal_prompts_with_different_salts_never_match() -> None:
    fleet = Fleet(["a"])
    fleet.routed("x", prompt(0, 5, salt="mine"), "a", 0.0)
    assert fleet.cached_blocks(prompt(0, 5, salt="mine"), 0.0) == {"a": 5}
    assert fleet.cached_blocks(prompt(0, 5, salt="yours"), 0.0) == {}
    assert fleet.cached_blocks(prompt(0, 5), 0.0) == {}


def test_calls_for_unknown_replicas_and_requests_are_ignored() -> None:
    fleet = Fleet(["a"])
    fleet.routed("x", prompt(0, 5), "gone", 0.0)
    fleet.take_report("gone", ReplicaReport(0.0), 0.0)
    fleet.started("x", 0.0)
    fleet.ended("y", 0.0)
    fleet.remove("gone")
    assert fleet.num_cached_tokens("gone", prompt(0, 5), 0.0) == 0
    assert [one.queued_tokens.value for one in fleet.replicas] == [0]


def test_two_blocks_of_a_prompt_with_equal_hashes_do_no_harm() -> None:
    """A client may find two blocks whose short hashes collide."""
    digest = short_hash(bytes(32))
    fleet, blocks = Fleet(["a"], max_staleness=STALENESS), PromptBlocks((digest, digest), 9, SIZE)
    fleet.routed("x", blocks, "a", 0.0)
    fleet.ended("x", 1.0)
    assert fleet.cached_blocks(blocks, 2.0) == {"a": 2}
    assert fleet.cached_blocks(blocks, 11.0) == {}


def test_a_staleness_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"max_staleness \(0\)"):
        Fleet(max_staleness=0)
