"""Speculative decoding: guesses, how many of them, and what becomes of them. That answers keep their bits is
tested with the other promises."""

from collections.abc import Sequence as Seq
from itertools import pairwise
from random import Random

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.engine_config import EngineConfig
from tiny_llm.layer_groups import group_layers
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.prompt_lookup import NO_GUESS, Guess, PromptLookup
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import Sequence
from tiny_llm.speculation import (
    FIRST_RATES,
    LEAST_GAIN,
    AcceptanceRates,
    Speculation,
    best_lengths,
    can_pay,
    num_accepted,
)
from tiny_llm.speculative_config import SpeculativeConfig
from tiny_llm.step_costs import ROWS, StepCosts, measure_step_costs

from guessing import FREE, guessing_llm
from tiny_llm import LLM, batch_manager
from tiny_llm_checkpoints.errors import ConfigError
from tiny_model import gemma_model, tiny_model

LINEAR = StepCosts.of([(1, 1.0), (64, 64.0)])  # each row costs a whole step

# Prompt lookup.


def guess_by_search(tokens: Seq[int], least: int, most: int, length: int) -> list[int]:
    """The oracle: search the whole text for the longest n-gram at its end, the latest place first."""
    for size in range(min(most, len(tokens)), least - 1, -1):
        gram = tokens[len(tokens) - size :]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == gram:
                text = list(tokens)
                for i in range(length):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    least=st.integers(1, 3),
    more=st.integers(0, 3),
    length=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_a_guess_continues_the_latest_place_of_the_longest_ngram(
    tokens: list[int], least: int, more: int, length: int, cuts: list[int]
) -> None:
    lookup, places = (
        PromptLookup(least, least + more),
        sorted({0, len(tokens), *(min(c, len(tokens)) for c in cuts)}),
    )
    for start, stop in pairwise(places):
        lookup.extend(tokens[start:stop])
    assert len(lookup) == len(tokens)
    assert lookup.guess(length).tokens == guess_by_search(tokens, least, least + more, length)


def test_the_match_of_a_guess_counts_equal_tokens_before_it_up_to_a_limit() -> None:
    lookup = PromptLookup(2, 3)
    lookup.extend([9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 4])
    assert lookup.guess(1) == Guess([5], match=4)  # 1 2 3 4; 9 and 8 differ
    lookup = PromptLookup(1, 1)
    lookup.extend([7] * 100)
    assert lookup.guess(2) == Guess([7, 7], match=32)


def test_an_empty_text_gives_no_guess() -> None:
    assert PromptLookup(1, 4).guess(5) == NO_GUESS


# What a step costs.


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6), st.integers(1, 200))
def test_costs_never_fall_with_more_rows(seconds: list[float], rows: int) -> None:
    costs = StepCosts.of([(row, second) for row, second in zip(ROWS, seconds, strict=False)])
    assert costs.of_step(rows) <= costs.of_step(rows + 1) + 1e-12


@given(
    seconds=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6),
    steps=st.lists(st.tuples(st.integers(1, 40), st.floats(0.0001, 10.0)), max_size=60),
    rows=st.integers(1, 100),
)
def test_costs_stay_in_order_while_steps_correct_them(
    seconds: list[float], steps: list[tuple[int, float]], rows: int
) -> None:
    costs = StepCosts.of(list(zip(ROWS, seconds, strict=False)))
    for num_rows, took in steps:
        costs.observe(num_rows, took)
    assert costs.seconds == sorted(costs.seconds)
    assert min(costs.seconds) > 0
    assert costs.of_step(rows) <= costs.of_step(rows + 1) + 1e-9


TRUE = StepCosts.of([(1, 1.0), (2, 1.0), (4, 2.0), (8, 4.0), (16, 8.0), (32, 16.0), (64, 32.0)])


@pytest.mark.parametrize(
    ("streams", "measured", "pays"),
    [
        (16, (4.0, 4.0, 6.0, 16.0, 30.0, 30.0, 90.0), False),
        (1, (1.0, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0), True),
    ],
)
def test_costs_that_were_measured_while_the_machine_was_busy_are_corrected_by_later_steps(
    streams: int, measured: Seq[float], pays: bool
) -> None:
    """Oracle: the true costs; all texts repeat themselves, and all guesses are right."""
    costs, random = StepCosts.of(list(zip(TRUE.rows, measured, strict=True))), Random(5)
    policy, text = Speculation(SpeculativeConfig(), costs), [*range(100, 140)] * 40
    sequences, drafted = [sequence_of(text[:80], [text[80]], max_len=9999) for _ in range(streams)], []
    for _ in range(320):
        drafts = policy.drafts(sequences, streams, 200)
        drafted.append(sum(map(len, drafts)))
        policy.observe(streams + drafted[-1], TRUE.of_step(streams + drafted[-1]) * random.uniform(0.9, 1.3))
        for sequence, draft in zip(sequences, drafts, strict=True):
            start = sequence.num_tokens
            sequence.outputs += text[start : start + len(draft) + 1]
    assert any(drafted[:15]) != pays, "the wrong costs decide at first"
    assert all(drafted[-15:]) == pays or sum(map(bool, drafted[-15:])) == (14 if pays else 1)


@pytest.mark.parametrize("make", [tiny_model, gemma_model])
def test_the_costs_of_a_models_steps_are_measured(make: type) -> None:
    model = make()
    layout = PageLayout(tuple(group_layers(model.config.windows)), 4, 64)
    costs = measure_step_costs(model, layout, mx.float16, max_rows=16)
    assert costs.rows == tuple(rows for rows in ROWS if rows <= 16)
    assert min(costs.seconds) > 0


# How many tokens are guessed.


def test_nothing_is_drafted_if_rows_cost_what_they_cost_alone() -> None:
    assert best_lengths([[1.0] * 8] * 3, 3, 64, LINEAR) == [0, 0, 0]


def test_everything_is_drafted_if_rows_are_free() -> None:
    assert best_lengths([[0.5] * 8, [0.2] * 3], 2, 64, FREE) == [8, 3]


def test_the_budget_goes_to_the_best_guesses() -> None:
    assert best_lengths([[0.9, 0.8, 0.7], [0.85, 0.1]], 2, 3, FREE) == [2, 1]


def test_no_budget_and_no_guesses_draft_nothing() -> None:
    assert best_lengths([[0.9]], 1, 0, FREE) == [0]
    assert best_lengths([[], []], 2, 8, FREE) == [0, 0]


@given(
    gains=st.lists(
        st.lists(st.floats(0, 1), max_size=5).map(lambda g: sorted(g, reverse=True)), min_size=1, max_size=4
    ),
    prompt_rows=st.integers(0, 30),
    budget=st.integers(0, 12),
    seconds=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
)
def test_the_lengths_give_most_tokens_a_second(
    gains: list[list[float]], prompt_rows: int, budget: int, seconds: list[float]
) -> None:
    """Oracle: every number of drafted tokens, each time the best of them."""
    costs = StepCosts.of(list(zip(ROWS, seconds, strict=False)))
    num_rows = len(gains) + prompt_rows
    lengths = best_lengths(gains, num_rows, budget, costs)
    assert sum(lengths) <= budget
    plain = len(gains) / costs.of_step(len(gains))

    def speed(gain: float, count: int) -> float:
        return (plain * costs.of_step(num_rows) + gain) / costs.of_step(num_rows + count)

    best = sorted((gain for of_one in gains for gain in of_one), reverse=True)[:budget]
    speeds = [speed(sum(best[:count]), count) for count in range(len(best) + 1)]
    found = speed(
        sum(sum(of_one[:length]) for of_one, length in zip(gains, lengths, strict=True)), sum(lengths)
    )
    fastest = max(speeds)
    assert found == pytest.approx(
        fastest if fastest > LEAST_GAIN * plain * 1.000001 else speeds[0], rel=1e-5
    ) or (fastest == pytest.approx(LEAST_GAIN * plain, rel=1e-5))


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    prompt_rows=st.integers(0, 30),
    budget=st.integers(0, 20),
    seconds=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
)
def test_if_nothing_can_pay_then_nothing_is_drafted(
    lengths: list[int], prompt_rows: int, budget: int, seconds: list[float]
) -> None:
    """And if something can, then it is: with right guesses of those lengths."""
    costs = StepCosts.of(list(zip(ROWS, seconds, strict=False)))
    num_rows, most = len(lengths) + prompt_rows, min(sum(lengths), budget)
    drafted = best_lengths([[1.0] * length for length in lengths], num_rows, budget, costs)
    assert can_pay(len(lengths), num_rows, most, costs) == any(drafted)


def test_rates_of_long_matches_are_learned_apart_from_those_of_short_ones() -> None:
    rates = AcceptanceRates()
    for _ in range(40):
        rates.observe(Guess([5], match=2), [6])
        rates.observe(Guess([5], match=20), [5])
    [short], [long] = rates.gains(Guess([5], match=2)), rates.gains(Guess([5], match=20))
    assert short < 0.01
    assert long > 0.99
    assert AcceptanceRates().gains(Guess([5], match=2)) == [FIRST_RATES[2]]


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_accepted_guesses_are_the_common_prefix(draft: list[int], drawn: list[int]) -> None:
    count = num_accepted(draft, drawn)
    assert draft[:count] == drawn[:count]
    assert count == min(len(draft), len(drawn)) or draft[count] != drawn[count]


def sequence_of(prompt: Seq[int], outputs: Seq[int], max_len: int = 100) -> Sequence:
    params = SamplingParams()
    made = Sequence(seq_id="s", request_id="s", prompt=tuple(prompt), params=params, seed=0, max_len=max_len)
    made.outputs += outputs
    return made


def test_a_sequence_that_copies_drafts_more_and_one_that_stops_copying_drafts_nothing() -> None:
    dear = StepCosts.of([(1, 1.0), (9, 3.4)])  # a row costs 0.3 steps
    policy, text = Speculation(SpeculativeConfig(), dear), list(range(100, 160))
    sequence, lengths = sequence_of(text, text[:4]), []
    for token in text[4:30]:
        [draft] = policy.drafts([sequence], 1, 63)
        lengths.append(len(draft))
        sequence.outputs.append(token)
    assert lengths[-1] == 7
    for token in range(1000, 1060, 2):  # two known tokens, then a new one: every guess is wrong
        [draft] = policy.drafts([sequence], 1, 63)
        lengths.append(len(draft))
        sequence.outputs += [100, 101, token]
    assert lengths[-1] == 0


def test_a_draft_never_exceeds_the_sequences_length_limit() -> None:
    policy = Speculation(SpeculativeConfig(num_speculative_tokens=20), FREE)
    [draft] = policy.drafts([sequence_of([1, 2, 3] * 6, [1, 2], max_len=24)], 1, 63)
    assert draft == [3, 1, 2]  # and the token after them is the 24th


# In the batch manager.


class Always:
    """Drafts the same tokens for every sequence."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.observed: list[int] = []

    def drafts(self, decodes: Seq[Sequence], num_rows: int, max_drafted: int) -> list[tuple[int, ...]]:
        return [self.tokens[:max_drafted] for _ in decodes]

    def observe(self, num_rows: int, seconds: float) -> None:
        self.observed.append(num_rows)


def decoding(drafting: Always, **options: int) -> PagedBatchManager:
    """A manager without a model, with one sequence of 6 tokens that has its first output."""
    manager = PagedBatchManager(
        options.get("pages", 8), 4, 2, max_batched_tokens=options.get("budget", 16),
        policies=Policies(prefix=PrefixSharing, drafting=drafting), max_model_len=32,
    )  # fmt: skip
    manager.add_request([1, 2, 3, 4, 5, 6], "a", SamplingParams(max_tokens=options.get("max_tokens", 20)))
    while not manager.process_batch():
        pass
    manager.commit({"a": 7})
    return manager


def test_a_drafts_rows_follow_the_sequences_own() -> None:
    manager = decoding(Always(8, 9, 10))
    logits = manager.process_batch()
    [chunk] = manager.last_plan.chunks
    assert (chunk.start, chunk.stop, chunk.logit_positions) == (6, 10, [6, 7, 8, 9])
    assert (logits.row_of, logits.num_tokens) == ({"a": 0}, 4)
    assert manager.last_plan.pack() == ([7, 8, 9, 10], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("tokens", "computed", "free"), [([5], 7, 6), ([8, 5], 8, 6), ([8, 9, 10, 11], 10, 5)]
)
def test_rejected_guesses_give_their_pages_back_in_the_same_step(
    tokens: list[int], computed: int, free: int
) -> None:
    manager = decoding(Always(8, 9, 10))
    manager.process_batch()
    assert manager.allocator.num_free == 5
    for token in tokens:
        manager.commit({"a": token})
    manager.settle_drafts(1.0)
    sequence = manager.sequence("a")
    assert (sequence.num_computed, sequence.table.num_tokens, sequence.draft) == (computed, computed, [])
    assert manager.allocator.num_free == free
    assert manager.draft_stats[:3] == (1, 3, len(tokens) - 1)


def test_a_draft_takes_only_what_the_budget_and_the_pages_leave() -> None:
    manager = decoding(Always(*range(8, 18)), budget=5)
    manager.process_batch()
    assert len(manager.sequence("a").draft) == 4
    manager = decoding(Always(*range(8, 18)), pages=2, max_tokens=2)
    manager.process_batch()
    assert len(manager.sequence("a").draft) == 1  # position 7 is the last one of two blocks of 4


def test_a_sequence_that_ends_within_its_draft_frees_everything() -> None:
    manager = decoding(Always(8, 9, 10))
    manager.process_batch()
    manager.commit({"a": 8})
    manager.finish("a")
    manager.settle_drafts(1.0)
    assert manager.allocator.num_free + manager.prefix.num_idle == 8


def test_only_the_time_of_steps_without_prompts_is_observed() -> None:
    drafting = Always(8, 9, 10)
    manager = decoding(drafting, pages=20)
    manager.settle_drafts(1.0)
    assert drafting.observed == []
    manager.process_batch()
    manager.commit({"a": 8})
    manager.settle_drafts(1.0)
    assert drafting.observed == [4]
    manager.add_request([1, 2, 3], "b", SamplingParams(max_tokens=2))
    manager.process_batch()
    for seq_id in "ab":
        manager.commit({seq_id: 1})
    manager.settle_drafts(1.0)
    assert drafting.observed == [4]


def test_the_last_draft_of_a_sequence_counts_too() -> None:
    manager = decoding(Always(8, 9, 10))
    manager.process_batch()
    for token in (8, 9, 5):
        manager.commit({"a": token})
    manager.finish("a")
    manager.settle_drafts(1.0)
    assert manager.draft_stats == batch_manager.DraftStats(1, 3, 2, (1, 1))
    manager.settle_drafts(1.0)
    assert manager.draft_stats.num_drafts == 1


def test_a_policy_without_decodes_drafts_nothing() -> None:
    policy = Speculation(SpeculativeConfig(), FREE)
    assert [policy.drafts([], 3, 9) for _ in range(40)] == [[]] * 40


def test_a_common_slowdown_hardly_changes_the_ratios_of_costs() -> None:
    """A longer context makes every step slower; only steps of one row are seen."""
    costs = StepCosts.of([(1, 1.0), (2, 1.2), (4, 2.0), (8, 4.0)])
    for _ in range(100):
        costs.observe(1, 3.0)
    assert costs.of_step(8) / costs.of_step(1) == pytest.approx(4, rel=0.3)


def test_counts_of_drafts_are_also_kept_by_position() -> None:
    stats = batch_manager.DraftStats().plus(3, 2).plus(2, 0).plus(1, 1)
    assert stats == batch_manager.DraftStats(3, 6, 3, (2, 1))


# Options.


def test_the_ngrams_sizes_follow_each_other() -> None:
    assert SpeculativeConfig().ngram_sizes == (2, 4)
    assert SpeculativeConfig(prompt_lookup_max=5).ngram_sizes == (5, 5)
    assert SpeculativeConfig(prompt_lookup_min=3).ngram_sizes == (3, 3)
    assert SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=6).ngram_sizes == (1, 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "eagle"}, "method must be 'ngram', not 'eagle'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be a whole number from 1 to 64, not 0"),
        (
            {"num_speculative_tokens": True},
            "num_speculative_tokens must be a whole number from 1 to 64, not True",
        ),
        ({"num_speculative_tokens": 65}, "not 65"),
        ({"prompt_lookup_max": 33}, "prompt_lookup_max must be a whole number from 1 to 32, not 33"),
        ({"prompt_lookup_min": 0}, "prompt_lookup_min must be a whole number from 1 to 32, not 0"),
        (
            {"prompt_lookup_min": 4, "prompt_lookup_max": 2},
            "prompt_lookup_min .4. exceeds prompt_lookup_max .2.",
        ),
        ({"num_speculative_token": 4}, "did you mean num_speculative_tokens"),
        ([], "must be a mapping"),
        ({1: 2}, "must be a mapping"),
        ("ngram", "must be a mapping"),
    ],
)
def test_wrong_options_are_refused_by_name(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_options(speculative_config=given)


def test_dense_batching_refuses_speculation() -> None:
    with pytest.raises(ConfigError, match="speculative_config needs batching='paged'"):
        EngineConfig(speculative_config={}, batching="dense")


# In the engine.


def test_a_stop_string_within_a_draft_ends_the_answer_there() -> None:
    """The other completion goes on; nothing after the stop string is delivered."""
    text = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10. " * 3
    params = SamplingParams(temperature=0, max_tokens=24, n=2, stop=["5, 6"], logprobs=1)
    with LLM() as plain, guessing_llm() as guessing:
        [expected], [got] = plain.generate(text, params), guessing.generate(text, params)
        drafts = guessing.engine.stats.drafts
    assert got.outputs == expected.outputs
    assert got.outputs[0].finish_reason == "stop"
    assert drafts.num_accepted_tokens > 0
