"""PagedBatchManager: validation, the queue, the step and the end of a request; without a model unless a test
says so.
"""

import numpy as np
import pytest
from tiny_llm.errors import DuplicateRequestError, OutOfBlocksError, RequestTooLargeError
from tiny_llm.paged_attention import BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import SequenceState

from promises import check_all_returned, check_pages, policies
from tiny_model import logits_through_pages, random_prompt, tiny_model


def manager_of(
    blocks: int = 8,
    block_size: int = 4,
    max_seqs: int = 4,
    *,
    budget: int = 64,
    preempts: bool = True,
    context: int = 32,
) -> PagedBatchManager:
    return PagedBatchManager(
        blocks,
        block_size,
        max_seqs,
        max_batched_tokens=budget,
        max_model_len=context,
        policies=policies(preempts),
    )


def outputs(max_tokens: int | None, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=n)


def step(manager: PagedBatchManager, token: int = 9) -> list[str]:
    """Run one step with a token for every sequence that is ready; returns their ids."""
    ready = list(manager.process_batch())
    manager.commit(dict.fromkeys(ready, token))
    check_pages(manager)
    return ready


# Validation.


@pytest.mark.parametrize(
    ("prompt", "params", "figures"),
    [
        (32, outputs(1), "32 prompt tokens and 1 output token exceed the context of 32"),
        (1, outputs(40), "'big': 1 prompt token and 40 output tokens exceed the context of 32"),
        (40, outputs(None), "40 prompt tokens .* exceed the context of 32"),
        (20, outputs(13), "20 prompt tokens and 13 output tokens exceed the context of 32"),
        (4, outputs(4, n=5), "n = 5 exceeds the 4 sequences"),
        (14, outputs(10), "24 tokens in 1 completion need 6 blocks of 4; the pool has 5"),
        (7, outputs(13, n=4), "completions need .* blocks of 4; the pool has 5"),
    ],
)
def test_a_request_that_can_never_run_is_rejected_with_the_numbers(
    prompt: int, params: SamplingParams, figures: str
) -> None:
    manager = manager_of(blocks=5)
    with pytest.raises(RequestTooLargeError, match=figures):
        manager.add_request([1] * prompt, "big", params)
    check_all_returned(manager)


def test_a_request_that_just_fits_is_served() -> None:
    manager = manager_of(blocks=8, context=32)
    assert manager.add_request([1] * 20, "a", outputs(12))
    while manager.has_work:
        step(manager)
        if manager.sequence("a").num_tokens == 32:
            manager.finish("a")
    check_all_returned(manager)


def test_an_empty_prompt_is_rejected() -> None:
    manager = manager_of()
    with pytest.raises(ValueError, match="request 'empty' has no tokens"):
        manager.add_request([], "empty")
    check_all_returned(manager)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_an_id_can_be_reused_once_its_request_has_ended(first: int, second: int, running: bool) -> None:
    manager = manager_of()
    manager.add_request([1, 2], "a", outputs(2, n=first))
    if running:
        step(manager)
    with pytest.raises(DuplicateRequestError, match="'a'"):
        manager.add_request([3], "a", outputs(2, n=second))
    manager.cancel("a")
    check_all_returned(manager)
    assert manager.add_request([3], "a", outputs(2, n=second))


def test_without_max_tokens_outputs_go_up_to_the_context() -> None:
    manager = manager_of(context=32)
    manager.add_request([1] * 10, "a", outputs(None))
    assert manager.sequence("a").max_len == 32


# The step.


def test_a_step_without_work_is_empty() -> None:
    assert len(manager_of().process_batch()) == 0


def test_a_long_prompt_takes_several_steps_while_decodes_go_on() -> None:
    manager = manager_of(blocks=16, budget=6)
    manager.add_request([1, 2], "short", outputs(9))
    assert step(manager) == ["short"]
    manager.add_request([1] * 14, "long", outputs(2))
    assert step(manager) == ["short"]
    assert manager.sequence("long").num_computed == 5
    assert step(manager) == ["short"]
    assert set(step(manager)) == {"short", "long"}


def test_each_completion_counts_as_one_sequence() -> None:
    manager = manager_of(blocks=32, max_seqs=4)
    manager.add_request([1], "three", outputs(4, n=3))
    manager.add_request([1], "two", outputs(4, n=2))
    manager.add_request([1], "one", outputs(4))
    assert len(step(manager)) == 3, "no request overtakes the one that waits for two sequences"
    manager.finish("three/1")
    assert len(step(manager)) == 4


def test_completions_are_forked_after_one_prefill_and_share_its_pages() -> None:
    manager = manager_of(blocks=16)
    manager.add_request([1] * 9, "a", outputs(4, n=3))
    assert step(manager) == ["a/0", "a/1", "a/2"]
    assert manager.allocator.num_blocks - manager.allocator.num_free == 3
    step(manager)
    assert manager.allocator.num_blocks - manager.allocator.num_free == 2 + 3, (
        "two full blocks are still shared"
    )


def test_forks_of_one_step_share_a_row_of_logits() -> None:
    manager = PagedBatchManager(8, 4, 4, model=tiny_model())
    prompt = random_prompt(7, 1)
    manager.add_request(prompt, "a", outputs(4, n=3))
    logits = manager.process_batch()
    assert np.array(logits.rows).shape[0] == 1
    whole = np.array(logits_through_pages(tiny_model(), prompt, [7]))[-1]
    assert all(np.array_equal(np.array(row), whole) for row in logits.values())


def test_the_newest_request_is_preempted_when_pages_run_out_and_resumes_with_its_outputs() -> None:
    manager = manager_of(blocks=6, block_size=2, context=12)
    manager.add_request([1, 2, 3], "old", outputs(9))
    manager.add_request([4, 5, 6], "new", outputs(9))
    while not manager.num_preemptions:
        step(manager)
    new = manager.sequence("new")
    assert new.state is SequenceState.WAITING
    assert new.outputs, "earlier outputs are unchanged"
    assert manager.sequence("old").state is SequenceState.RUNNING
    num_outputs = len(new.outputs)
    manager.finish("old")
    step(manager)
    assert new.num_computed == 3 + num_outputs
    assert len(new.outputs) == num_outputs + 1


def test_without_preemption_a_request_waits_until_its_full_length_fits() -> None:
    manager = manager_of(blocks=4, preempts=False, context=16)
    manager.add_request([1] * 4, "a", outputs(8))
    manager.add_request([1] * 2, "b", outputs(8))
    for _ in range(8):
        assert step(manager) == ["a"]
    manager.finish("a")
    assert step(manager) == ["b"]


# The end of a request.


def test_cancel_works_in_every_state_and_ignores_unknown_ids() -> None:
    manager = manager_of(blocks=16, max_seqs=3, budget=3)
    manager.add_request([1] * 8, "in the prompt", outputs(3, n=3))
    manager.add_request([1], "waiting", outputs(3))
    manager.process_batch()
    manager.cancel("unknown")
    for request_id in ("waiting", "in the prompt", "in the prompt"):
        manager.cancel(request_id)
        check_pages(manager)
    check_all_returned(manager)


def test_finishing_one_completion_keeps_the_others() -> None:
    manager = manager_of(blocks=16)
    manager.add_request([1] * 6, "a", outputs(8, n=2))
    step(manager)
    manager.finish("a/0")
    check_pages(manager)
    assert step(manager) == ["a/1"]
    with pytest.raises(KeyError):
        manager.finish("a/0")


def test_a_request_fails_if_tables_outside_the_manager_hold_too_many_pages_and_the_next_one_runs() -> None:
    manager = manager_of(blocks=4)
    elsewhere = BlockTable(manager.allocator, 4)
    elsewhere.append_tokens(12)
    manager.add_request([1] * 8, "big", outputs(4))
    with pytest.raises(OutOfBlocksError, match=r"'big' needs 3 blocks, 1 of 4 are available"):
        manager.process_batch()
    assert not manager.has_work
    manager.add_request([1], "small", outputs(2))
    assert list(manager.process_batch()) == ["small"]


def test_a_step_of_prompt_chunks_has_no_logits_but_writes_its_pages() -> None:
    manager = PagedBatchManager(8, 4, 4, model=tiny_model(), max_batched_tokens=5)
    prompt = random_prompt(9, 2)
    manager.add_request(prompt, "a", outputs(2))
    first = manager.process_batch()
    assert (len(first), first.rows) == (0, None)
    whole = np.array(logits_through_pages(tiny_model(), prompt, [9]))[-1]
    assert np.array_equal(np.array(manager.process_batch()["a"]), whole)
