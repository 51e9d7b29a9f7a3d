"""Preemption, by swap above all: engines under pressure, and what a configuration asks for.

Oracles: the same requests in a roomy pool; each request alone. Equal means equal bits.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.engine_config import EngineConfig
from tiny_llm.engine_core import EngineCore
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import group_layers
from tiny_llm.managers import make_manager
from tiny_llm.model import Model
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_queues import BeamStep
from tiny_llm.policies import Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler import AgedPriority
from tiny_llm.sequence import PagedSequence, SequenceState, TokenLogprobs
from tiny_llm.step import Plan

from promises import (
    Arrival,
    Scenario,
    Watched,
    beam_searches,
    check_all_returned,
    check_pages,
    check_scenario,
    instruction_sets,
    policies,
    prompts,
    sampling,
    threads,
)
from symbolic_pool import SymbolicPool
from tiny_llm_checkpoints.errors import ConfigError
from tiny_llm_checkpoints.sizes import shown_bytes
from tiny_model import EOS, VOCAB, examples, gemma_model, random_prompt, tiny_config, tiny_model

Said = list[tuple[int, TokenLogprobs | None, str | None]]


# ---- engines whose pool is too small ----


class Request(NamedTuple):
    """A prompt and what is asked of it; it comes before this step."""

    name: str
    prompt: Sequence[int]
    params: SamplingParams
    step: int = 0


def asks(name: str, length: int, max_tokens: int, *, step: int = 0, n: int = 1, **options: object) -> Request:
    """A request with a prompt of its own."""
    params = SamplingParams(
        max_tokens=max_tokens, n=n, seed=len(name) + length, ignore_eos=True, logprobs=2, **options
    )  # type: ignore[arg-type]
    return Request(name, random_prompt(length, seed=length), params, step)


def serve(
    manager: PagedBatchManager,
    requests: Sequence[Request],
    watch: Callable[[EngineCore, int], None] = lambda engine, step: None,
) -> dict[str, Said]:
    """Serve requests to their ends; what each completion said. Pages and host blocks are counted always."""
    engine, said = EngineCore(manager, (EOS,)), dict[str, Said]()
    for step in range(2000):
        for request in requests:
            if request.step == step:
                engine.add_request(request.name, list(request.prompt), request.params)
        for output in engine.step():
            said.setdefault(output.seq_id, []).append((output.token, output.logprobs, output.finish_reason))
        check_pages(manager)
        watch(engine, step)
        if not engine.has_work and step >= max(request.step for request in requests):
            break
    assert not engine.has_work, "somebody hangs"
    assert not engine.take_failures()
    check_all_returned(manager)
    return said


def squeezed(
    blocks: int,
    *,
    swap_blocks: int = 1000,
    prefix: bool = False,
    block_size: int = 4,
    seats: int = 8,
    make: Callable[[], Model] = tiny_model,
) -> Watched:
    """A manager of few pages, which preempts."""
    those = policies(True, prefix, group_layers(make().config.windows), swap_blocks)
    return Watched(blocks, block_size, seats, model=make(), max_batched_tokens=40, policies=those)


def roomy(make: Callable[[], Model] = tiny_model) -> PagedBatchManager:
    """A manager in which nobody gives way."""
    return PagedBatchManager(900, 16, 8, model=make(), max_batched_tokens=200)


OLD_AND_FORKS = (
    *(asks(f"old{i}", 8 - i, 24) for i in range(3)),
    asks("three", 17, 30, n=3),
)


@pytest.mark.parametrize("prefix", [False, True])
def test_forks_wait_with_one_copy_of_their_prompt_and_come_back_to_one(prefix: bool) -> None:
    """Three forks are swapped out one after the other: 4 full blocks of the prompt are on the host once.

    When all run again these blocks are in the pool once, too, whether the prefix cache has them or the first
    who came back; and everybody says what he says in a roomy pool.
    """
    manager = squeezed(28, prefix=prefix)
    assert manager._scheduler.swap_space is not None
    host = manager._scheduler.swap_space.allocator
    waiting, running, others = set[int](), list[tuple[int, int]](), 0
    requests = (*OLD_AND_FORKS, asks("late", 40, 4, step=20))  # who comes last has nothing on the host

    def watch(engine: EngineCore, step: int) -> None:
        nonlocal others
        out = [s.swapped for s in manager.waiting if s.request_id == "three" and s.swapped is not None]
        waiting.add(len(out))
        if out:
            own = sum(len(swapped.tables[0].host_blocks) - 4 for swapped in out)
            assert host.num_blocks - host.num_free == 4 + own
        assert engine.stats.num_swapped == manager.num_swapped == len(out)
        others += engine.stats.num_waiting > len(out) > 0
        forks = [sequence.table.blocks for sequence in manager.running if sequence.request_id == "three"]
        if 3 in waiting and len(forks) == 3:
            running.append((len({block for blocks in forks for block in blocks}), sum(map(len, forks))))

    said = serve(manager, requests, watch)
    assert waiting == {0, 1, 2, 3}
    assert running
    assert others
    assert all(different == named - 2 * 4 for different, named in running)
    assert manager.happened["sequences swapped out"] == manager.num_preemptions == 3
    assert said == serve(roomy(), requests)


class Noting(Watched):
    """A manager that adds up the tokens that were computed, and those lost with somebody's pages."""

    computed = 0
    lost = 0

    def _schedule(self) -> Plan[PagedSequence]:
        plan = super()._schedule()
        self.computed += sum(chunk.stop - chunk.start for chunk in plan.chunks)
        return plan

    def _preempt(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        had = sequence.num_computed
        super()._preempt(sequence, plan)
        self.lost += 0 if sequence.swapped else had


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("swap_blocks", [0, 4, 7, 9, 1000])
def test_where_the_host_is_full_it_is_computed_again(swap_blocks: int, prefix: bool) -> None:
    """Forks give way with 5 to 7 blocks each, 4 of them in common; 4 blocks on the host hold none of them.

    Counted: what was lost with somebody's pages is computed a second time, or found in the prefix cache, and
    nothing else is. The answers are the same.
    """
    those = policies(True, prefix, swap_blocks=swap_blocks)
    manager = Noting(28, 4, 8, model=tiny_model(), max_batched_tokens=40, policies=those)
    said = serve(manager, OLD_AND_FORKS)
    out, preempted = manager.happened["sequences swapped out"], manager.num_preemptions
    assert preempted >= 3
    assert out == 0 if swap_blocks < 5 else out == preempted if swap_blocks == 1000 else 0 < out < preempted
    prompts = sum(len(request.prompt) for request in OLD_AND_FORKS)
    once = prompts + sum(len(answer) - 1 for answer in said.values())
    assert (manager.lost > 0) == (out < preempted)
    assert manager.computed <= once + manager.lost if prefix else manager.computed == once + manager.lost
    assert said == serve(roomy(), OLD_AND_FORKS)


# A crowd that begins small and grows, so that most have to go and come back; whether it is a search.
CROWD = (
    (asks("a", 3, 24), False),
    (asks("b", 4, 14, n=3), False),
    (asks("c", 2, 16), False),
    (asks("d", 5, 12, n=2), True),
    (asks("e", 4, 15), False),
)


def symbolic(windows: tuple[int | None, ...], blocks: int, swap_blocks: int) -> tuple[Watched, SymbolicPool]:
    """A manager without a model, and the pool of values that carries its plans out."""
    pool, groups = SymbolicPool(3), group_layers(windows)
    manager = Watched(
        blocks,
        3,
        6,
        max_batched_tokens=20,
        max_model_len=99,
        policies=policies(True, True, groups, swap_blocks),
        groups=groups,
        watch=pool.perform,
    )
    return manager, pool


def run_symbolic(
    windows: tuple[int | None, ...], blocks: int, swap_blocks: int, cancelled: str = "", at: int = -1
) -> tuple[Counter[str], int, bool]:
    """Serve the crowd, one of whom is cancelled before a step; what happened, how many steps, was he swapped.

    After each step everybody reads his own, and all pages and host blocks are accounted for.
    """
    manager, pool = symbolic(windows, blocks, swap_blocks)
    for request, is_beam in CROWD:
        manager.add_request(list(request.prompt), request.name, request.params, beam_search=is_beam)
    fresh, step, was_swapped, reported = 1000, 0, False, set[str]()
    while manager.has_work:
        if step == at:
            of_request = [s for s in manager.waiting if s.request_id == cancelled]
            was_swapped = any(s.state is SequenceState.SWAPPED for s in of_request)
            manager.cancel(cancelled)
            check_pages(manager)
            if not manager.has_work:
                break
        ready = list(manager.process_batch())
        for seq_id in (seq_id for seq_id in ready if not seq_id.startswith("d")):
            fresh += 1
            manager.commit({seq_id: fresh})
            if manager.sequence(seq_id).num_tokens == manager.sequence(seq_id).max_len:
                manager.finish(seq_id)
        reported |= {seq_id for seq_id in ready if seq_id.startswith("d")}
        beams = [s for s in manager.running if s.request_id == "d"]
        if beams and {beam.seq_id for beam in beams} <= reported:
            reported.clear()
            if beams[0].num_tokens == beams[0].max_len:
                manager.cancel("d")
            else:
                fresh += 2
                parents = [beams[0].seq_id, beams[-1].seq_id]
                manager.advance("d", [BeamStep(seq_id, fresh + i) for i, seq_id in enumerate(parents)])
        if step >= at:  # until then all is as it is when nobody is cancelled
            check_pages(manager)
            for sequence in manager.running:
                pool.check(sequence)
        step += 1
        assert step < 500, "somebody hangs"
    check_all_returned(manager)
    return manager.happened, step, was_swapped


@pytest.mark.parametrize(
    ("windows", "blocks", "swap_blocks"), [((None,), 11, 1000), ((None,), 13, 9), ((None, 5), 22, 1000)]
)
def test_whoever_is_cancelled_leaves_nothing_behind_whenever_it_is(
    windows: tuple[int | None, ...], blocks: int, swap_blocks: int
) -> None:
    """Each before every third step, running or swapped or just back; the others read their own to the end."""
    happened, steps, _ = run_symbolic(windows, blocks, swap_blocks)
    assert happened["sequences swapped out"] >= 2
    assert happened["blocks swapped in"] >= 7
    swapped = Counter[str]()
    for number, (request, _) in enumerate(CROWD):
        for at in range(number % 3, steps, 3):
            *_, was_swapped = run_symbolic(windows, blocks, swap_blocks, request.name, at)
            swapped[request.name] += was_swapped
    assert len(+swapped) >= 2, f"hardly anybody was swapped when he was cancelled: {swapped}"


class CopyingFailedError(Exception):
    """The fault."""


def test_found_blocks_that_a_window_skips_on_the_way_back_are_idle_again() -> None:
    """Only the cache holds them then: uncounted, they could never be evicted."""
    groups = group_layers((None, 5))
    those = policies(True, True, groups, 1000)
    manager = PagedBatchManager(
        200, 3, 6, max_batched_tokens=64, max_model_len=99, policies=those, groups=groups
    )
    params, prompt = SamplingParams(max_tokens=20, ignore_eos=True), list(range(36))
    manager.add_request(prompt, "long", params)
    step_and_check(manager)
    manager.add_request([*prompt[:12], 99], "short", params)
    step_and_check(manager)
    long = manager.sequence("long")
    manager._scheduler._preempt(long, Plan())
    assert long.swapped is not None
    manager.finish("short")
    streams, first = [long.stream_of(group, 12) for group in range(2)], long.swapped.tables[1].first
    while manager.prefix.longest_hit(streams, 0, 12) >= first:
        manager.prefix.evict(1)
    assert manager.prefix.longest_hit(streams, 0, 12) == 4, (
        "what the short one has left; the window is behind"
    )
    step_and_check(manager)
    assert long.state is SequenceState.RUNNING


def step_and_check(manager: PagedBatchManager) -> None:
    """One step, whose tokens are all 500."""
    for seq_id in manager.process_batch():
        manager.commit({seq_id: 500})
    check_pages(manager)


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("cancelled", ["old0", "old2", "three", ""])
def test_copies_that_were_not_made_are_nobodys_keys(
    monkeypatch: pytest.MonkeyPatch, direction: str, cancelled: str
) -> None:
    """A step's copies fail once; then somebody is cancelled, or nobody. Everybody else gets his answer."""
    manager = squeezed(28, prefix=True)
    engine, said, failed = EngineCore(manager, (EOS,)), dict[str, Said](), False
    fill_from, target = KVPool.fill_from, manager._swap_pool if direction == "out" else manager.pool

    def failing(self: KVPool, source: KVPool, pairs: Sequence[tuple[int, int]]) -> None:
        nonlocal failed
        if pairs and self is target and source is not self and not failed:
            failed = True
            raise CopyingFailedError
        fill_from(self, source, pairs)

    monkeypatch.setattr(KVPool, "fill_from", failing)
    for request in OLD_AND_FORKS:
        engine.add_request(request.name, list(request.prompt), request.params)
    for _ in range(900):
        had_failed = failed
        for output in engine.step():
            said.setdefault(output.seq_id, []).append((output.token, output.logprobs, output.finish_reason))
        if failed and not had_failed:
            check_pages(manager)
            engine.cancel(cancelled)
        check_pages(manager)
        if not engine.has_work:
            break
    assert not engine.has_work, "somebody hangs"
    assert failed
    check_all_returned(manager)
    given_up = {failure.request_id for failure in engine.take_failures()}
    assert given_up <= ({"three"} if direction == "in" else set()), "who comes back alone is to blame"
    for seq_id, answer in serve(roomy(), OLD_AND_FORKS).items():
        assert seq_id.split("/")[0] in {cancelled, *given_up} or said[seq_id] == answer


# ---- what a configuration asks for ----


def test_the_swap_space_is_as_large_as_the_pool_unless_it_is_said() -> None:
    """By hand: a block of 16 tokens takes 2 layers * 2 arrays * 2 heads * 32 numbers * 2 bytes: 8,192."""
    model = tiny_model()
    for options, blocks in (
        ({}, 30),
        ({"swap_space": 8192}, 1),
        ({"swap_space": 8191 + 5 * 8192}, 5),
        ({"swap_space": 1 << 20}, 128),
    ):
        config = EngineConfig(num_blocks=30, preemption_mode="swap", **options)
        manager = make_manager(config, model)
        assert isinstance(manager, PagedBatchManager)
        assert manager._swap_pool is not None
        assert manager._swap_pool.num_blocks == config.swap_blocks(model.config, 2) == blocks
        assert manager._swap_pool.dtype == manager.pool.dtype  # type: ignore[union-attr]
        assert manager._swap_pool.nbytes == 8192 * blocks
    wide = EngineConfig(preemption_mode="swap", swap_space=8192 * 6, kv_cache_dtype="float32", block_size=8)
    assert wide.swap_blocks(model.config, 4) == 6
    windowed = gemma_model().config  # three groups of one layer: a block is half as large
    assert EngineConfig(preemption_mode="swap", swap_space=8192).swap_blocks(windowed, 2) == 2


@pytest.mark.parametrize("mode", ["recompute", "none"])
def test_without_swapping_there_is_no_swap_space(mode: str) -> None:
    config = EngineConfig(num_blocks=30, preemption_mode=mode)
    assert config.swap_blocks(tiny_config(), 2) == 0
    manager = make_manager(config, tiny_model())
    assert isinstance(manager, PagedBatchManager)
    assert manager._swap_pool is None
    assert manager.num_swapped == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"swap_space": 8192}, r"swap_space \(8 KiB\) needs preemption_mode='swap'"),
        ({"swap_space": 8192, "preemption_mode": "none"}, "swap_space"),
        ({"swap_space": 0, "preemption_mode": "swap"}, "swap_space must be at least 1, not 0"),
        ({"preemption_mode": "swapping"}, "preemption_mode must be one of recompute, swap, none"),
    ],
)
def test_a_swap_space_that_makes_no_sense_is_refused_at_once(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("swap_space", [1, 8191, 1 << 60])
def test_a_swap_space_of_no_block_or_more_than_the_machine_has_is_refused_with_the_model(
    swap_space: int,
) -> None:
    config = EngineConfig(num_blocks=30, preemption_mode="swap", swap_space=swap_space)
    with pytest.raises(ConfigError, match=rf"swap_space \({shown_bytes(swap_space)}\) .*\(8 KiB\)"):
        make_manager(config, tiny_model())


# ---- nobody starves ----


@pytest.mark.parametrize("swap_blocks", [0, 1000])
@pytest.mark.parametrize("patience", [0, 3, 8])
def test_an_old_request_of_low_priority_ends_while_urgent_ones_keep_coming(
    patience: int, swap_blocks: int
) -> None:
    """Two of priority 1 among 80 of priority 0, one a step, which together are more than the pool can take.

    By hand: those that come up to `patience` requests later go before an old one and no others do. So when it
    ends, nobody who came after that has ended who had not been in the pool beside it.
    """
    those = Policies(NewestFirst(), swap_blocks=swap_blocks, priority_key=AgedPriority(patience).key)
    manager = PagedBatchManager(9, 3, 4, model=tiny_model(), max_batched_tokens=24, policies=those)
    slow = [asks("slow1", 9, 12, priority=1, step=2), asks("slow2", 7, 12, priority=1, step=5)]
    urgent = [asks(f"{i}", 4 + i % 5, 6, step=i) for i in range(80)]
    requests = sorted([*urgent, *slow], key=lambda request: request.step)
    arrived = [request.name for request in requests]
    ended: list[str] = []

    def watch(engine: EngineCore, step: int) -> None:
        there = {s.request_id for s in [*manager.running, *manager.waiting]}
        ended.extend(name for name in arrived[: step + 3] if name not in there and name not in ended)
        ranks = [s.rank for s in manager.running]
        assert ranks == sorted(ranks)
        assert not manager.waiting or ranks < [manager.waiting[0].rank], "somebody was overtaken"

    said = serve(manager, requests, watch)
    assert manager.num_preemptions > 5
    for request in slow:
        number = arrived.index(request.name)
        later = [name for name in ended[: ended.index(request.name)] if arrived.index(name) > number]
        assert len(later) <= patience + 3, f"{later} went before {request.name}"
        assert said[request.name] == serve(roomy(), [replace_step(request)])[request.name]


def replace_step(request: Request) -> Request:
    """The same request, before the first step."""
    return request._replace(step=0)


# ---- under pressure all the time ----


@st.composite
def pressed(draw: st.DrawFn) -> Scenario:
    """Crowds that begin small, grow, and come nearly at once to a pool in which the largest just fits.

    Prompts are short beside what follows, and nobody needs much more than the others, for whom that would be
    room. Forks among them and mostly a search, prompts that begin alike, people who leave, pages that move.
    """
    arrivals = []
    searching = draw(st.sampled_from([None, 1, 2, 3]))
    for number in range(draw(st.integers(5, 7))):
        step = draw(st.integers(0, 2))
        params = draw(beam_searches(4) if number == searching else sampling(8, VOCAB))
        if isinstance(params, SamplingParams):
            many = draw(st.sampled_from([1, 2, 3, 3]))
            params = replace(params, n=many, ignore_eos=True, stop_token_ids=None, max_tokens=8)
        else:
            params = replace(params, beam_width=draw(st.sampled_from([2, 3])), max_tokens=4)
        length = draw(st.sampled_from([1, 1, 2, 3, 4]))
        prompt = draw(prompts(6, alike=draw(st.booleans())))[:length]
        cancelled_at = draw(st.sampled_from([None] * 11 + [step, step + 3, step + 7]))
        arrivals.append(Arrival(step, prompt, params, cancelled_at))
    return Scenario(
        arrivals=tuple(sorted(arrivals, key=lambda arrival: arrival.step)),
        block_size=draw(st.sampled_from([1, 1, 2, 2, 3])),
        spare_blocks=0,
        max_seqs=6,
        max_tokens=draw(st.sampled_from([6, 6, 8, 12])),
        threads=draw(threads(2)),
        instruction_set=draw(instruction_sets()),
        preempts=True,
        prefix=draw(st.booleans()),
        swap_blocks=draw(st.sampled_from([1000, 1000, 0, 3, 12])),
        grows=draw(st.sampled_from([False, False, True])),
        compacted_at=draw(st.sampled_from([(), tuple(range(0, 60, 3))])),
    )


def only_what_is_known(self: NewestFirst, sequence: PagedSequence) -> int:
    """A hasty promise: whoever is admitted may have to go with his next token."""
    return sequence.num_tokens


@pytest.mark.parametrize("hasty", [True, False])
@pytest.mark.parametrize("make", [tiny_model, gemma_model], ids=["full", "windows"])
def test_in_pools_that_hold_one_and_little_more_everybody_gets_what_he_gets_alone(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Model], hasty: bool
) -> None:
    """The promises where preempting is the rule: same bits, everybody ends, all pages and host blocks back.

    hasty: a policy that promises less than the engine's, so that somebody goes in every third step or so.
    """
    happened: Counter[str] = Counter()
    if hasty:
        monkeypatch.setattr(NewestFirst, "reserved_tokens", only_what_is_known)

    @settings(max_examples=examples(30))
    @given(pressed())
    def check(scenario: Scenario) -> None:
        happened.update(check_scenario(make(), scenario))

    check()
    per_preemption = happened["steps"] / happened["preemptions"]
    assert per_preemption < (12 if hasty else 30), f"there was little pressure: {happened}"
    for name in ("sequences swapped out", "blocks swapped in", "forks", "beams forked", "prefix hits"):
        assert happened[name] >= 5, f"there was hardly any of {name}: {happened}"
    assert happened["cancelled under way"]
    assert happened["blocks moved"]
