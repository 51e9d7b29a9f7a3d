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
from common.paged_managers import WatchedModel, check_logits, check_pages, manager_of, with_model
from common.plain_pool import check_conserved
from common.toy_models import tiny_model
from common.toy_requests import ids, limits, prompt
from tiny_llm_checkpoints.model_config import ModelConfig

# Task 16: PagedBatchManager.run_plan


def chunk(manager: PagedBatchManager, seq_id: str, start: int, stop: int) -> Scheduled[PagedSequence]:
    """The positions start .. stop - 1 of a sequence, as a plan has them: there are pages for them."""
    sequence = manager.sequence(seq_id)
    return Scheduled(sequence, start, stop, sequence.append_tokens(stop - start))


def queued(manager: PagedBatchManager, prompts: Mapping[str, list[int]]) -> None:
    """Add requests that a test schedules by hand."""
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())


def test_task_16_a_plans_chunks_are_one_pass_with_a_row_for_each_that_is_ready() -> None:
    """Oracle: the model without cache and batch; by hand: 7 + 3 + 12 tokens, of which two need logits."""
    prompts, model = {"a": prompt(7, 1), "b": prompt(5, 2), "c": prompt(12, 3)}, WatchedModel()
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
def test_task_16_chunks_without_logits_are_computed_all_the_same(block_size: int) -> None:
    """Oracle: the model without cache and batch: three chunks of two prompts; the first two bring no row."""
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
    """Oracle: the model without cache and batch: two forks of 6 tokens in blocks of 4, which part."""
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


def test_task_16_the_pool_gets_the_allocators_size_first() -> None:
    """Oracle: by hand, and the model without cache: the pool has no blocks yet for the second sequence."""
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


def test_task_16_every_position_that_is_asked_for_has_a_row() -> None:
    """Oracle: the model without cache and batch: a prompt's log-probabilities need all rows."""
    manager, tokens = with_model(), prompt(5, 9)
    manager.add_request(tokens, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    rows = manager.run_plan(Plan([chunk(manager, "a", 0, 5)]))
    assert rows is not None
    known = {str(i): tokens[: i + 1] for i in range(5)}
    check_logits(dict(zip(known, rows, strict=True)), known)


def filled_pool(manager: PagedBatchManager) -> KVPool:
    """A manager's pool with random keys and values in the blocks 10 and 11, which no sequence has."""
    pool, filling = manager.pool, mx.random.normal((2, 8, 2, 8), key=mx.random.key(1))
    assert pool is not None
    for layer in range(2):
        pool.write(layer, mx.arange(40, 48), filling[layer], -filling[layer])
    return pool


def held(pool: KVPool, block: int) -> np.ndarray:
    """The keys and values of one block in both layers."""
    return np.stack([np.array(mx.stack(pool.read_blocks(layer, [block]))) for layer in range(2)])


def test_task_16_blocks_go_to_the_host_and_come_back_before_anything_else() -> None:
    """Oracle: what was in the blocks. A plan may have no chunk; a copy may go to a block that goes out.

    Copying first is the mistake: the host gets what came into the block by the copy.
    """
    manager = with_model(blocks=16, policies=Policies(swap_blocks=3))
    pool, tokens = filled_pool(manager), prompt(3, 10)
    tenth, eleventh = held(pool, 10), held(pool, 11)
    queued(manager, {"a": tokens})
    copied = chunk(manager, "a", 0, 3)._replace(copies=[BlockCopy(10, 11, 4)])
    rows = manager.run_plan(Plan([copied], swapped_out=[(11, 2)]))
    assert rows is not None
    check_logits({"a": rows[0]}, {"a": tokens})
    np.testing.assert_array_equal(held(pool, 11), tenth, err_msg="the plan's copy from 10 to 11 was not made")
    assert manager.run_plan(Plan(swapped_in={14: 2})) is None
    np.testing.assert_array_equal(
        held(pool, 14),
        eleventh,
        err_msg="block 14 is not what block 11 held before the plan: swapping out comes before the copies",
    )


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(3, ["evaluate"]), (5, ["start with logits"])],
    ids=["no_row", "one_row"],
)
def test_task_16_nothing_stays_a_description(
    monkeypatch: pytest.MonkeyPatch, stop: int, expected: list[str]
) -> None:
    """Oracle: the docstring: after the model comes `evaluate` without rows, and `start` with them.

    Waiting for the logits is one mistake, and `start` without rows the other: the next step may write to the
    pool at once.
    """
    called: list[str] = []
    model = WatchedModel()
    manager = with_model(model=model)
    queued(manager, {"a": prompt(5, 13)})
    for name in ("evaluate", "start"):
        own = getattr(KVPool, name)

        def watched(pool: KVPool, *outputs: mx.array, name: str = name, own: Callable = own) -> None:
            if model.fed:
                called.append(f"{name} with logits" if any(one.size for one in outputs) else name)
            own(pool, *outputs)

        monkeypatch.setattr(KVPool, name, watched)
    manager.run_plan(Plan([chunk(manager, "a", 0, stop)]))
    assert called == expected, "what `run_plan` asked of the pool after the model"


class OtherScale(WatchedModel):
    """A model whose configuration asks for another scale than that of its head size."""

    @property
    def config(self) -> ModelConfig:
        """The tiny model's with a `query_pre_attn_scalar` of 64: a scale of 1/8, for heads of size 8."""
        return replace(super().config, query_pre_attn_scalar=64.0)


def test_task_16_the_scale_is_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: 64 ** -0.5. One over the root of the head size is the mistake: some models differ."""
    seen: list[float] = []
    make_context = PageLayout.context

    def watched(layout: PageLayout, pool: KVPool, spans: Sequence, scale: float, rows: mx.array) -> KVContext:
        seen.append(scale)
        return make_context(layout, pool, spans, scale, rows)

    monkeypatch.setattr(PageLayout, "context", watched)
    manager = with_model(model=OtherScale())
    queued(manager, {"a": prompt(3, 14)})
    manager.run_plan(Plan([chunk(manager, "a", 0, 3)]))
    assert seen == [pytest.approx(0.125)], "the scale that `_layout.context` was given"


def test_task_16_the_layout_makes_the_context_of_all_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the docstring: two groups of layers have two tables; a context of the first only would be wrong
    as soon as one of them has a window.
    """
    seen: list[list[int]] = []
    make_context = PageLayout.context

    def watched(layout: PageLayout, pool: KVPool, spans: Sequence, scale: float, rows: mx.array) -> KVContext:
        seen.append([len(tables) for tables, _, _ in spans])
        assert rows.dtype == mx.int32
        return make_context(layout, pool, spans, scale, rows)

    monkeypatch.setattr(PageLayout, "context", watched)
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


def test_task_17_a_prompt_is_computed_and_is_ready() -> None:
    """Oracle: by hand: 6 tokens take 2 blocks of 4, and all of them are computed."""
    manager = manager_of()
    manager.add_request([5] * 6, "a", limits())
    ready = manager.process_batch()
    assert list(ready) == ["a"]
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.sequence("a").num_computed == 6
    assert manager.capacity.num_free == 6
    assert manager.prefix_stats.queries == 6, "the scheduler was not told what was computed"
    check_pages(manager)


def test_task_17_a_step_fills_the_tables_of_all_groups() -> None:
    """Oracle: by hand: two groups of layers, so two tables; the pages of both are taken, and freed."""
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, groups=(LayerGroup((0,)), LayerGroup((1,))))
    manager.add_request([5, 6, 7, 8, 9], "a", limits())
    assert list(manager.process_batch()) == ["a"]
    assert [table.num_tokens for table in manager.sequence("a").tables] == [5, 5]
    assert manager.capacity.num_free == 12
    check_pages(manager)
    manager.finish("a")
    assert manager.capacity.num_free == 16


class ToldInOrder(NoPrefixSharing):
    """A prefix cache that notes what was computed when it was asked to keep something."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.seen: list[tuple[str, int, int]] = []

    def keep(self, sequence: PagedSequence, start: int) -> None:
        """Note it: the sequence, its computed tokens, and its completions to come."""
        self.seen.append((sequence.seq_id, sequence.num_computed, sequence.num_forks))


def test_task_17_the_scheduler_knows_before_completions_are_made() -> None:
    """Oracle: the docstring: a leader with two completions to come is kept once, before it has any."""
    manager = PagedBatchManager(16, 4, 4, max_model_len=32, policies=Policies(prefix=ToldInOrder))
    manager.add_request([5] * 6, "a", limits(n=3))
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}
    assert isinstance(manager.prefix, ToldInOrder)
    assert manager.prefix.seen == [("a/0", 6, 2)], (
        "each is a sequence, its computed tokens, and its completions to come: `conclude` makes these, and "
        "must come after `computed`"
    )


class FailingModel(WatchedModel):
    """A model that raises in its pass."""

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """Raise."""
        raise RuntimeError("no memory on the device")


def test_task_17_what_was_not_computed_is_not_shared() -> None:
    """Oracle: the docstring: the pass raises, so the plan's blocks hold no keys, and no cache may have them.

    Telling the scheduler before the pass is the mistake.
    """
    manager = with_model(model=FailingModel(), policies=Policies(prefix=ToldInOrder))
    manager.add_request(prompt(6, 15), "a", limits())
    with pytest.raises(RuntimeError):
        manager.process_batch()
    assert isinstance(manager.prefix, ToldInOrder)
    assert manager.prefix.seen == [], "`computed` was called before the model had computed the plan"


def test_task_17_the_plan_of_the_step_can_be_looked_at() -> None:
    """Oracle: by hand: `_schedule` keeps it as `last_plan`. `_scheduler.plan()` is the mistake."""
    manager, planned = manager_of(budget=4), []
    manager.add_request([5] * 6, "a", limits())
    for _ in range(2):
        manager.process_batch()
        planned.append([(one.sequence.seq_id, one.start, one.stop) for one in manager.last_plan.chunks])
    assert planned == [[("a", 0, 4)], [("a", 4, 6)]], "`last_plan` is what `_schedule` keeps"


def test_task_17_a_step_may_have_blocks_to_exchange_and_nothing_to_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: what was in block 11: a plan puts it on the host, the next one into block 14."""
    manager = with_model(blocks=16, policies=Policies(swap_blocks=3))
    pool = filled_pool(manager)
    expected = held(pool, 11)
    for plan in (Plan(swapped_out=[(11, 0)]), Plan(swapped_in={14: 0})):
        monkeypatch.setattr(PageScheduler, "plan", lambda scheduler, plan=plan: plan)
        assert len(manager.process_batch()) == 0
    np.testing.assert_array_equal(
        held(pool, 14),
        expected,
        err_msg="block 14 is not what block 11 held: blocks are exchanged without chunks too",
    )


def parts_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each part of a step when it is called."""
    called: list[str] = []
    parts = (
        (PagedBatchManager, "shrink_pool"),
        (PagedBatchManager, "_schedule"),
        (PagedBatchManager, "run_plan"),
        (PageScheduler, "computed"),
        (Plan, "conclude"),
    )
    for owner, name in parts:
        own = getattr(owner, name)

        def watched(*args: object, name: str = name, own: Callable = own) -> object:
            called.append(name)
            return own(*args)

        monkeypatch.setattr(owner, name, watched)
    return called


def test_task_17_each_part_of_a_step_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the docstring: five parts, in the order that their needs tell."""
    manager, called = manager_of(), parts_called(monkeypatch)
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert called == ["shrink_pool", "_schedule", "run_plan", "computed", "conclude"]


def test_task_17_a_step_with_an_empty_plan_is_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the docstring: there is nothing to run or to conclude; an idle step gives memory back too."""
    manager, called = manager_of(), parts_called(monkeypatch)
    ready = manager.process_batch()
    assert len(ready) == 0
    assert called == ["shrink_pool", "_schedule"], "what a step called for a plan that `is_empty`"


def test_task_17_without_work_no_sequence_is_ready() -> None:
    """Oracle: by hand: without a request, and with one whose token is not chosen yet."""
    manager = manager_of()
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == 3


def test_task_17_a_long_prompt_is_computed_in_chunks_with_pages_as_they_are_needed() -> None:
    """Oracle: by hand: 10 tokens at 4 a step, a block for each chunk; none is ready before the last."""
    manager, found = manager_of(budget=4), []
    manager.add_request([1] * 10, "a", limits())
    for _ in range(3):
        ready = list(manager.process_batch())
        found.append((ready, manager.sequence("a").num_computed, manager.capacity.num_free))
    assert found == [([], 4, 7), ([], 8, 6), (["a"], 10, 5)]


def test_task_17_decodes_go_on_beside_a_long_prompt() -> None:
    """Oracle: by hand: of 4 tokens a step one is the decode's, and 3 are the prompt's."""
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


def test_task_17_completions_are_forked_when_their_prompt_is_computed() -> None:
    """Oracle: by hand: a prompt of 6 takes 2 blocks for all three; then each writes to its own."""
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


def test_task_17_a_search_begins_as_one_beam_and_goes_on_as_it_is_told() -> None:
    """Oracle: by hand: its places are kept, and `advance` makes three beams of one."""
    manager = manager_of(seats=4)
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


def test_task_17_a_request_that_finds_too_few_pages_is_dropped_and_the_next_runs() -> None:
    """Oracle: the docstring: a table outside holds 3 of 4 blocks."""
    manager = manager_of(blocks=4)
    elsewhere = filled(manager.allocator, 12)
    manager.add_request([1] * 8, "big", limits())
    with pytest.raises(OutOfBlocksError):
        manager.process_batch()
    assert not manager.has_work
    manager.add_request([1], "small", limits(2))
    assert list(manager.process_batch()) == ["small"]
    check_conserved(manager.allocator, elsewhere, manager.sequence("small").table)


@pytest.mark.parametrize("budget", [3, 8, 512])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_task_17_logits_are_those_of_each_sequence_alone(budget: int, block_size: int) -> None:
    """Oracle: the model without cache and batch. The prompts are packed, whole or in chunks."""
    prompts = {"a": prompt(7, 1), "b": prompt(1, 2), "c": prompt(12, 3)}
    manager, found = with_model(block_size=block_size, seats=3, budget=budget), []
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    for _ in range(10):
        ready = manager.process_batch()
        check_logits(ready, prompts)
        found += list(ready)
    assert sorted(found) == ["a", "b", "c"]


def test_task_17_a_step_is_one_pass_and_only_rows_that_matter_become_logits() -> None:
    """Oracle: by hand: 8 tokens are 4 and 4 of 6, the next step brings 2; for nothing there is no pass."""
    model = WatchedModel()
    manager = with_model(model=model, budget=8)
    manager.add_request(prompt(4, 6), "a", limits())
    manager.add_request(prompt(6, 7), "b", limits())
    for _ in range(3):
        manager.process_batch()
    assert (model.fed, model.num_rows) == ([8, 2], [1, 1])


def test_task_17_the_next_step_continues_with_the_token() -> None:
    """Oracle: the model without cache and batch, on prompt and outputs."""
    manager, tokens = with_model(), prompt(5, 8)
    manager.add_request(tokens, "a", limits())
    for token in (11, 3, 42):
        check_logits(manager.process_batch(), {"a": tokens})
        manager.commit({"a": token})
        tokens = [*tokens, token]


@pytest.mark.parametrize("length", [6, 8, 9])
def test_task_17_completions_go_different_ways(length: int) -> None:
    """Oracle: the model without cache and batch, on each one's own tokens; blocks of 4.

    Copies that are not made before the step writes, or not at all, are the mistake.
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


def test_task_17_beams_go_different_ways() -> None:
    """Oracle: the model without cache and batch, on each beam's own tokens. Some have two children."""
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
    """Oracle: the model without cache and batch: what is in the pool stays in it when it gets larger."""
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


def test_task_17_a_sequence_ends_and_its_pages_are_free() -> None:
    """Oracle: by hand: 2 blocks and 1. A sequence that is only forgotten keeps its pages for ever."""
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


def test_task_17_an_ended_sequence_is_unknown() -> None:
    """Oracle: the docstring: nothing is given back a second time."""
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


def test_task_17_a_sequence_may_end_while_it_waits_or_its_prompt_is_computed() -> None:
    """Oracle: by hand."""
    manager = manager_of(seats=1, budget=4)
    manager.add_request([1] * 10, "a", limits())
    manager.add_request([2], "b", limits())
    manager.process_batch()
    manager.finish("b")
    assert (ids(manager.running), ids(manager.waiting), manager.capacity.num_free) == (["a"], [], 7)
    manager.finish("a")
    assert manager.capacity.num_free == 8
    assert len(manager.process_batch()) == 0


def test_task_17_completions_end_one_by_one_and_keep_what_they_share() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4, then one token each: 1 shared block and 3 of their own."""
    manager, free = manager_of(), []
    manager.add_request([5] * 6, "a", limits(n=3))
    for _ in range(2):
        manager.commit(dict.fromkeys(manager.process_batch(), 7))
    for name in ("a/1", "a/0", "a/2"):
        manager.finish(name)
        free.append(manager.capacity.num_free)
        check_pages(manager)
    assert free == [5, 6, 8]


def test_task_17_the_next_one_starts_on_the_pages_of_the_last_one() -> None:
    """Oracle: by hand: 20 tokens are 5 of 6 blocks: one at a time, first come, first served."""
    manager, order = manager_of(blocks=6), []
    for name in ("c", "a", "b"):
        manager.add_request([1] * 18, name, limits(2))
    while manager.has_work:
        assert len(order) < 9, "it never ends"
        order += (ready := list(manager.process_batch()))
        for name in ready:
            manager.finish(name)
    assert order == ["c", "a", "b"]


def test_task_17_a_cancelled_search_gives_everything_back() -> None:
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


def test_task_17_a_pool_that_has_grown_gives_memory_back() -> None:
    """Oracle: by hand, and the model without cache: blocks far behind move to the front.

    Two ask for many blocks and one of them ends: the pool shrinks while the other goes on.
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
    assert max(sizes) >= 13, "the pool did not grow"
    assert sizes[-1] <= 8, "the pool did not shrink: each step gives memory back before it plans"
    assert manager.pool is not None
    assert manager.pool.num_blocks == sizes[-1]
    assert manager.capacity.num_free == 64 - 3
