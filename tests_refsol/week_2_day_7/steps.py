"""Day 2.7, tasks 4 and 5: one packed forward pass, and one step of all running sequences."""

from io import StringIO
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.batch_manager import MAX_PROMPT_ROWS
from tiny_llm.chunked_prefill import plan_chunks
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.step import Plan

from common.toy_models import CountingModel, logits_after, tiny_model
from common.toy_requests import ids, limits, prompt

# Task 4: DenseBatchManager.compute


def with_model(slots: int, budget: int = 512) -> DenseBatchManager:
    """A manager that computes; keys and values in float32, so that storing them rounds nothing."""
    return DenseBatchManager(slots, 64, model=tiny_model(), max_batched_tokens=budget, kv_dtype=mx.float32)


def started(manager: DenseBatchManager, **prompts: list[int]) -> DenseBatchManager:
    """The manager with requests that have been admitted, and of which nothing is computed."""
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    manager.admit()
    return manager


def planned(manager: DenseBatchManager, budget: int = 512) -> Plan[Any]:
    """The next step of all that run."""
    return plan_chunks(manager.running, budget)


def expect_logits(row: mx.array, tokens: list[int]) -> None:
    """The row is that of the model after these tokens, without cache and batch."""
    np.testing.assert_allclose(np.array(row), logits_after(tiny_model(), tokens), rtol=1e-3, atol=1e-3)


def num_operators(array: mx.array) -> int:
    """The operators that MLX has still to run for an array; 0: it is evaluated."""
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


def test_task_4_the_next_chunk_sees_what_the_slot_holds() -> None:
    """Oracle: the model without cache and batch, on the whole prompt; positions go on where they ended."""
    tokens = prompt(10, 6)
    manager = started(with_model(1), a=tokens)
    for start in (0, 4, 8):
        manager.sequence("a").num_computed = start
        logits = manager.compute(planned(manager, budget=4))
        assert (logits is None) == (start < 8), "no row is needed before the prompt is complete"
    assert logits is not None
    expect_logits(logits[0], tokens)


def test_task_4_a_decode_beside_a_prompt() -> None:
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


def test_task_4_all_rows_that_the_plan_asks_for() -> None:
    """Oracle: the model without cache and batch, on each beginning of the prompt.

    With prompt log-probabilities the plan asks for the rows of all tokens of the prompt.
    """
    manager, tokens = with_model(1), prompt(4, 9)
    manager.add_request(tokens, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    manager.admit()
    logits = manager.compute(planned(manager))
    assert logits is not None
    want = [logits_after(tiny_model(), tokens[: i + 1]) for i in range(4)]
    np.testing.assert_allclose(np.array(logits), want, rtol=1e-3, atol=1e-3)


def test_task_4_one_pass_over_all_tokens() -> None:
    """Oracle: by hand: 5 and 3 tokens are one pass of 8."""
    model = CountingModel(tiny_model())
    manager = started(DenseBatchManager(2, 64, model=model), a=prompt(5, 10), b=prompt(3, 11))
    manager.compute(planned(manager))
    assert model.fed == [8]


def test_task_4_without_a_model_nothing_is_computed() -> None:
    """Oracle: the docstring: the plan has a chunk, and there are no caches to write into."""
    manager = started(DenseBatchManager(1, 64), a=prompt(5, 12))
    assert manager.compute(planned(manager)) is None


class Watched:
    """A model that keeps the logits that it returned, and counts the operators that they wait for."""

    def __init__(self) -> None:
        self.config = tiny_model().config
        self.logits: list[mx.array] = []
        self.operators: list[int] = []

    def __call__(self, tokens: mx.array, context: Any) -> mx.array:
        self.logits.append(tiny_model()(tokens, context))
        self.operators.append(num_operators(self.logits[-1]))
        return self.logits[-1]


def test_task_4_logits_that_are_needed_are_computed_before_it_returns() -> None:
    """Oracle: MLX's own graph of the result. A lazy result is computed by the first line that reads it."""
    manager = started(with_model(1), a=prompt(5, 13))
    logits = manager.compute(planned(manager))
    assert logits is not None
    waiting = num_operators(logits)  # a view of computed logits has fewer than 5
    assert waiting < 5, f"call mx.eval on the logits: MLX has still {waiting} operators to run for them"


def test_task_4_logits_that_are_not_needed_are_never_computed() -> None:
    """Oracle: MLX's own graph of what the model returned. Evaluating all of it in any case is the mistake."""
    model = Watched()
    manager = DenseBatchManager(1, 64, model=model, kv_dtype=mx.float32)
    started(manager, a=prompt(9, 14))
    assert manager.compute(planned(manager, budget=4)) is None
    assert len(model.logits) == 1
    assert num_operators(model.logits[0]) > 0


def test_task_4_keys_and_values_are_computed_before_it_returns() -> None:
    """Oracle: MLX's own graph: a chunk waits for as many operators as the one before, not for that one too.

    Without evaluated caches each chunk of a prompt would be computed only when its last row is read.
    """
    model, tokens = Watched(), prompt(12, 15)
    manager = started(DenseBatchManager(1, 64, model=model, kv_dtype=mx.float32), a=tokens)
    for start in (0, 4, 8):
        manager.sequence("a").num_computed = start
        manager.compute(planned(manager, budget=4))
    first, second, _ = model.operators
    assert second < 1.5 * first


# Task 5: DenseBatchManager.process_batch


def test_task_5_a_prompt_is_computed_and_is_ready() -> None:
    """Oracle: by hand: it has a slot now, and all its 3 tokens are computed."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits())
    ready = manager.process_batch()
    assert list(ready) == ["a"]
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.capacity.num_free == 1
    assert manager.sequence("a").num_computed == 3


def test_task_5_if_there_is_nothing_to_do_none_is_ready() -> None:
    """Oracle: by hand: without a request, and with one whose token is not chosen yet."""
    manager = DenseBatchManager(2, 16)
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == 3


def test_task_5_a_long_prompt_is_computed_in_chunks() -> None:
    """Oracle: by hand: 10 tokens at 4 a step; none is ready before the last one."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    found = [(list(manager.process_batch()), manager.sequence("a").num_computed) for _ in range(3)]
    assert found == [([], 4), ([], 8), (["a"], 10)]


def test_task_5_prompts_share_a_step() -> None:
    """Oracle: by hand: of 8 tokens a step 5 are the first one's, and 3 of 6 the second one's."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=8)
    manager.add_request([1] * 5, "a", limits())
    manager.add_request([2] * 6, "b", limits())
    assert list(manager.process_batch()) == ["a"]
    assert manager.sequence("b").num_computed == 3
    assert list(manager.process_batch()) == ["b"]
    assert manager.sequence("b").num_computed == 6


def test_task_5_a_single_token_is_computed_beside_an_older_long_prompt() -> None:
    """Oracle: `share_budget`: of 4 tokens one is the decode's. Serving in order is the mistake."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "long", limits())
    manager.add_request([5], "short", limits())
    assert list(manager.process_batch()) == ["short"]
    assert manager.sequence("long").num_computed == 3


def test_task_5_the_one_that_has_waited_longest_starts_first() -> None:
    """Oracle: by hand: there are slots for two of four."""
    manager = DenseBatchManager(2, 16)
    for name in ("d", "c", "b", "a"):
        manager.add_request([1, 2], name, limits())
    assert set(manager.process_batch()) == {"d", "c"}
    assert (ids(manager.running), ids(manager.waiting)) == (["d", "c"], ["b", "a"])
    assert manager.capacity.num_free == 0
    manager.process_batch()
    assert ids(manager.waiting) == ["b", "a"]


def test_task_5_a_request_that_comes_later_starts_in_the_next_step() -> None:
    """Oracle: by hand: it does not wait for the others to end."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits())
    manager.process_batch()
    manager.add_request([2], "b", limits())
    assert set(manager.process_batch()) == {"a", "b"}


def test_task_5_a_request_that_starts_holds_a_slot_before_there_is_budget_for_it() -> None:
    """Oracle: by hand: the first prompt uses up the step, and both run."""
    manager = DenseBatchManager(3, 16, max_batched_tokens=4)
    manager.add_request([1] * 8, "a", limits())
    manager.add_request([2] * 8, "b", limits())
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a", "b"]
    assert [sequence.num_computed for sequence in manager.running] == [4, 0]
    assert manager.capacity.num_free == 1


def test_task_5_completions_are_forked_when_their_prompt_is_computed() -> None:
    """Oracle: by hand: one sequence while the prompt is computed, three afterwards, each with a slot."""
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


def test_task_5_completions_need_a_slot_each_to_start() -> None:
    """Oracle: by hand: one slot is free, and two are needed. A later request does not overtake."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([1], "a", limits())
    manager.add_request([2], "b", limits(n=2))
    manager.add_request([3], "c", limits())
    assert list(manager.process_batch()) == ["a"]
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["b/0", "c"])
    assert manager.capacity.num_free == 1


def test_task_5_slots_of_completions_to_come_are_not_given_away() -> None:
    """Oracle: by hand: the leader holds one slot and needs another when its prompt is computed.

    Counting only the slots that are taken is the mistake that this finds: the fork would have none.
    """
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits(n=2))
    manager.process_batch()
    manager.add_request([2], "b", limits())
    assert len(manager.process_batch()) == 0
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0"], ["b"])
    assert set(manager.process_batch()) == {"a/0", "a/1"}
    assert ids(manager.waiting) == ["b"]


def test_task_5_slots_are_kept_for_all_that_start_in_the_same_step() -> None:
    """Oracle: by hand: two leaders and a fork of each are all four slots; the third request waits."""
    manager = DenseBatchManager(4, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=2))
    manager.add_request([2] * 6, "b", limits(n=2))
    manager.add_request([3], "c", limits())
    ready = [set(manager.process_batch()) for _ in range(3)]
    assert ready == [set(), {"a/0", "a/1"}, {"b/0", "b/1"}]
    assert ids(manager.waiting) == ["c"]
    assert manager.capacity.num_free == 0


def test_task_5_a_prompt_of_which_all_logits_are_wanted_comes_in_smaller_chunks() -> None:
    """Oracle: `batch_manager.wanted`: no more rows of logits in a step than `MAX_PROMPT_ROWS`."""
    length = 2 * MAX_PROMPT_ROWS
    manager = DenseBatchManager(2, 2 * length)
    manager.add_request([1] * length, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == MAX_PROMPT_ROWS
    assert list(manager.process_batch()) == ["a"]


@pytest.mark.parametrize("budget", [3, 8, 512])
def test_task_5_logits_are_those_of_each_sequence_alone(budget: int) -> None:
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


def test_task_5_completions_begin_with_the_same_logits() -> None:
    """Oracle: the model without cache and batch."""
    manager = with_model(3)
    manager.add_request(prompt(4, 5), "before", limits())
    manager.add_request(prompt(6, 4), "a", limits(n=2))
    ready = manager.process_batch()
    for name in ("a/0", "a/1"):
        expect_logits(ready[name], prompt(6, 4))


def test_task_5_a_step_is_one_pass_over_all_its_tokens() -> None:
    """Oracle: by hand: 8 tokens are 4 and 4 of 6, the next step brings 2; for nothing there is no pass."""
    model = CountingModel(tiny_model())
    manager = DenseBatchManager(2, 64, model=model, max_batched_tokens=8)
    manager.add_request(prompt(4, 6), "a", limits())
    manager.add_request(prompt(6, 7), "b", limits())
    for _ in range(3):
        manager.process_batch()
    assert model.fed == [8, 2]


def test_task_5_a_token_is_put_behind_the_others() -> None:
    """Oracle: by hand: it is known now, and will be computed by the next step."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits())
    for token in (8, 9):
        assert list(manager.process_batch()) == ["a"]
        manager.commit({"a": token})
    sequence = manager.sequence("a")
    assert sequence.outputs == [8, 9]
    assert (sequence.num_tokens, sequence.num_computed) == (5, 4)


def test_task_5_each_sequence_gets_its_own_token() -> None:
    """Oracle: by hand, completions of one prompt among them."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=2))
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.commit({"b": 1, "a/1": 2, "a/0": 3})
    assert [manager.sequence(name).outputs for name in ("a/0", "a/1", "b")] == [[3], [2], [1]]


def test_task_5_a_sequence_without_a_new_token_stays_as_it_is() -> None:
    """Oracle: by hand: a prompt that is still computed gets no token, and no tokens change nothing."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([5], "a", limits())
    manager.add_request([1] * 10, "b", limits())
    manager.process_batch()
    manager.commit({"a": 6})
    manager.commit({})
    assert manager.sequence("a").outputs == [6]
    assert manager.sequence("b").outputs == []


def test_task_5_a_decode_is_not_held_up_by_a_long_prompt() -> None:
    """Oracle: by hand: of 4 tokens a step one is the decode's, and 3 are the older prompt's."""
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


def test_task_5_the_next_step_continues_with_the_token() -> None:
    """Oracle: the model without cache and batch, on prompt and outputs."""
    manager, tokens = with_model(2), prompt(5, 8)
    manager.add_request(tokens, "a", limits())
    for token in (11, 3, 42):
        expect_logits(manager.process_batch()["a"], tokens)
        manager.commit({"a": token})
        tokens = [*tokens, token]


def test_task_5_completions_go_different_ways() -> None:
    """Oracle: the model without cache and batch, on each one's own tokens: a copy of the cache for each."""
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
