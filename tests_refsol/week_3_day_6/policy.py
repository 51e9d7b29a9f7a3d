"""Day 3.6, tasks 1 and 2: the memory reserved at admission, and the choice of the sequence to preempt."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.layer_groups import LayerGroup
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import NoPreemption, Policies, PreemptionPolicy
from tiny_llm.preemption import NewestFirst
from tiny_llm.sampling_params import SamplingParams

from common.blocks import counts
from common.examples import quick
from week_3_day_6.two_pools import SIZE, TEXT, Setup

# Task 1: NewestFirst.reserved_tokens


@pytest.mark.parametrize(
    ("num_prompt", "num_outputs", "max_len", "reserved"),
    [(10, 0, 40, 14), (10, 3, 40, 17), (1, 0, 40, 5), (10, 0, 14, 14), (10, 0, 12, 12), (10, 2, 12, 12)],
)
def test_task_1_the_known_tokens_and_one_more_block_are_reserved(
    num_prompt: int, num_outputs: int, max_len: int, reserved: int
) -> None:
    """Oracle: by hand, blocks of 4: 10 known tokens reserve 14, or `max_len` if that is less."""
    sequence = Setup().sequence(TEXT[:num_prompt], 0, outputs=[7] * num_outputs)
    sequence.max_len = max_len
    assert NewestFirst().reserved_tokens(sequence) == reserved


@pytest.mark.parametrize("computed", [0, 3, 4, 10])
def test_task_1_the_reservation_does_not_depend_on_computed_tokens(computed: int) -> None:
    """Oracle: by hand: blocks are reserved for known tokens; the scheduler knows which blocks exist."""
    assert NewestFirst().reserved_tokens(Setup().sequence(TEXT[:10], computed)) == 14


def test_task_1_the_block_size_is_that_of_the_sequence() -> None:
    """Oracle: by hand, blocks of 16 and of 1."""
    for size, reserved in ((16, 26), (1, 11)):
        sequence = Setup().sequence(TEXT[:10], 0)
        sequence.tables = PageLayout((LayerGroup((0,)),), size, 16).tables(BlockAllocator(9))
        assert NewestFirst().reserved_tokens(sequence) == reserved


@pytest.mark.parametrize(
    ("policy", "num_running"),
    [(NoPreemption(), 1), (NewestFirst(), 3)],
    ids=["full_reservation", "known_tokens"],
)
def test_task_1_more_sequences_start_than_with_full_reservations(
    policy: PreemptionPolicy, num_running: int
) -> None:
    """Oracle: by hand: prompts of 4 tokens that may grow to 24, which is 6 blocks, in a pool of 6.

    With full reservations one of them starts; with 8 tokens each, which is 2 blocks, three start.
    """
    manager = PagedBatchManager(6, SIZE, 9, policies=Policies(preemption=policy))
    for index in range(5):
        manager.add_request([index] * 4, str(index), SamplingParams(max_tokens=20))
    manager.process_batch()
    assert len(manager.running) == num_running


# Task 2: NewestFirst.choose_victim


def test_task_2_the_newest_candidate_is_chosen() -> None:
    """Oracle: by hand: candidates are oldest first. Common mistake: the first, so that none ever finishes."""
    sequences = [Setup().sequence(TEXT[:length], 0) for length in (5, 9, 1, 3)]
    for number in range(1, 5):
        assert NewestFirst().choose_victim(sequences[:number]) is sequences[number - 1]
        assert NewestFirst().choose_victim(tuple(sequences[:number])) is sequences[number - 1]


def test_task_2_choosing_does_not_change_the_candidates() -> None:
    """Oracle: by hand: the list belongs to the scheduler."""
    sequences = [Setup().sequence(TEXT[:5], 0) for _ in range(3)]
    candidates = list(sequences)
    NewestFirst().choose_victim(candidates)
    assert candidates == sequences


def serve_all(num_blocks: int, prompts: Sequence[int], max_tokens: int) -> None:
    """Serve prompts of these lengths without a model.

    Assert after each step that the oldest sequence still runs and that all references match.
    """
    manager = PagedBatchManager(num_blocks, SIZE, len(prompts), policies=Policies(preemption=NewestFirst()))
    for index, length in enumerate(prompts):
        manager.add_request([index] * length, str(index), SamplingParams(max_tokens=max_tokens))
    steps = 0
    while manager.has_work:
        oldest = [sequence.seq_id for sequence in manager.running[:1]]
        ready = list(manager.process_batch())
        assert [sequence.seq_id for sequence in manager.running][: len(oldest)] == oldest
        held = Counter(block for sequence in manager.running for block in sequence.blocks)
        assert counts(manager.allocator) == [held[block] for block in range(num_blocks)]
        steps += 1
        manager.commit(dict.fromkeys(ready, 9))
        for seq_id in ready:
            if manager.sequence(seq_id).num_tokens == manager.sequence(seq_id).max_len:
                manager.finish(seq_id)
        assert steps < 400, "the sequences do not finish"
    assert manager.allocator.num_free == num_blocks


@quick
@given(
    prompts=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    max_tokens=st.integers(4, 12),
    spare=st.integers(0, 3),
)
def test_task_2_every_sequence_finishes_and_the_oldest_is_never_preempted(
    prompts: list[int], max_tokens: int, spare: int
) -> None:
    """Oracle: the order of arrival and a bound on the steps, in pools slightly larger than the longest."""
    serve_all(-(-(max(prompts) + max_tokens) // SIZE) + spare, prompts, max_tokens)
