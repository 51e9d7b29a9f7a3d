"""Day 3.2, tasks 16 and 17: steps of many requests on one pool of pages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.kv_context import KVContext
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.page_layout import PageLayout
from tiny_llm.page_scheduler import PageScheduler
from tiny_llm.paged_attention import BlockAllocator, BlockCopy
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_queues import BeamStep
from tiny_llm.policies import NoPrefixSharing, Policies
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.step import Plan, Scheduled

from common.blocks import filled
from common.paged_managers import RecordingModel, check_logits, check_pages, manager_of, with_model
from common.plain_pool import check_conserved
from common.toy_models import tiny_model
from common.toy_requests import ids, limits, prompt
from tiny_llm_checkpoints.model_config import ModelConfig

# Task 16: PagedBatchManager.run_plan


def chunk(manager: PagedBatchManager, seq_id: str, start: int, stop: int) -> Scheduled[PagedSequence]:
    """A plan's chunk for the positions start .. stop - 1 of a sequence, with its pages allocated."""
    sequence = manager.sequence(seq_id)
    return Scheduled(sequence, start, stop, sequence.append_tokens(stop - start))


def queued(manager: PagedBatchManager, prompts: Mapping[str, list[int]]) -> None:
    """Add requests whose chunks the test schedules itself."""
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())


def test_task_16_all_chunks_are_one_pass_with_a_row_of_logits_per_complete_sequence() -> None:
    """Oracle: the model without cache and batch.

    By hand: 7 + 3 + 12 tokens, and two sequences need logits.
    """
    prompts, model = {"a": prompt(7, 1), "b": prompt(5, 2), "c": prompt(12, 3)}, RecordingModel()
    manager = with_model(model=model)
    queued(manager, prompts)
    rows = manager.run_plan(
        Plan([chunk(manager, "a", 0, 7), chunk(manager, "b", 0, 3), chunk(manager, "c", 0, 12)])
    )
    assert rows is not None
    assert rows.shape == (2, 50)
    check_logits({"a": rows[0], "c": rows[1]}, prompts)
    assert (model.fed, model.num_rows) == ([22], [2])


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_task_16_chunks_without_logits_are_computed_too(block_size: int) -> None:
    """Oracle: the model without cache and batch: three chunks of two prompts; the first two return no row."""
    prompts = {"a": prompt(11, 4), "b": prompt(9, 5)}
    manager = with_model(block_size=block_size)
    queued(manager, prompts)
    for start, stop in ((0, 3), (3, 8)):
        plan = Plan([chunk(manager, name, start, stop) for name in prompts])
        assert manager.run_plan(plan) is None
    rows = manager.run_plan(Plan([chunk(manager, name, 8, len(tokens)) for name, tokens in prompts.items()]))
    assert rows is not None
    check_logits(dict(zip(prompts, rows, strict=True)), prompts)


def test_task_16_copies_are_made_before_the_pass_writes() -> None:
    """Oracle: the model without cache and batch: two forks of 6 tokens in blocks of 4 diverge."""
    manager, tokens = with_model(), prompt(6, 6)
    queued(manager, {"a": tokens})
    first = manager.sequence("a")
    manager.run_plan(Plan([chunk(manager, "a", 0, 6)]))
    second = first.fork("other", 0)
    for sequence, token in ((first, 11), (second, 23)):
        sequence.outputs.append(token)
    plan = Plan([Scheduled(one, 6, 7, one.append_tokens(1)) for one in (first, second)])
    assert len(plan.copies) == 1
    rows = manager.run_plan(plan)
    assert rows is not None
    check_logits({"a": rows[0], "b": rows[1]}, {"a": [*tokens, 11], "b": [*tokens, 23]})


def test_task_16_the_pool_is_resized_to_the_allocator_before_the_pass() -> None:
    """Oracle: by hand, and the model without cache: the pool starts without the second sequence's blocks."""
    manager, prompts = with_model(min_pages=2), {"a": prompt(7, 7), "b": prompt(9, 8)}
    queued(manager, prompts)
    manager.run_plan(Plan([chunk(manager, "a", 0, 7)]))
    manager.allocator.resize(8)
    rows = manager.run_plan(Plan([chunk(manager, "b", 0, 9)]))
    assert rows is not None
    check_logits({"b": rows[0]}, prompts)
    manager.allocator.resize(16)
    assert manager.run_plan(Plan()) is None
    assert manager.pool is not None
    assert manager.pool.num_blocks == 16


def test_task_16_the_pool_is_resized_before_blocks_are_copied() -> None:
    """Oracle: the blocks' contents: the allocator has grown, and a copy goes to one of its new blocks.

    Common mistake: copying first, to a block that the pool does not have yet.
    """
    manager = with_model(blocks=12)
    pool = filled_pool(manager)
    queued(manager, {"a": prompt(3, 10)})
    manager.allocator.resize(16)
    first = chunk(manager, "a", 0, 3)
    src, dst = (
        next(block for block in blocks if not manager.allocator.ref_count(block))
        for blocks in ((10, 11), (15, 14))  # the filled ones, and two of the new ones
    )
    content = held(pool, src)
    manager.run_plan(Plan([first._replace(copies=[BlockCopy(src, dst, 4)])]))
    np.testing.assert_array_equal(
        held(pool, dst), content, err_msg="resize the pool before the plan's copies"
    )


def test_task_16_with_prompt_logprobs_every_prompt_token_gets_a_row_of_logits() -> None:
    """Oracle: the model without cache and batch: a prompt's log-probabilities need all rows."""
    manager, tokens = with_model(), prompt(5, 9)
    manager.add_request(tokens, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    rows = manager.run_plan(Plan([chunk(manager, "a", 0, 5)]))
    assert rows is not None
    known = {str(i): tokens[: i + 1] for i in range(5)}
    check_logits(dict(zip(known, rows, strict=True)), known)


def filled_pool(manager: PagedBatchManager) -> KVPool:
    """A manager's pool with random keys and values in the blocks 10 and 11, which no sequence holds."""
    pool, filling = manager.pool, mx.random.normal((2, 8, 2, 8), key=mx.random.key(1))
    assert pool is not None
    for layer in range(2):
        pool.write(layer, mx.arange(40, 48), filling[layer], -filling[layer])
    return pool


def held(pool: KVPool, block: int) -> np.ndarray:
    """The keys and values of one block in both layers."""
    return np.stack([np.array(mx.stack(pool.read_blocks(layer, [block]))) for layer in range(2)])


def test_task_16_blocks_are_swapped_before_copies_and_the_pass() -> None:
    """Oracle: the blocks' contents. A plan may have no chunk; a copy may overwrite a swapped-out block.

    Common mistake: copying first, so the host gets the copied content.
    """
    manager = with_model(blocks=16, policies=Policies(swap_blocks=3))
    pool, tokens = filled_pool(manager), prompt(3, 10)
    tenth, eleventh = held(pool, 10), held(pool, 11)
    queued(manager, {"a": tokens})
    copied = chunk(manager, "a", 0, 3)._replace(copies=[BlockCopy(10, 11, 4)])
    rows = manager.run_plan(Plan([copied], swapped_out=[(11, 2)]))
    assert rows is not None
    check_logits({"a": rows[0]}, {"a": tokens})
    np.testing.assert_array_equal(
        held(pool, 11), tenth, err_msg="the plan's copy from block 10 to 11 was not made"
    )
    assert manager.run_plan(Plan(swapped_in={14: 2})) is None
    np.testing.assert_array_equal(
        held(pool, 14),
        eleventh,
        err_msg="block 14 must hold what block 11 held before the plan: swap out before copying",
    )


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(3, ["evaluate"]), (5, ["start with logits"])],
    ids=["no_row", "one_row"],
)
def test_task_16_without_logits_the_pool_is_evaluated_and_with_logits_it_is_only_started(
    monkeypatch: pytest.MonkeyPatch, stop: int, expected: list[str]
) -> None:
    """Oracle: the docstring: after the model comes `evaluate` without rows, and `start` with them.

    Common mistakes: waiting for the logits, and calling `start` without rows although the next step may write
    to the pool at once.
    """
    called: list[str] = []
    model = RecordingModel()
    manager = with_model(model=model)
    queued(manager, {"a": prompt(5, 13)})
    for name in ("evaluate", "start"):
        original = getattr(KVPool, name)

        def recording(
            pool: KVPool, *outputs: mx.array, name: str = name, original: Callable = original
        ) -> None:
            if model.fed:
                called.append(f"{name} with logits" if any(one.size for one in outputs) else name)
            original(pool, *outputs)

        monkeypatch.setattr(KVPool, name, recording)
    manager.run_plan(Plan([chunk(manager, "a", 0, stop)]))
    assert called == expected, "the methods of the pool that `run_plan` called after the model"


class OtherScale(RecordingModel):
    """A model whose configured attention scale is not head_dim ** -0.5."""

    @property
    def config(self) -> ModelConfig:
        """The tiny model's, with a `query_pre_attn_scalar` of 64: a scale of 1/8 for heads of size 8."""
        return replace(super().config, query_pre_attn_scalar=64.0)


def test_task_16_the_scale_comes_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: 64 ** -0.5. Common mistake: head_dim ** -0.5, which some models do not use."""
    seen: list[float] = []
    make_context = PageLayout.context

    def recording(
        layout: PageLayout, pool: KVPool, spans: Sequence, scale: float, rows: mx.array
    ) -> KVContext:
        seen.append(scale)
        return make_context(layout, pool, spans, scale, rows)

    monkeypatch.setattr(PageLayout, "context", recording)
    manager = with_model(model=OtherScale())
    queued(manager, {"a": prompt(3, 14)})
    manager.run_plan(Plan([chunk(manager, "a", 0, 3)]))
    assert seen == [pytest.approx(0.125)], "the scale that `run_plan` passed to `_layout.context`"


def test_task_16_the_layout_makes_the_context_from_all_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the docstring: two groups of layers have two tables.

    A context of only the first table is wrong if one of the groups has a window.
    """
    seen: list[list[int]] = []
    make_context = PageLayout.context

    def recording(
        layout: PageLayout, pool: KVPool, spans: Sequence, scale: float, rows: mx.array
    ) -> KVContext:
        seen.append([len(tables) for tables, _, _ in spans])
        assert rows.dtype == mx.int32
        return make_context(layout, pool, spans, scale, rows)

    monkeypatch.setattr(PageLayout, "context", recording)
    groups = (LayerGroup((0,)), LayerGroup((1,)))
    manager = PagedBatchManager(16, 4, 4, model=tiny_model(), kv_dtype=mx.float32, groups=groups)
    prompts = {"a": prompt(5, 11), "b": prompt(2, 12)}
    queued(manager, prompts)
    rows = manager.run_plan(Plan([chunk(manager, "a", 0, 5), chunk(manager, "b", 0, 2)]))
    assert rows is not None
    check_logits({"a": rows[0], "b": rows[1]}, prompts)
    assert seen == [[2, 2]]


def test_task_16_without_a_model_nothing_is_computed() -> None:
    """Oracle: the docstring."""
    manager = manager_of()
    queued(manager, {"a": [5, 6, 7]})
    assert manager.run_plan(Plan([chunk(manager, "a", 0, 3)])) is None


# Task 17: PagedBatchManager.process_batch


def test_task_17_a_prompt_is_ready_after_its_last_chunk() -> None:
    """Oracle: by hand: 6 tokens take 2 blocks of 4, and all of them are computed."""
    manager = manager_of()
    manager.add_request([5] * 6, "a", limits())
    ready = manager.process_batch()
    assert list(ready) == ["a"]
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.sequence("a").num_computed == 6
    assert manager.capacity.num_free == 6
    assert manager.prefix_stats.queries == 6, "`computed` of the scheduler was not called"
    check_pages(manager)


def test_task_17_a_step_fills_the_tables_of_all_groups() -> None:
    """Oracle: by hand: two groups of layers, so two tables; the pages of both are allocated and freed."""
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=(LayerGroup((0,)), LayerGroup((1,))))
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    assert list(manager.process_batch()) == ["a"]
    assert [table.num_tokens for table in manager.sequence("a").tables] == [5, 5]
    assert manager.capacity.num_free == 12
    check_pages(manager)
    manager.finish("a")
    assert manager.capacity.num_free == 16


class RecordingPrefixCache(NoPrefixSharing):
    """A prefix cache that records the calls of `keep`."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.seen: list[tuple[str, int, int]] = []

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Record the sequence, its computed tokens and its pending forks."""
        self.seen.append((sequence.seq_id, sequence.num_computed, sequence.num_forks))


def test_task_17_the_method_computed_is_called_before_completions_are_forked() -> None:
    """Oracle: the docstring: a leader with two pending forks is kept once, before they exist."""
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, policies=Policies(prefix=RecordingPrefixCache))
    manager.add_request([5] * 6, "a", limits(n=3))
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}
    assert isinstance(manager.prefix, RecordingPrefixCache)
    assert manager.prefix.seen == [("a/0", 6, 2)], (
        "each entry is a sequence, its computed tokens and its pending forks: call `computed` before "
        "`conclude`, which makes the forks"
    )


class FailingModel(RecordingModel):
    """A model whose pass fails."""

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """Raise."""
        raise RuntimeError("no memory on the device")


def test_task_17_the_method_computed_is_not_called_if_the_pass_fails() -> None:
    """Oracle: the docstring: the pass raises, so the plan's blocks hold no keys, and no cache may hold them.

    Common mistake: calling `computed` before the pass.
    """
    manager = with_model(model=FailingModel(), policies=Policies(prefix=RecordingPrefixCache))
    manager.add_request(prompt(6, 15), "a", limits())
    with pytest.raises(RuntimeError):
        manager.process_batch()
    assert isinstance(manager.prefix, RecordingPrefixCache)
    assert manager.prefix.seen == [], "`computed` was called before the model had computed the plan"


def test_task_17_the_last_plan_is_the_plan_of_the_step() -> None:
    """Oracle: by hand: `_schedule` stores it as `last_plan`. Common mistake: `_scheduler.plan()`."""
    manager, planned = manager_of(budget=4), []
    manager.add_request([5] * 6, "a", limits())
    for _ in range(2):
        manager.process_batch()
        planned.append([(one.sequence.seq_id, one.start, one.stop) for one in manager.last_plan.chunks])
    assert planned == [[("a", 0, 4)], [("a", 4, 6)]], "`last_plan` must be the plan that `_schedule` stores"


def test_task_17_a_step_without_chunks_still_swaps_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the content of block 11: one plan swaps it out, the next one swaps it into block 14."""
    manager = with_model(blocks=16, policies=Policies(swap_blocks=3))
    pool = filled_pool(manager)
    expected = held(pool, 11)
    for plan in (Plan(swapped_out=[(11, 0)]), Plan(swapped_in={14: 0})):
        monkeypatch.setattr(PageScheduler, "plan", lambda scheduler, plan=plan: plan)
        assert len(manager.process_batch()) == 0
    np.testing.assert_array_equal(
        held(pool, 14),
        expected,
        err_msg="block 14 must hold what block 11 held: swap blocks even without chunks",
    )


def parts_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that records the name of each part of a step when it is called."""
    called: list[str] = []
    parts = (
        (PagedBatchManager, "shrink_pool"),
        (PagedBatchManager, "_schedule"),
        (PagedBatchManager, "run_plan"),
        (PageScheduler, "computed"),
        (Plan, "conclude"),
    )
    for owner, name in parts:
        original = getattr(owner, name)

        def recording(*args: object, name: str = name, original: Callable = original) -> object:
            called.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, recording)
    return called


def test_task_17_each_part_of_a_step_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the docstring: five parts, in the order that their dependencies require."""
    manager, called = manager_of(), parts_called(monkeypatch)
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert called == ["shrink_pool", "_schedule", "run_plan", "computed", "conclude"]


def test_task_17_a_step_with_an_empty_plan_calls_neither_run_plan_nor_conclude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the docstring: there is nothing to run or to conclude; an idle step shrinks the pool too."""
    manager, called = manager_of(), parts_called(monkeypatch)
    ready = manager.process_batch()
    assert len(ready) == 0
    assert called == ["shrink_pool", "_schedule"], "the parts that a step calls for an empty plan"


def test_task_17_no_sequence_is_ready_without_tokens_to_compute() -> None:
    """Oracle: by hand: without a request, and with one whose token is not sampled yet."""
    manager = manager_of()
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == 3


def test_task_17_a_long_prompt_is_computed_in_chunks_and_allocates_pages_on_demand() -> None:
    """Oracle: by hand: 10 tokens at 4 per step, a block for each chunk.

    Nothing is ready before the last chunk.
    """
    manager, found = manager_of(budget=4), []
    manager.add_request([1] * 10, "a", limits())
    for _ in range(3):
        ready = list(manager.process_batch())
        found.append((ready, manager.sequence("a").num_computed, manager.capacity.num_free))
    assert found == [([], 4, 7), ([], 8, 6), (["a"], 10, 5)]


def test_task_17_a_long_prompt_does_not_delay_decodes() -> None:
    """Oracle: by hand: the decode gets one of the 4 tokens of a step, and the prompt gets 3."""
    manager, computed = manager_of(budget=4), []
    manager.add_request([5], "short", limits(8))
    manager.commit(dict.fromkeys(manager.process_batch(), 7))
    manager.add_request([1] * 10, "long", limits(2))
    for _ in range(4):
        ready = manager.process_batch()
        assert "short" in ready
        computed.append(manager.sequence("long").num_computed)
        manager.commit(dict.fromkeys(ready, 7))
    assert computed == [3, 6, 9, 10]
    check_pages(manager)


def test_task_17_completions_are_forked_when_their_prompt_is_complete() -> None:
    """Oracle: by hand: a prompt of 6 takes 2 blocks for all three; then each writes to its own copy."""
    manager = manager_of(budget=4)
    manager.add_request([1] * 6, "a", limits(n=3))
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a/0"]
    ready = manager.process_batch()
    assert set(ready) == {"a/0", "a/1", "a/2"} == set(ids(manager.running))
    assert manager.capacity.num_free == 6
    check_pages(manager)
    manager.commit(dict.fromkeys(ready, 7))
    manager.process_batch()
    assert manager.capacity.num_free == 8 - 1 - 3
    check_pages(manager)


def test_task_17_a_beam_search_starts_as_one_beam_and_advance_forks_the_others() -> None:
    """Oracle: by hand: its slots are reserved, and `advance` makes three beams of one."""
    manager = manager_of(max_seqs=4)
    manager.add_request([1] * 6, "a", limits(n=3), beam_search=True)
    manager.add_request([2], "b", limits(n=2))
    assert list(manager.process_batch()) == ["a/0"]
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0"], ["b/0"])
    manager.advance("a", [BeamStep("a/0", token) for token in (7, 8, 9)])
    check_pages(manager)
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}
    assert [manager.sequence(f"a/{i}").outputs for i in range(3)] == [[7], [8], [9]]
    assert manager.capacity.num_free == 8 - 1 - 3
    check_pages(manager)


def test_task_17_a_request_that_never_fits_the_free_pages_is_dropped_and_the_next_runs() -> None:
    """Oracle: the docstring: a table outside the manager holds 3 of 4 blocks."""
    manager = manager_of(blocks=4)
    outside = filled(manager.allocator, 12)
    manager.add_request([1] * 8, "big", limits())
    with pytest.raises(OutOfBlocksError):
        manager.process_batch()
    assert not manager.has_work
    manager.add_request([1], "small", limits(2))
    assert list(manager.process_batch()) == ["small"]
    check_conserved(manager.allocator, outside, manager.sequence("small").table)


@pytest.mark.parametrize("budget", [3, 8, 512])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_task_17_logits_do_not_depend_on_the_batch_or_the_chunks(budget: int, block_size: int) -> None:
    """Oracle: the model without cache and batch. The prompts are packed, complete or in chunks."""
    prompts = {"a": prompt(7, 1), "b": prompt(1, 2), "c": prompt(12, 3)}
    manager, found = with_model(block_size=block_size, max_seqs=3, budget=budget), []
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    for _ in range(10):
        ready = manager.process_batch()
        check_logits(ready, prompts)
        found += list(ready)
    assert sorted(found) == ["a", "b", "c"]


def test_task_17_a_step_is_one_pass_and_computes_only_the_requested_logits() -> None:
    """Oracle: by hand: the first pass has 4 + 4 tokens, the next one 2, and an empty step has no pass."""
    model = RecordingModel()
    manager = with_model(model=model, budget=8)
    manager.add_request(prompt(4, 6), "a", limits())
    manager.add_request(prompt(6, 7), "b", limits())
    for _ in range(3):
        manager.process_batch()
    assert (model.fed, model.num_rows) == ([8, 2], [1, 1])


def test_task_17_the_next_step_computes_the_committed_token() -> None:
    """Oracle: the model without cache and batch, on prompt and outputs."""
    manager, tokens = with_model(), prompt(5, 8)
    manager.add_request(tokens, "a", limits())
    for token in (11, 3, 42):
        check_logits(manager.process_batch(), {"a": tokens})
        manager.commit({"a": token})
        tokens = [*tokens, token]


@pytest.mark.parametrize("length", [6, 8, 9])
def test_task_17_completions_of_one_prompt_can_diverge(length: int) -> None:
    """Oracle: the model without cache and batch, on the tokens of each completion; blocks of 4.

    Common mistake: making the copies after the step's writes, or not at all.
    """
    manager, tokens = with_model(), prompt(length, 9)
    known = {f"a/{i}": list(tokens) for i in range(3)}
    manager.add_request(tokens, "a", limits(8, n=3))
    for step in range(6):
        ready = manager.process_batch()
        assert set(ready) == set(known)
        check_logits(ready, known)
        for i, mine in enumerate(known.values()):
            mine.append(8 * step + 3 * i)
        manager.commit({name: mine[-1] for name, mine in known.items()})
        check_pages(manager)


def test_task_17_beams_can_diverge() -> None:
    """Oracle: the model without cache and batch, on the tokens of each beam. Some beams have two children."""
    manager, tokens = with_model(), prompt(6, 10)
    manager.add_request(tokens, "a", limits(8, n=3), beam_search=True)
    known = {"a/0": tokens}
    for steps in ([(0, 1), (0, 2), (0, 3)], [(2, 4), (2, 5), (0, 6)], [(1, 7), (1, 8)], [(0, 9), (1, 10)]):
        ready = manager.process_batch()
        assert set(ready) == set(known)
        check_logits(ready, known)
        manager.advance("a", [BeamStep(f"a/{parent}", token) for parent, token in steps])
        known = {f"a/{i}": [*known[f"a/{parent}"], token] for i, (parent, token) in enumerate(steps)}
        check_pages(manager)
    check_logits(manager.process_batch(), known)


def test_task_17_a_pool_grows_with_its_sequences() -> None:
    """Oracle: the model without cache and batch: growing the pool keeps its contents."""
    manager, known = with_model(min_pages=1), {"a": prompt(6, 11), "b": prompt(3, 12)}
    assert manager.pool is not None
    one_block, sizes = manager.capacity.nbytes, []
    for name, tokens in known.items():
        manager.add_request(list(tokens), name, limits(30))
    for step in range(20):
        ready = manager.process_batch()
        assert len(ready) == 2
        check_logits(ready, known)
        sizes.append(manager.allocator.num_blocks)
        assert manager.pool.num_blocks == sizes[-1]
        assert manager.capacity.nbytes == sizes[-1] * one_block
        for tokens in known.values():
            tokens.append(step)
        manager.commit({name: tokens[-1] for name, tokens in known.items()})
    assert sizes[0] < sizes[-1]


def test_task_17_finishing_a_sequence_frees_its_pages() -> None:
    """Oracle: by hand: 2 blocks and 1. Dropping a sequence without releasing it leaks its pages."""
    manager = manager_of()
    manager.add_request([5] * 6, "a", limits())
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.finish("a")
    assert ids(manager.running) == ["b"]
    assert manager.capacity.num_free == 7
    check_pages(manager)
    assert manager.has_work
    manager.finish("b")
    assert manager.capacity.num_free == 8
    assert not manager.has_work


def test_task_17_finishing_a_finished_sequence_raises_key_error() -> None:
    """Oracle: the docstring: nothing is freed a second time."""
    manager = manager_of()
    manager.add_request([5, 6], "a", limits())
    manager.add_request([5, 6], "b", limits())
    manager.process_batch()
    manager.finish("a")
    for name in ("a", "unknown"):
        with pytest.raises(KeyError):
            manager.finish(name)
    assert manager.capacity.num_free == 7
    check_pages(manager)


def test_task_17_a_sequence_can_finish_while_waiting_or_during_its_prefill() -> None:
    """Oracle: by hand."""
    manager = manager_of(max_seqs=1, budget=4)
    manager.add_request([1] * 10, "a", limits())
    manager.add_request([2], "b", limits())
    manager.process_batch()
    manager.finish("b")
    assert (ids(manager.running), ids(manager.waiting), manager.capacity.num_free) == (["a"], [], 7)
    manager.finish("a")
    assert manager.capacity.num_free == 8
    assert len(manager.process_batch()) == 0


def test_task_17_finishing_completions_one_by_one_keeps_their_shared_blocks() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4, then one token each: 1 shared block and 3 others."""
    manager, free = manager_of(), []
    manager.add_request([5] * 6, "a", limits(n=3))
    for _ in range(2):
        manager.commit(dict.fromkeys(manager.process_batch(), 7))
    for name in ("a/1", "a/0", "a/2"):
        manager.finish(name)
        free.append(manager.capacity.num_free)
        check_pages(manager)
    assert free == [5, 6, 8]


def test_task_17_the_next_request_starts_on_the_freed_pages() -> None:
    """Oracle: by hand: 20 tokens take 5 of 6 blocks, so requests run one at a time, in order of arrival."""
    manager, order = manager_of(blocks=6), []
    for name in ("c", "a", "b"):
        manager.add_request([1] * 18, name, limits(2))
    while manager.has_work:
        assert len(order) < 9, "the requests do not finish"
        order += (ready := list(manager.process_batch()))
        for name in ready:
            manager.finish(name)
    assert order == ["c", "a", "b"]


def test_task_17_cancelling_a_beam_search_frees_all_its_pages() -> None:
    """Oracle: by hand: `cancel` finishes every sequence of a request."""
    manager = manager_of()
    manager.add_request([1] * 6, "a", limits(n=3), beam_search=True)
    manager.process_batch()
    manager.advance("a", [BeamStep("a/0", 7), BeamStep("a/0", 8)])
    manager.process_batch()
    manager.cancel("a")
    assert manager.capacity.num_free == 8
    assert not manager.has_work
    assert manager.add_request([5], "a", limits())


def test_task_17_a_pool_that_has_grown_shrinks_again() -> None:
    """Oracle: by hand, and the model without cache: blocks at the end move to the front.

    Two requests need many blocks and one of them finishes: the pool shrinks while the other continues.
    """
    manager, known = with_model(min_pages=2), {"a": prompt(40, 13), "b": prompt(5, 14)}
    for name, tokens in known.items():
        manager.add_request(list(tokens), name, limits(12))
    sizes = []
    for step in range(8):
        ready = manager.process_batch()
        check_logits(ready, known)
        check_pages(manager)
        sizes.append(manager.allocator.num_blocks)
        for name in ready:
            known[name].append(step)
        manager.commit({name: known[name][-1] for name in ready})
        if step == 2:
            manager.finish("a")
    assert max(sizes) >= 13, "the pool must grow"
    assert sizes[-1] <= 8, "the pool must shrink: each step shrinks it before planning"
    assert manager.pool is not None
    assert manager.pool.num_blocks == sizes[-1]
    assert manager.capacity.num_free == 64 - 3
