"""Preemption, mostly by swapping: engines under memory pressure, and the options of a configuration.

Oracles: the same requests in a large pool; each request alone. Equal means equal bits.
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

Output = list[tuple[int, TokenLogprobs | None, str | None]]


# ---- engines whose pool is too small ----


class Request(NamedTuple):
    """A prompt and its parameters, and the step before which it arrives."""

    name: str
    prompt: Sequence[int]
    params: SamplingParams
    step: int = 0


def new_request(
    name: str, length: int, max_tokens: int, *, step: int = 0, n: int = 1, **options: object
) -> Request:
    """A request with its own prompt."""
    params = SamplingParams(
        max_tokens=max_tokens, n=n, seed=len(name) + length, ignore_eos=True, logprobs=2, **options
    )  # type: ignore[arg-type]
    return Request(name, random_prompt(length, seed=length), params, step)


def serve(
    manager: PagedBatchManager,
    requests: Sequence[Request],
    watch: Callable[[EngineCore, int], None] = lambda engine, step: None,
) -> dict[str, Output]:
    """Serve requests to the end; the output of each completion. Checks pages and host blocks every step."""
    engine, answers = EngineCore(manager, (EOS,)), dict[str, Output]()
    for step in range(2000):
        for request in requests:
            if request.step == step:
                engine.add_request(request.name, list(request.prompt), request.params)
        for output in engine.step():
            answers.setdefault(output.seq_id, []).append(
                (output.token, output.logprobs, output.finish_reason)
            )
        check_pages(manager)
        watch(engine, step)
        if not engine.has_work and step >= max(request.step for request in requests):
            break
    assert not engine.has_work, "a request never finishes"
    assert not engine.take_failures()
    check_all_returned(manager)
    return answers


def small_manager(
    blocks: int,
    *,
    swap_blocks: int = 1000,
    prefix: bool = False,
    block_size: int = 4,
    max_seqs: int = 8,
    make: Callable[[], Model] = tiny_model,
) -> Watched:
    """A manager of few pages, which preempts."""
    those = policies(True, prefix, group_layers(make().config.windows), swap_blocks)
    return Watched(blocks, block_size, max_seqs, model=make(), max_batched_tokens=40, policies=those)


def large_manager(make: Callable[[], Model] = tiny_model) -> PagedBatchManager:
    """A manager in which no request is preempted."""
    return PagedBatchManager(900, 16, 8, model=make(), max_batched_tokens=200)


OLD_AND_FORKS = (
    *(new_request(f"old{i}", 8 - i, 24) for i in range(3)),
    new_request("three", 17, 30, n=3),
)


@pytest.mark.parametrize("prefix", [False, True])
def test_forks_are_swapped_out_with_one_copy_of_their_prompt_and_share_it_again(prefix: bool) -> None:
    """Three forks are swapped out one after the other: 4 full blocks of the prompt are on the host once.

    When all run again these blocks are in the pool once, too, whether they come from the prefix cache or from
    the first fork that was swapped in; and every fork has the same output as in a large pool.
    """
    manager = small_manager(28, prefix=prefix)
    assert manager._scheduler.swap_space is not None
    host = manager._scheduler.swap_space.allocator
    waiting, running, others = set[int](), list[tuple[int, int]](), 0
    requests = (*OLD_AND_FORKS, new_request("late", 40, 4, step=20))  # the last one has nothing on the host

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

    answers = serve(manager, requests, watch)
    assert waiting == {0, 1, 2, 3}
    assert running
    assert others
    assert all(different == named - 2 * 4 for different, named in running)
    assert manager.happened["sequences swapped out"] == manager.num_preemptions == 3
    assert answers == serve(large_manager(), requests)


class TokenCounter(Watched):
    """A manager that counts the tokens that were computed, and those lost with released pages."""

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
def test_when_the_host_is_full_a_preempted_sequence_is_recomputed(swap_blocks: int, prefix: bool) -> None:
    """Forks are preempted with 5 to 7 blocks each, 4 of them in common; 4 blocks on the host are too few.

    Counted: the tokens lost with released pages are computed a second time, or found in the prefix cache, and
    no others are. The answers are the same.
    """
    those = policies(True, prefix, swap_blocks=swap_blocks)
    manager = TokenCounter(28, 4, 8, model=tiny_model(), max_batched_tokens=40, policies=those)
    answers = serve(manager, OLD_AND_FORKS)
    out, preempted = manager.happened["sequences swapped out"], manager.num_preemptions
    assert preempted >= 3
    assert out == 0 if swap_blocks < 5 else out == preempted if swap_blocks == 1000 else 0 < out < preempted
    prompts = sum(len(request.prompt) for request in OLD_AND_FORKS)
    once = prompts + sum(len(answer) - 1 for answer in answers.values())
    assert (manager.lost > 0) == (out < preempted)
    assert manager.computed <= once + manager.lost if prefix else manager.computed == once + manager.lost
    assert answers == serve(large_manager(), OLD_AND_FORKS)


# Requests that start small and grow, so that most are swapped out and in; and whether each is a beam search.
GROWING_REQUESTS = (
    (new_request("a", 3, 24), False),
    (new_request("b", 4, 14, n=3), False),
    (new_request("c", 2, 16), False),
    (new_request("d", 5, 12, n=2), True),
    (new_request("e", 4, 15), False),
)


def symbolic(windows: tuple[int | None, ...], blocks: int, swap_blocks: int) -> tuple[Watched, SymbolicPool]:
    """A manager without a model, and the pool of plain values that performs its plans."""
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
    """Serve GROWING_REQUESTS, cancelling one before a step; returns events, steps, whether it was swapped.

    After each step every sequence reads its own tokens, and all pages and host blocks are accounted for.
    """
    manager, pool = symbolic(windows, blocks, swap_blocks)
    for request, is_beam in GROWING_REQUESTS:
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
        if step >= at:  # until then the run is the same as without a cancel
            check_pages(manager)
            for sequence in manager.running:
                pool.check(sequence)
        step += 1
        assert step < 500, "a request never finishes"
    check_all_returned(manager)
    return manager.happened, step, was_swapped


@pytest.mark.parametrize(
    ("windows", "blocks", "swap_blocks"), [((None,), 11, 1000), ((None,), 13, 9), ((None, 5), 22, 1000)]
)
def test_a_request_that_is_cancelled_at_any_time_leaves_nothing_behind(
    windows: tuple[int | None, ...], blocks: int, swap_blocks: int
) -> None:
    """Each is cancelled before every third step, running, swapped out or just back; the others go on."""
    happened, steps, _ = run_symbolic(windows, blocks, swap_blocks)
    assert happened["sequences swapped out"] >= 2
    assert happened["blocks swapped in"] >= 7
    swapped = Counter[str]()
    for number, (request, _) in enumerate(GROWING_REQUESTS):
        for at in range(number % 3, steps, 3):
            *_, was_swapped = run_symbolic(windows, blocks, swap_blocks, request.name, at)
            swapped[request.name] += was_swapped
    assert len(+swapped) >= 2, f"hardly any request was swapped out when it was cancelled: {swapped}"


class CopyingFailedError(Exception):
    """The injected error."""


def test_cached_blocks_that_a_window_skips_at_swap_in_are_idle_again() -> None:
    """Only the cache holds these blocks then: not counted as idle, they could never be evicted."""
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
        "the blocks that the short one left; the window has passed them"
    )
    step_and_check(manager)
    assert long.state is SequenceState.RUNNING


def step_and_check(manager: PagedBatchManager) -> None:
    """Run one step, in which every token is 500."""
    for seq_id in manager.process_batch():
        manager.commit({seq_id: 500})
    check_pages(manager)


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("cancelled", ["old0", "old2", "three", ""])
def test_blocks_whose_copies_failed_are_never_read(
    monkeypatch: pytest.MonkeyPatch, direction: str, cancelled: str
) -> None:
    """A step's copies fail once; then one request is cancelled, or none. All others get their answers."""
    manager = small_manager(28, prefix=True)
    engine, answers, failed = EngineCore(manager, (EOS,)), dict[str, Output](), False
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
            answers.setdefault(output.seq_id, []).append(
                (output.token, output.logprobs, output.finish_reason)
            )
        if failed and not had_failed:
            check_pages(manager)
            engine.cancel(cancelled)
        check_pages(manager)
        if not engine.has_work:
            break
    assert not engine.has_work, "a request never finishes"
    assert failed
    check_all_returned(manager)
    failed_requests = {failure.request_id for failure in engine.take_failures()}
    assert failed_requests <= ({"three"} if direction == "in" else set()), (
        "only the sequence that was swapped in is the culprit"
    )
    for seq_id, answer in serve(large_manager(), OLD_AND_FORKS).items():
        assert seq_id.split("/")[0] in {cancelled, *failed_requests} or answers[seq_id] == answer


# ---- options of a configuration ----


def test_the_swap_space_is_as_large_as_the_pool_by_default() -> None:
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
def test_an_invalid_swap_space_is_rejected_immediately(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("swap_space", [1, 8191, 1 << 60])
def test_a_swap_space_below_one_block_or_above_the_machines_memory_is_rejected_with_the_model(
    swap_space: int,
) -> None:
    config = EngineConfig(num_blocks=30, preemption_mode="swap", swap_space=swap_space)
    with pytest.raises(ConfigError, match=rf"swap_space \({shown_bytes(swap_space)}\) .*\(8 KiB\)"):
        make_manager(config, tiny_model())


# ---- no starvation ----


@pytest.mark.parametrize("swap_blocks", [0, 1000])
@pytest.mark.parametrize("patience", [0, 3, 8])
def test_an_old_request_of_low_priority_finishes_while_urgent_ones_keep_coming(
    patience: int, swap_blocks: int
) -> None:
    """Two of priority 1 among 80 of priority 0, one per step, which together need more than the pool.

    By hand: those that arrive up to `patience` requests later go before an old one, and no others do. So when
    it finishes, no later one has finished that was not in the pool together with it.
    """
    those = Policies(NewestFirst(), swap_blocks=swap_blocks, priority_key=AgedPriority(patience).key)
    manager = PagedBatchManager(9, 3, 4, model=tiny_model(), max_batched_tokens=24, policies=those)
    slow = [new_request("slow1", 9, 12, priority=1, step=2), new_request("slow2", 7, 12, priority=1, step=5)]
    urgent = [new_request(f"{i}", 4 + i % 5, 6, step=i) for i in range(80)]
    requests = sorted([*urgent, *slow], key=lambda request: request.step)
    arrived = [request.name for request in requests]
    ended: list[str] = []

    def watch(engine: EngineCore, step: int) -> None:
        active = {s.request_id for s in [*manager.running, *manager.waiting]}
        ended.extend(name for name in arrived[: step + 3] if name not in active and name not in ended)
        ranks = [s.rank for s in manager.running]
        assert ranks == sorted(ranks)
        assert not manager.waiting or ranks < [manager.waiting[0].rank], "a request was overtaken"

    answers = serve(manager, requests, watch)
    assert manager.num_preemptions > 5
    for request in slow:
        number = arrived.index(request.name)
        later = [name for name in ended[: ended.index(request.name)] if arrived.index(name) > number]
        assert len(later) <= patience + 3, f"{later} went before {request.name}"
        assert answers[request.name] == serve(large_manager(), [replace_step(request)])[request.name]


def replace_step(request: Request) -> Request:
    """The same request, arriving before the first step."""
    return request._replace(step=0)


# ---- constant memory pressure ----


@st.composite
def tight_scenarios(draw: st.DrawFn) -> Scenario:
    """Requests that start small, grow, and arrive almost together in a pool that just fits the largest.

    Prompts are short compared with outputs, and no request needs much more than the others, because that
    would be spare capacity for them. The requests include forks, usually a search, common prefixes, cancels
    and compactions.
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
        prompt = draw(prompts(6, share=draw(st.booleans())))[:length]
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


def only_known_tokens(self: NewestFirst, sequence: PagedSequence) -> int:
    """A reservation that is too small: an admitted sequence may be preempted for its next token."""
    return sequence.num_tokens


@pytest.mark.parametrize("too_little", [True, False])
@pytest.mark.parametrize("make", [tiny_model, gemma_model], ids=["full", "windows"])
def test_sequences_in_a_tiny_pool_get_the_same_tokens_as_when_served_alone(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Model], too_little: bool
) -> None:
    """The promises when preemption is the rule: same bits, every request finishes, all blocks are freed.

    too_little: a policy that reserves less than the engine's, which preempts in about every third step.
    """
    happened: Counter[str] = Counter()
    if too_little:
        monkeypatch.setattr(NewestFirst, "reserved_tokens", only_known_tokens)

    @settings(max_examples=examples(30))
    @given(tight_scenarios())
    def check(scenario: Scenario) -> None:
        happened.update(check_scenario(make(), scenario))

    check()
    per_preemption = happened["steps"] / happened["preemptions"]
    assert per_preemption < (12 if too_little else 30), f"few preemptions: {happened}"
    for name in ("sequences swapped out", "blocks swapped in", "forks", "beams forked", "prefix hits"):
        assert happened[name] >= 5, f"there were hardly any {name}: {happened}"
    assert happened["cancelled requests"]
    assert happened["blocks moved"]
