"""share_budget: a pure function of counts; each test is one sentence of its contract."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.chunked_prefill import share_budget

wants_lists = st.lists(st.integers(0, 50), max_size=12)
budgets = st.integers(0, 200)


@given(wants_lists, budgets)
def test_no_share_exceeds_its_want_and_the_sum_of_shares_is_within_the_budget(
    wants: list[int], budget: int
) -> None:
    granted = share_budget(wants, budget)
    assert len(granted) == len(wants)
    assert all(0 <= grant <= want for grant, want in zip(granted, wants, strict=True))
    assert sum(granted) == min(budget, sum(wants)), "budget is left over while a sequence wants more"


@given(wants_lists, budgets)
def test_no_prompt_runs_while_a_decode_gets_nothing(wants: list[int], budget: int) -> None:
    granted = share_budget(wants, budget)
    decodes = [grant for grant, want in zip(granted, wants, strict=True) if want == 1]
    prompts = [grant for grant, want in zip(granted, wants, strict=True) if want > 1]
    assert all(decodes) or not any(prompts)


@given(wants_lists, budgets)
def test_a_prompt_gets_tokens_only_after_all_earlier_ones_are_fully_served(
    wants: list[int], budget: int
) -> None:
    prompts = [(g, w) for g, w in zip(share_budget(wants, budget), wants, strict=True) if w > 1]
    for (earlier, wanted), (later, _) in itertools.pairwise(prompts):
        assert earlier == wanted or later == 0


def test_a_long_prompt_is_chunked_when_decodes_run_too() -> None:
    assert share_budget([100, 1, 30, 1], 64) == [62, 1, 0, 1]


@pytest.mark.parametrize(("wants", "budget"), [([1], -1), ([-2], 5)])
def test_negative_counts_are_rejected(wants: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match=str(min(budget, *wants))):
        share_budget(wants, budget)
