"""Day 2.6: how one step's budget of tokens is shared among the sequences that want to run.

When it passes, you have the rule by which a long prompt is computed in chunks beside the decodes of everybody
else, and holds none of them up.
"""

from itertools import pairwise

import numpy as np
import pytest
from tiny_llm.chunked_prefill import share_budget

# Task 1: share_budget


def test_task_1_who_can_be_served_whole_is() -> None:
    """Oracle: by hand: 1 + 5 + 1 tokens fit into 10."""
    assert share_budget([1, 5, 1], 10) == [1, 5, 1]


def test_task_1_a_prompt_that_is_too_long_gets_a_chunk() -> None:
    """Oracle: by hand."""
    assert share_budget([100], 64) == [64]


def test_task_1_decodes_are_served_before_prompts_that_came_earlier() -> None:
    """Oracle: by hand: of 8 tokens 2 are for the decodes. Serving in the order given is the mistake."""
    assert share_budget([100, 1, 1], 8) == [6, 1, 1]


def test_task_1_answers_stand_in_the_order_of_the_wants() -> None:
    """Oracle: by hand: not in the order of serving."""
    assert share_budget([100, 1, 30, 1], 64) == [62, 1, 0, 1]
    assert share_budget([1, 7, 0, 1, 2], 10) == [1, 7, 0, 1, 1]


def test_task_1_prompts_are_served_first_come_first_served() -> None:
    """Oracle: by hand: 5 and 3 are served whole, and 2 are left for the last one."""
    assert share_budget([5, 3, 4], 10) == [5, 3, 2]


def test_task_1_a_short_prompt_does_not_overtake_a_long_one() -> None:
    """Oracle: by hand: nothing is left. Filling up with what fits, or equal shares, are the mistakes."""
    assert share_budget([10, 2], 5) == [5, 0]
    assert share_budget([4, 10, 3], 8) == [4, 4, 0]


def test_task_1_two_tokens_are_a_prompt_and_one_is_a_decode() -> None:
    """Oracle: by hand: the last token of a prompt's chunks is served like a decode."""
    assert share_budget([2, 1], 1) == [0, 1]
    assert share_budget([2, 2, 1], 4) == [2, 1, 1]


def test_task_1_decodes_beyond_the_budget_wait() -> None:
    """Oracle: by hand: first come, first served among the decodes too."""
    assert share_budget([1, 1, 1], 2) == [1, 1, 0]
    assert share_budget([3, 1, 1], 1) == [0, 1, 0]


def test_task_1_nothing_is_wanted() -> None:
    """Oracle: by hand: nobody gets what nobody wants."""
    assert share_budget([], 16) == []
    assert share_budget([0, 0], 16) == [0, 0]
    assert share_budget([0, 1, 0, 2], 16) == [0, 1, 0, 2]


def test_task_1_nothing_is_left() -> None:
    """Oracle: by hand."""
    assert share_budget([1, 7, 0], 0) == [0, 0, 0]


def test_task_1_a_budget_that_is_just_enough() -> None:
    """Oracle: by hand: and one token less is missing at the end of the last prompt."""
    assert share_budget([4, 1, 3], 8) == [4, 1, 3]
    assert share_budget([4, 1, 3], 7) == [4, 1, 2]


@pytest.mark.parametrize(
    ("wants", "budget"), [([1, 5], -1), ([], -1), ([-1], 5), ([3, 1, -2], 5), ([-2, 9], 0)]
)
def test_task_1_negative_numbers_are_refused(wants: list[int], budget: int) -> None:
    """Oracle: the docstring. Counting a negative want as a prompt gives tokens that nobody has."""
    with pytest.raises(ValueError):
        share_budget(wants, budget)


def test_task_1_what_is_given_is_not_changed() -> None:
    """Oracle: the docstring of the module: a pure function: the same again for the same counts."""
    wants = [9, 1, 4]
    assert share_budget(wants, 6) == share_budget(wants, 6) == [5, 1, 0]
    assert wants == [9, 1, 4]
    assert share_budget(tuple(wants), 6) == [5, 1, 0]


def random_cases() -> list[tuple[list[int], int]]:
    """Wants and budgets of every kind: many decodes, many prompts, too little, more than enough."""
    rng = np.random.default_rng(21)
    cases = []
    for _ in range(3000):
        most = int(rng.choice([1, 2, 3, 20]))
        wants = rng.integers(0, most + 1, size=int(rng.integers(0, 10))).tolist()
        cases.append((wants, int(rng.integers(0, sum(wants) + 5))))
    return cases


def test_task_1_nobody_gets_more_than_wanted_and_all_together_no_more_than_the_budget() -> None:
    """Oracle: the docstring, over random cases. And everything is used while somebody wants it."""
    for wants, budget in random_cases():
        granted = share_budget(wants, budget)
        assert len(granted) == len(wants), (wants, budget)
        assert all(0 <= count <= want for count, want in zip(granted, wants, strict=True)), (wants, budget)
        assert sum(granted) == min(budget, sum(wants)), (wants, budget)


def test_task_1_no_prompt_gets_anything_while_a_decode_waits() -> None:
    """Oracle: the docstring, over random cases; and of the decodes it is the last ones that wait."""
    for wants, budget in random_cases():
        granted = share_budget(wants, budget)
        decodes = [count for count, want in zip(granted, wants, strict=True) if want == 1]
        prompts = [count for count, want in zip(granted, wants, strict=True) if want > 1]
        assert all(decodes) or not any(prompts), (wants, budget)
        assert decodes == sorted(decodes, reverse=True), (wants, budget)


def test_task_1_a_prompt_gets_nothing_while_an_earlier_one_is_cut_short() -> None:
    """Oracle: the docstring, over random cases."""
    for wants, budget in random_cases():
        pairs = zip(share_budget(wants, budget), wants, strict=True)
        prompts = [(count, want) for count, want in pairs if want > 1]
        for (earlier, wanted), (later, _) in pairwise(prompts):
            assert earlier == wanted or later == 0, (wants, budget)


def test_task_1_tokens_handed_out_one_by_one_end_in_the_same_places() -> None:
    """Oracle: a slow loop: each token goes to the first decode that has none, else to the first prompt."""
    for wants, budget in random_cases():
        slowly = [0] * len(wants)
        for _ in range(budget):
            open_wants = [i for i, want in enumerate(wants) if slowly[i] < want]
            if open_wants:
                slowly[min(open_wants, key=lambda i: (wants[i] > 1, i))] += 1
        assert share_budget(wants, budget) == slowly, (wants, budget)
