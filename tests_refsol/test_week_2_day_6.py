"""Day 2.6: chunked prefill: sharing one step's token budget between the running sequences.

When these tests pass, you have the rule that computes a long prompt in chunks together with the decodes of
other sequences, a simulation of its effect on the time to each first token, and the plan of a step.
"""

from itertools import pairwise

import numpy as np
import pytest
from tiny_llm.batch_manager import MAX_PROMPT_ROWS
from tiny_llm.chunked_prefill import first_token_steps, plan_chunks, share_budget
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import Sequence

# Task 1: share_budget


def test_task_1_wants_that_fit_the_budget_are_granted_completely() -> None:
    """Oracle: by hand: 1 + 5 + 1 tokens fit into 10."""
    assert share_budget([1, 5, 1], 10) == [1, 5, 1]


def test_task_1_a_prompt_longer_than_the_budget_gets_a_chunk() -> None:
    """Oracle: by hand."""
    assert share_budget([100], 64) == [64]


def test_task_1_decodes_are_served_before_prompts_that_came_earlier() -> None:
    """Oracle: by hand: 2 of the 8 tokens are for the decodes. Common mistake: serving in the given order."""
    assert share_budget([100, 1, 1], 8) == [6, 1, 1]


def test_task_1_grants_are_in_the_order_of_the_wants() -> None:
    """Oracle: by hand: decodes are served first, but their grants stay in their places."""
    assert share_budget([100, 1, 30, 1], 64) == [62, 1, 0, 1]
    assert share_budget([1, 7, 0, 1, 2], 10) == [1, 7, 0, 1, 1]


def test_task_1_prompts_are_served_first_come_first_served() -> None:
    """Oracle: by hand: 5 and 3 are granted completely, and 2 are left for the last one."""
    assert share_budget([5, 3, 4], 10) == [5, 3, 2]


def test_task_1_a_short_prompt_does_not_overtake_a_long_one() -> None:
    """Oracle: by hand: nothing is left. Common mistakes: serving a later prompt that fits, equal shares."""
    assert share_budget([10, 2], 5) == [5, 0]
    assert share_budget([4, 10, 3], 8) == [4, 4, 0]


def test_task_1_a_want_of_one_is_a_decode_and_a_larger_one_is_a_prompt() -> None:
    """Oracle: by hand: the last token of a prompt's chunks is served like a decode."""
    assert share_budget([2, 1], 1) == [0, 1]
    assert share_budget([2, 2, 1], 4) == [2, 1, 1]


def test_task_1_decodes_beyond_the_budget_wait() -> None:
    """Oracle: by hand: first come, first served among the decodes too."""
    assert share_budget([1, 1, 1], 2) == [1, 1, 0]
    assert share_budget([3, 1, 1], 1) == [0, 1, 0]


def test_task_1_wants_of_zero_get_zero() -> None:
    """Oracle: by hand."""
    assert share_budget([], 16) == []
    assert share_budget([0, 0], 16) == [0, 0]
    assert share_budget([0, 1, 0, 2], 16) == [0, 1, 0, 2]


def test_task_1_a_budget_of_zero_grants_nothing() -> None:
    """Oracle: by hand."""
    assert share_budget([1, 7, 0], 0) == [0, 0, 0]


def test_task_1_an_exact_budget_grants_everything() -> None:
    """Oracle: by hand; with one token less, the last prompt gets one less."""
    assert share_budget([4, 1, 3], 8) == [4, 1, 3]
    assert share_budget([4, 1, 3], 7) == [4, 1, 2]


@pytest.mark.parametrize(
    ("wants", "budget"), [([1, 5], -1), ([], -1), ([-1], 5), ([3, 1, -2], 5), ([-2, 9], 0)]
)
def test_task_1_negative_numbers_are_rejected(wants: list[int], budget: int) -> None:
    """Oracle: the docstring. Treating a negative want as a prompt would grant a negative number of tokens."""
    with pytest.raises(ValueError):
        share_budget(wants, budget)


def test_task_1_the_arguments_are_not_modified() -> None:
    """Oracle: the docstring. Equal arguments give equal results."""
    wants = [9, 1, 4]
    assert share_budget(wants, 6) == share_budget(wants, 6) == [5, 1, 0]
    assert wants == [9, 1, 4]
    assert share_budget(tuple(wants), 6) == [5, 1, 0]


def random_cases() -> list[tuple[list[int], int]]:
    """Random wants and budgets: many decodes, many prompts, small and large budgets."""
    rng = np.random.default_rng(21)
    cases = []
    for _ in range(3000):
        most = int(rng.choice([1, 2, 3, 20]))
        wants = rng.integers(0, most + 1, size=int(rng.integers(0, 10))).tolist()
        cases.append((wants, int(rng.integers(0, sum(wants) + 5))))
    return cases


def test_task_1_no_grant_exceeds_its_want_and_the_sum_does_not_exceed_the_budget() -> None:
    """Oracle: the docstring, over random cases; nothing that is wanted stays unused."""
    for wants, budget in random_cases():
        granted = share_budget(wants, budget)
        assert len(granted) == len(wants), (wants, budget)
        assert all(0 <= count <= want for count, want in zip(granted, wants, strict=True)), (wants, budget)
        assert sum(granted) == min(budget, sum(wants)), (wants, budget)


def test_task_1_no_prompt_gets_tokens_while_a_decode_waits() -> None:
    """Oracle: the docstring, over random cases; the last decodes are the ones that wait."""
    for wants, budget in random_cases():
        granted = share_budget(wants, budget)
        decodes = [count for count, want in zip(granted, wants, strict=True) if want == 1]
        prompts = [count for count, want in zip(granted, wants, strict=True) if want > 1]
        assert all(decodes) or not any(prompts), (wants, budget)
        assert decodes == sorted(decodes, reverse=True), (wants, budget)


def test_task_1_a_prompt_gets_no_tokens_while_an_earlier_one_is_incomplete() -> None:
    """Oracle: the docstring, over random cases."""
    for wants, budget in random_cases():
        pairs = zip(share_budget(wants, budget), wants, strict=True)
        prompts = [(count, want) for count, want in pairs if want > 1]
        for (earlier, wanted), (later, _) in pairwise(prompts):
            assert earlier == wanted or later == 0, (wants, budget)


def test_task_1_grants_match_a_loop_that_hands_out_one_token_at_a_time() -> None:
    """Oracle: a slow loop: each token goes to the first decode that has none, else to the first prompt."""
    for wants, budget in random_cases():
        slowly = [0] * len(wants)
        for _ in range(budget):
            open_wants = [i for i, want in enumerate(wants) if slowly[i] < want]
            if open_wants:
                slowly[min(open_wants, key=lambda i: (wants[i] > 1, i))] += 1
        assert share_budget(wants, budget) == slowly, (wants, budget)


# Task 2: first_token_steps


def test_task_2_one_prompt_takes_as_many_steps_as_it_has_chunks() -> None:
    """Oracle: by hand: 1, 4, 5, 8 and 9 tokens at 4 per step."""
    assert [first_token_steps([length], 4) for length in (1, 4, 5, 8, 9)] == [[1], [1], [2], [2], [3]]


def test_task_2_prompts_that_fit_the_budget_are_complete_in_the_first_step() -> None:
    """Oracle: by hand."""
    assert first_token_steps([3, 1, 4], 8) == [1, 1, 1]
    assert first_token_steps([3, 1, 4], 7) == [1, 1, 2]


def test_task_2_a_complete_prompt_continues_as_a_decode() -> None:
    """Oracle: by hand: [4, 0], then the first one decodes and takes one token per step: [1, 3], [1, 3].

    If it did not decode, the second prompt would be complete in step 3.
    """
    assert first_token_steps([4, 8], 4) == [1, 4]


def test_task_2_a_short_prompt_waits_for_a_long_one_before_it() -> None:
    """Oracle: by hand: [4, 0], [4, 0], [2, 2], [1, 1]; in the other order [3, 1], [1, 3], [1, 3], [1, 3]."""
    assert first_token_steps([10, 3], 4) == [3, 4]
    assert first_token_steps([3, 10], 4) == [1, 4]


def test_task_2_a_prompt_of_one_token_is_served_like_a_decode() -> None:
    """Oracle: `share_budget`: it wants 1, so the longer prompt before it does not delay it."""
    assert first_token_steps([100, 1], 2) == [100, 1]


def test_task_2_no_prompts_give_an_empty_list() -> None:
    """Oracle: the docstring; no infinite loop."""
    assert first_token_steps([], 4) == []
    assert first_token_steps([], 0) == []


@pytest.mark.parametrize(
    ("prompt_lens", "budget"), [([5], 0), ([5, 5], 1), ([1, 1, 1], 2), ([3, 0], 8), ([0], 8), ([-1], 8)]
)
def test_task_2_a_simulation_that_could_never_end_is_rejected(prompt_lens: list[int], budget: int) -> None:
    """Oracle: the docstring: fewer tokens than prompts, or a prompt of no tokens."""
    with pytest.raises(ValueError):
        first_token_steps(prompt_lens, budget)


def test_task_2_a_budget_of_one_token_per_prompt_is_enough() -> None:
    """Oracle: by hand: [2, 0], [1, 1] (the first one decodes), [1, 1], [1, 1]."""
    assert first_token_steps([2, 3], 2) == [1, 4]


def test_task_2_the_arguments_are_not_modified() -> None:
    """Oracle: the docstring. Equal prompts give equal results."""
    prompt_lens = [5, 9, 2]
    assert first_token_steps(prompt_lens, 4) == first_token_steps(tuple(prompt_lens), 4)
    assert prompt_lens == [5, 9, 2]


def test_task_2_first_tokens_match_a_loop_that_hands_out_one_token_at_a_time() -> None:
    """Oracle: a slow loop that hands out each token of a step to the first that wants it."""
    rng = np.random.default_rng(22)
    for _ in range(200):
        prompt_lens = rng.integers(1, 30, size=int(rng.integers(1, 6))).tolist()
        budget = int(rng.integers(len(prompt_lens), 20))
        left, found, step = list(prompt_lens), [0] * len(prompt_lens), 0
        while 0 in found:
            step += 1
            wants = [max(1, tokens) for tokens in left]
            got = [0] * len(wants)
            for _ in range(budget):
                open_wants = [i for i, want in enumerate(wants) if got[i] < want]
                if open_wants:
                    got[min(open_wants, key=lambda i: (wants[i] > 1, i))] += 1
            left = [tokens - count for tokens, count in zip(left, got, strict=True)]
            found = [known or (step if tokens <= 0 else 0) for known, tokens in zip(found, left, strict=True)]
        assert first_token_steps(prompt_lens, budget) == found, (prompt_lens, budget)


# Task 3: plan_chunks


def sequence(
    seq_id: str, prompt_len: int, num_computed: int = 0, outputs: int = 0, prompt_logprobs: int | None = None
) -> Sequence:
    """A sequence with these numbers of prompt tokens, computed tokens and outputs."""
    return Sequence(
        seq_id=seq_id,
        request_id=seq_id,
        prompt=(7,) * prompt_len,
        params=SamplingParams(prompt_logprobs=prompt_logprobs),
        seed=0,
        max_len=1000,
        outputs=[8] * outputs,
        num_computed=num_computed,
    )


def planned(running: list[Sequence], budget: int) -> list[tuple[str, int, int]]:
    """The chunks of the next step: id, start, stop."""
    return [(chunk.sequence.seq_id, chunk.start, chunk.stop) for chunk in plan_chunks(running, budget).chunks]


def test_task_3_a_new_prompt_starts_at_its_first_token() -> None:
    """Oracle: by hand."""
    assert planned([sequence("a", 5)], 8) == [("a", 0, 5)]


def test_task_3_a_chunk_starts_where_the_last_one_ended() -> None:
    """Oracle: by hand: 6 of 10 tokens are computed, and the budget is 8 or 3."""
    assert planned([sequence("a", 10, num_computed=6)], 8) == [("a", 6, 10)]
    assert planned([sequence("a", 10, num_computed=6)], 3) == [("a", 6, 9)]


def test_task_3_a_decode_computes_its_last_output() -> None:
    """Oracle: by hand: the prompt has 5 tokens, and only the last of 3 outputs is not computed yet."""
    assert planned([sequence("a", 5, num_computed=7, outputs=3)], 8) == [("a", 7, 8)]


def test_task_3_chunks_are_in_the_order_of_the_sequences() -> None:
    """Oracle: `share_budget` of [9, 1, 4, 1] and 8 tokens: [6, 1, 0, 1]; zero tokens make no chunk."""
    running = [
        sequence("long", 9),
        sequence("decode", 5, num_computed=5, outputs=1),
        sequence("short", 4),
        sequence("last", 3, num_computed=2),
    ]
    assert planned(running, 8) == [("long", 0, 6), ("decode", 5, 6), ("last", 2, 3)]


def test_task_3_a_sequence_that_waits_for_its_sampled_token_gets_no_chunk() -> None:
    """Oracle: by hand: all of its tokens are computed."""
    assert planned([sequence("a", 5, num_computed=5), sequence("b", 2)], 8) == [("b", 0, 2)]


def test_task_3_without_sequences_or_budget_the_plan_is_empty() -> None:
    """Oracle: by hand."""
    assert planned([], 8) == []
    assert planned([sequence("a", 5)], 0) == []
    assert plan_chunks([], 8).is_empty


def test_task_3_planning_does_not_modify_the_sequences() -> None:
    """Oracle: the docstring: a plan computes nothing. Common mistake: raising `num_computed`."""
    one = sequence("a", 5)
    plan = plan_chunks([one], 3)
    assert one.num_computed == 0
    assert plan.chunks[0].sequence is one
    assert planned([one], 3) == [("a", 0, 3)]


def test_task_3_a_prompt_with_prompt_logprobs_is_split_into_smaller_chunks() -> None:
    """Oracle: `batch_manager.tokens_wanted`: at most `MAX_PROMPT_ROWS` rows of logits in a step."""
    length = MAX_PROMPT_ROWS + 10
    assert planned([sequence("a", length, prompt_logprobs=0)], 1000) == [("a", 0, MAX_PROMPT_ROWS)]
    assert planned([sequence("a", length)], 1000) == [("a", 0, length)]


def test_task_3_every_token_is_planned_once_and_first_tokens_match_the_simulation() -> None:
    """Oracle: a list of the positions of each prompt, and `first_token_steps`."""
    prompt_lens, budget = [23, 4, 11, 1], 6
    running = [sequence(f"r{i}", length) for i, length in enumerate(prompt_lens)]
    planned_positions: list[list[int]] = [[] for _ in running]
    first_tokens = [0] * len(running)
    step = 0
    while 0 in first_tokens:
        step += 1
        plan = plan_chunks(running, budget)
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= budget
        for chunk in plan.chunks:
            i = running.index(chunk.sequence)
            planned_positions[i].extend(range(chunk.start, chunk.stop))
            chunk.sequence.num_computed = chunk.stop
            if chunk.is_last:
                first_tokens[i] = first_tokens[i] or step
                chunk.sequence.outputs.append(8)
    assert all(positions == list(range(len(positions))) for positions in planned_positions)
    assert first_tokens == first_token_steps(prompt_lens, budget)
