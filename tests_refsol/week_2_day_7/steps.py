"""Day 2.7, tasks 4 and 5: one packed forward pass, and one step of all running sequences."""

from dataclasses import replace
from io import StringIO
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.batch_manager import MAX_PROMPT_ROWS
from tiny_llm.chunked_prefill import plan_chunks
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.naive_cache import NaiveKVCache
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.step import Plan

from common.toy_models import CountingModel, logits_after, tiny_model
from common.toy_requests import ids, limits, prompt

# Task 4: DenseBatchManager.compute


def with_model(slots: int, budget: int = 512) -> DenseBatchManager:
    """A manager with a model; keys and values are float32, so storing them does not round."""
    return DenseBatchManager(slots, 64, model=tiny_model(), max_batched_tokens=budget, kv_dtype=mx.float32)


def started(manager: DenseBatchManager, **prompts: list[int]) -> DenseBatchManager:
    """The manager after it admitted these requests; nothing is computed yet."""
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    manager.admit()
    return manager


def planned(manager: DenseBatchManager, budget: int = 512) -> Plan[Any]:
    """The plan of the next step of all running sequences."""
    return plan_chunks(manager.running, budget)


def expect_logits(row: mx.array, tokens: list[int]) -> None:
    """Assert that the row matches the model's logits after these tokens, without cache and batch."""
    np.testing.assert_allclose(np.array(row), logits_after(tiny_model(), tokens), rtol=1e-3, atol=1e-3)


def num_operators(array: mx.array) -> int:
    """The number of operators that MLX still has to run for an array; 0 if it is evaluated."""
    graph = StringIO()
    mx.export_to_dot(graph, array)
    return graph.getvalue().count("label")


def test_task_4_each_prompt_gets_its_row_of_logits() -> None:
    """Oracle: the model without cache and batch. The three prompts are packed, in the order of the plan."""
    prompts = {"a": prompt(7, 1), "b": prompt(1, 2), "c": prompt(12, 3)}
    manager = started(with_model(3), **prompts)
    logits = manager.compute(planned(manager))
    assert logits is not None
    assert logits.shape == (3, 50)
    for row, tokens in zip(logits, prompts.values(), strict=True):
        expect_logits(row, tokens)


def test_task_4_a_chunk_that_is_not_the_last_needs_no_logits() -> None:
    """Oracle: the model without cache and batch: "a" is complete, of "b" only 4 of 9 tokens are computed."""
    first, second = prompt(6, 4), prompt(9, 5)
    manager = started(with_model(2), a=first, b=second)
    logits = manager.compute(planned(manager, budget=10))
    assert logits is not None
    assert logits.shape == (1, 50)
    expect_logits(logits[0], first)


def test_task_4_the_next_chunk_attends_to_the_tokens_in_the_slot() -> None:
    """Oracle: the model without cache and batch, on the whole prompt; positions continue across chunks."""
    tokens = prompt(10, 6)
    manager = started(with_model(1), a=tokens)
    for start in (0, 4, 8):
        manager.sequence("a").num_computed = start
        logits = manager.compute(planned(manager, budget=4))
        assert (logits is None) == (start < 8), "logits must be None before the prompt is complete"
    assert logits is not None
    expect_logits(logits[0], tokens)


def test_task_4_a_decode_and_a_prompt_share_a_pass() -> None:
    """Oracle: the model without cache and batch, on prompt and output, and on the other prompt."""
    manager, tokens, other = with_model(2), prompt(5, 7), prompt(4, 8)
    started(manager, a=tokens)
    manager.compute(planned(manager))
    manager.sequence("a").num_computed = 5
    manager.commit({"a": 11})
    started(manager, b=other)
    logits = manager.compute(planned(manager))
    assert logits is not None
    for row, known in zip(logits, ([*tokens, 11], other), strict=True):
        expect_logits(row, known)


def test_task_4_with_prompt_logprobs_every_prompt_token_gets_a_row_of_logits() -> None:
    """Oracle: the model without cache and batch, on each prefix of the prompt.

    With prompt log-probabilities the plan requests a row of logits for every prompt token.
    """
    manager, tokens = with_model(1), prompt(4, 9)
    manager.add_request(tokens, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    manager.admit()
    logits = manager.compute(planned(manager))
    assert logits is not None
    want = [logits_after(tiny_model(), tokens[: i + 1]) for i in range(4)]
    np.testing.assert_allclose(np.array(logits), want, rtol=1e-3, atol=1e-3)


def test_task_4_a_plan_is_computed_in_one_pass() -> None:
    """Oracle: by hand: 5 and 3 tokens make one pass of 8."""
    model = CountingModel(tiny_model())
    manager = started(DenseBatchManager(2, 64, model=model), a=prompt(5, 10), b=prompt(3, 11))
    manager.compute(planned(manager))
    assert model.fed == [8]


def test_task_4_without_a_model_nothing_is_computed() -> None:
    """Oracle: the docstring: the plan has a chunk, but there are no caches."""
    manager = started(DenseBatchManager(1, 64), a=prompt(5, 12))
    assert manager.compute(planned(manager)) is None


class RecordingModel:
    """A model that records the logits it returned. query_pre_attn_scalar: of its config."""

    def __init__(self, query_pre_attn_scalar: float | None = None) -> None:
        self.config = replace(tiny_model().config, query_pre_attn_scalar=query_pre_attn_scalar)
        self.logits: list[mx.array] = []

    def __call__(self, tokens: mx.array, context: Any) -> mx.array:
        self.logits.append(tiny_model()(tokens, context))
        return self.logits[-1]


def test_task_4_requested_logits_are_evaluated_before_compute_returns() -> None:
    """Oracle: MLX's own graph of the result.

    A lazy result would be computed by the first line that reads it.
    """
    manager = started(with_model(1), a=prompt(5, 13))
    logits = manager.compute(planned(manager))
    assert logits is not None
    waiting = num_operators(logits)  # a view of computed logits has fewer than 5
    assert waiting < 5, f"call mx.eval on the logits: MLX still has {waiting} operators to run for them"


def test_task_4_logits_that_are_not_requested_are_never_evaluated() -> None:
    """Oracle: MLX's own graph of what the model returned. Common mistake: always evaluating all logits."""
    model = RecordingModel()
    manager = DenseBatchManager(1, 64, model=model, kv_dtype=mx.float32)
    started(manager, a=prompt(9, 14))
    assert manager.compute(planned(manager, budget=4)) is None
    assert len(model.logits) == 1
    waiting = num_operators(model.logits[0])
    assert waiting > 0, "no row is needed: do not call mx.eval on the model's result"


def test_task_4_keys_and_values_are_evaluated_before_compute_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: MLX's own graph of each cache, after each chunk of a prompt.

    If caches are not evaluated, all chunks of a prompt are computed only when its last row is read.
    """
    caches: list[NaiveKVCache] = []

    class RecordedCache(NaiveKVCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr("tiny_llm.dense_batch.NaiveKVCache", RecordedCache)
    manager = started(with_model(1), a=prompt(12, 15))
    assert len(caches) == 2, "one for each layer of the model"
    for start in (0, 4, 8):
        manager.sequence("a").num_computed = start
        manager.compute(planned(manager, budget=4))
        for name in ("k_cache", "v_cache"):
            waiting = max(num_operators(getattr(cache, name)) for cache in caches)
            assert waiting < 5, (  # a view of a computed array has fewer
                f"call mx.eval on the {name} of all caches: after the chunk of positions {start} to "
                f"{start + 3}, MLX still has {waiting} operators to run for one of them"
            )


def test_task_4_only_the_rows_that_are_needed_get_logits() -> None:
    """Oracle: by hand: 5 and 3 tokens are complete prompts, so the model returns 2 rows of logits.

    Common mistake: selecting rows after the last matrix, which is computed for all 8 tokens.
    """
    model = RecordingModel()
    manager = DenseBatchManager(2, 64, model=model, kv_dtype=mx.float32)
    started(manager, a=prompt(5, 16), b=prompt(3, 17))
    manager.compute(planned(manager))
    assert len(model.logits) == 1
    rows = model.logits[0].shape[1]
    assert rows == 2, f"give the context the rows that need logits: 2 of 8, but the model computed {rows}"


def test_task_4_the_scale_is_that_of_the_models_config() -> None:
    """Oracle: the model without cache and batch, with the same scale.

    Common mistake: computing it from the head size. Some models have another one (`query_pre_attn_scalar`).
    """
    model = RecordingModel(query_pre_attn_scalar=2.0)
    assert model.config.attention_scale != model.config.head_dim**-0.5
    manager, tokens = DenseBatchManager(1, 64, model=model, kv_dtype=mx.float32), prompt(7, 18)
    logits = started(manager, a=tokens).compute(planned(manager))
    assert logits is not None
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    want = tiny_model()(mx.array([tokens], mx.int32), context)[0, -1:]
    np.testing.assert_allclose(np.array(logits), np.array(want), rtol=1e-3, atol=1e-3)


# Task 5: DenseBatchManager.process_batch


def test_task_5_a_prompt_is_ready_after_its_last_chunk() -> None:
    """Oracle: by hand: it has a slot, and its 3 tokens are computed."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits())
    ready = manager.process_batch()
    assert list(ready) == ["a"]
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.capacity.num_free == 1
    assert manager.sequence("a").num_computed == 3


def test_task_5_no_sequence_is_ready_without_tokens_to_compute() -> None:
    """Oracle: by hand: without a request, and with one whose token is not sampled yet."""
    manager = DenseBatchManager(2, 16)
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == 3


class NoEmptyPass(CountingModel):
    """A model that fails a test if it is called without tokens."""

    def __call__(self, tokens: mx.array, context: Any) -> mx.array:
        """Return the wrapped model's logits."""
        if tokens.size == 0:
            pytest.fail("the plan has no chunks: return StepLogits(None, {}) without a call of compute")
        return super().__call__(tokens, context)


def test_task_5_a_plan_without_chunks_is_not_computed() -> None:
    """Oracle: by hand: no request; then one that runs, but whose next token is not sampled yet."""
    model = NoEmptyPass(tiny_model())
    manager = DenseBatchManager(2, 64, model=model)
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    assert list(manager.process_batch()) == ["a"]
    assert len(manager.process_batch()) == 0
    assert model.fed == [3]


def test_task_5_a_long_prompt_is_computed_in_chunks() -> None:
    """Oracle: by hand: 10 tokens at 4 per step; nothing is ready before the last chunk."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    found = [(list(manager.process_batch()), manager.sequence("a").num_computed) for _ in range(3)]
    assert found == [([], 4), ([], 8), (["a"], 10)]


def test_task_5_prompts_share_a_step() -> None:
    """Oracle: by hand: the first prompt gets 5 of the 8 tokens of a step, and the second gets 3 of its 6."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=8)
    manager.add_request([1] * 5, "a", limits())
    manager.add_request([2] * 6, "b", limits())
    assert list(manager.process_batch()) == ["a"]
    assert manager.sequence("b").num_computed == 3
    assert list(manager.process_batch()) == ["b"]
    assert manager.sequence("b").num_computed == 6


def test_task_5_a_prompt_of_one_token_is_served_before_an_older_long_prompt() -> None:
    """Oracle: `share_budget`: of 4 tokens one is the decode's.

    Common mistake: serving in order of arrival.
    """
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "long", limits())
    manager.add_request([5], "short", limits())
    assert list(manager.process_batch()) == ["short"]
    assert manager.sequence("long").num_computed == 3


def test_task_5_the_oldest_waiting_request_starts_first() -> None:
    """Oracle: by hand: there are slots for two of four."""
    manager = DenseBatchManager(2, 16)
    for name in ("d", "c", "b", "a"):
        manager.add_request([1, 2], name, limits())
    assert set(manager.process_batch()) == {"d", "c"}
    assert (ids(manager.running), ids(manager.waiting)) == (["d", "c"], ["b", "a"])
    assert manager.capacity.num_free == 0
    manager.process_batch()
    assert ids(manager.waiting) == ["b", "a"]


def test_task_5_a_later_request_starts_in_the_next_step() -> None:
    """Oracle: by hand: it does not wait for the others to finish."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits())
    manager.process_batch()
    manager.add_request([2], "b", limits())
    assert set(manager.process_batch()) == {"a", "b"}


def test_task_5_an_admitted_request_holds_a_slot_even_without_budget() -> None:
    """Oracle: by hand: the first prompt uses up the step, and both run."""
    manager = DenseBatchManager(3, 16, max_batched_tokens=4)
    manager.add_request([1] * 8, "a", limits())
    manager.add_request([2] * 8, "b", limits())
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a", "b"]
    assert [sequence.num_computed for sequence in manager.running] == [4, 0]
    assert manager.capacity.num_free == 1


def test_task_5_completions_are_forked_when_their_prompt_is_complete() -> None:
    """Oracle: by hand: one sequence during the prefill, three afterwards, each with a slot."""
    manager = DenseBatchManager(4, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=3))
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a/0"]
    assert manager.capacity.num_free == 3
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}
    assert sorted(ids(manager.running)) == ["a/0", "a/1", "a/2"]
    assert manager.capacity.num_free == 1
    assert [manager.sequence(f"a/{i}").num_computed for i in range(3)] == [6, 6, 6]
    assert manager.sequence("a/1") is not manager.sequence("a/0")


def test_task_5_a_request_starts_only_if_every_completion_gets_a_slot() -> None:
    """Oracle: by hand: one slot is free, and two are needed. A later request must not overtake."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([1], "a", limits())
    manager.add_request([2], "b", limits(n=2))
    manager.add_request([3], "c", limits())
    assert list(manager.process_batch()) == ["a"]
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["b/0", "c"])
    assert manager.capacity.num_free == 1


def test_task_5_slots_reserved_for_forks_stay_reserved() -> None:
    """Oracle: by hand: the leader holds one slot and needs another for its fork.

    Common mistake: counting only the slots in use, which leaves none for the fork.
    """
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits(n=2))
    manager.process_batch()
    manager.add_request([2], "b", limits())
    assert len(manager.process_batch()) == 0
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0"], ["b"])
    assert set(manager.process_batch()) == {"a/0", "a/1"}
    assert ids(manager.waiting) == ["b"]


def test_task_5_slots_are_reserved_for_the_forks_of_all_requests_that_start_in_one_step() -> None:
    """Oracle: by hand: two leaders and their two forks need all four slots; the third request waits."""
    manager = DenseBatchManager(4, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=2))
    manager.add_request([2] * 6, "b", limits(n=2))
    manager.add_request([3], "c", limits())
    ready = [set(manager.process_batch()) for _ in range(3)]
    assert ready == [set(), {"a/0", "a/1"}, {"b/0", "b/1"}]
    assert ids(manager.waiting) == ["c"]
    assert manager.capacity.num_free == 0


def forked(slots: int) -> DenseBatchManager:
    """A manager in which both completions of a request "a" run, after the step that ends its prompt."""
    manager = DenseBatchManager(slots, 16)
    manager.add_request([1, 2], "a", limits(n=2))
    assert set(manager.process_batch()) == {"a/0", "a/1"}
    assert manager.capacity.num_free == slots - 2
    return manager


def test_task_5_after_the_fork_no_slot_is_reserved() -> None:
    """Oracle: by hand: two of three slots are in use, and "b" starts in the third.

    Common mistake: `admit` reserves `params.n - 1` slots for a leader, also after its forks got theirs.
    """
    manager = forked(slots=3)
    manager.add_request([3], "b", limits())
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0", "a/1", "b"], [])


def test_task_5_a_completion_that_was_forked_before_needs_one_slot() -> None:
    """Oracle: by hand: after a step that raised, both completions wait, each as a sequence without forks.

    Common mistake: `admit` counts `params.n` slots for each of them. `recover` is given.
    """
    manager = forked(slots=2)
    manager.recover()
    assert (ids(manager.waiting), manager.capacity.num_free) == (["a/0", "a/1"], 2)
    manager.admit()
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0", "a/1"], [])


def test_task_5_a_prompt_with_prompt_logprobs_is_split_into_smaller_chunks() -> None:
    """Oracle: `batch_manager.tokens_wanted`: no more rows of logits in a step than `MAX_PROMPT_ROWS`."""
    length = 2 * MAX_PROMPT_ROWS
    manager = DenseBatchManager(2, 2 * length)
    manager.add_request([1] * length, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == MAX_PROMPT_ROWS
    assert list(manager.process_batch()) == ["a"]


@pytest.mark.parametrize("budget", [3, 8, 512])
def test_task_5_logits_do_not_depend_on_the_batch_or_the_chunks(budget: int) -> None:
    """Oracle: the model without cache and batch. The prompts are packed, complete or in chunks."""
    prompts = {"a": prompt(7, 1), "b": prompt(1, 2), "c": prompt(12, 3)}
    manager, found = with_model(3, budget), {}
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    for _ in range(10):
        ready = manager.process_batch()
        found.update({seq_id: np.array(ready[seq_id]) for seq_id in ready})
    assert found.keys() == prompts.keys()
    for name, tokens in prompts.items():
        np.testing.assert_allclose(found[name], logits_after(tiny_model(), tokens), rtol=1e-3, atol=1e-3)


def test_task_5_completions_start_with_the_same_logits() -> None:
    """Oracle: the model without cache and batch."""
    manager = with_model(3)
    manager.add_request(prompt(4, 5), "before", limits())
    manager.add_request(prompt(6, 4), "a", limits(n=2))
    ready = manager.process_batch()
    for name in ("a/0", "a/1"):
        expect_logits(ready[name], prompt(6, 4))


def test_task_5_a_step_is_one_pass_over_all_its_tokens() -> None:
    """Oracle: by hand: the first pass has 4 + 4 tokens, the next one 2, and an empty step has no pass."""
    model = CountingModel(tiny_model())
    manager = DenseBatchManager(2, 64, model=model, max_batched_tokens=8)
    manager.add_request(prompt(4, 6), "a", limits())
    manager.add_request(prompt(6, 7), "b", limits())
    for _ in range(3):
        manager.process_batch()
    assert model.fed == [8, 2]


def test_task_5_commit_appends_a_token_to_the_outputs() -> None:
    """Oracle: by hand: the token is known, and the next step computes it."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits())
    for token in (8, 9):
        assert list(manager.process_batch()) == ["a"]
        manager.commit({"a": token})
    sequence = manager.sequence("a")
    assert sequence.outputs == [8, 9]
    assert (sequence.num_tokens, sequence.num_computed) == (5, 4)


def test_task_5_commit_gives_each_sequence_its_own_token() -> None:
    """Oracle: by hand, including completions of one prompt."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=2))
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.commit({"b": 1, "a/1": 2, "a/0": 3})
    assert [manager.sequence(name).outputs for name in ("a/0", "a/1", "b")] == [[3], [2], [1]]


def test_task_5_commit_does_not_change_sequences_without_a_token() -> None:
    """Oracle: by hand: an incomplete prompt gets no token, and an empty commit changes nothing."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([5], "a", limits())
    manager.add_request([1] * 10, "b", limits())
    manager.process_batch()
    manager.commit({"a": 6})
    manager.commit({})
    assert manager.sequence("a").outputs == [6]
    assert manager.sequence("b").outputs == []


def test_task_5_a_long_prompt_does_not_delay_a_decode() -> None:
    """Oracle: by hand: the decode gets one of the 4 tokens of a step, and the older prompt gets 3."""
    manager = DenseBatchManager(2, 32, max_batched_tokens=4)
    manager.add_request([1] * 10, "long", limits())
    manager.add_request([5], "short", limits(8))
    computed = []
    for _ in range(4):
        ready = manager.process_batch()
        assert "short" in list(ready)
        computed.append(manager.sequence("long").num_computed)
        manager.commit(dict.fromkeys(ready, 7))
    assert computed == [3, 6, 9, 10]
    assert manager.sequence("short").outputs == [7, 7, 7, 7]
    assert manager.sequence("long").outputs == [7]


def test_task_5_the_next_step_computes_the_committed_token() -> None:
    """Oracle: the model without cache and batch, on prompt and outputs."""
    manager, tokens = with_model(2), prompt(5, 8)
    manager.add_request(tokens, "a", limits())
    for token in (11, 3, 42):
        expect_logits(manager.process_batch()["a"], tokens)
        manager.commit({"a": token})
        tokens = [*tokens, token]


def test_task_5_completions_of_one_prompt_can_diverge() -> None:
    """Oracle: the model without cache and batch, on the tokens of each completion."""
    manager, tokens = with_model(3), prompt(6, 9)
    known = {f"a/{i}": list(tokens) for i in range(3)}
    manager.add_request(tokens, "a", limits(n=3))
    for step in range(4):
        ready = manager.process_batch()
        assert set(ready) == set(known)
        for i, (name, mine) in enumerate(known.items()):
            expect_logits(ready[name], mine)
            mine.append(10 * step + 3 * i)
        manager.commit({name: mine[-1] for name, mine in known.items()})
