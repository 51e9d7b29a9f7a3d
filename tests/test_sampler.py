"""The sampler, row by row. Oracle: a NumPy reference in float64; draws are compared by a chi-square test."""

import math
import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_llm.kernels import twins
from tiny_llm.sampler import (
    add_bias,
    adjust_logits,
    draw,
    forbid,
    keep_allowed,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    penalize_output,
    penalize_repetition,
    sample_token,
    uniform,
)
from tiny_llm.sampling_params import SamplingParams

from tiny_llm import sampler
from tiny_model import examples

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0]


def random_logits(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def allowed(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, float]:
    """Return which tokens remain after temperature, min-p, top-k and top-p, in this order (the reference).

    Also return how close the closest threshold was: float32 may decide a very close case differently, so a
    test can skip it.
    """
    logits = logits.astype(np.float64) / params.temperature
    kept, margin = np.ones(len(logits), bool), 1.0
    if params.min_p > 0:
        ratio = probabilities(logits) / probabilities(logits).max()
        kept, margin = ratio >= params.min_p, min(margin, float(np.abs(ratio - params.min_p).min()))
        logits = np.where(kept, logits, -np.inf)
    if params.top_k > 0:
        kept &= logits >= np.sort(logits)[::-1][min(params.top_k, len(logits)) - 1]
        logits = np.where(kept, logits, -np.inf)
    if params.top_p < 1:
        by_probability = [i for i in np.argsort(-logits) if kept[i]]
        total, nucleus = 0.0, []
        for i in by_probability:
            margin = min(margin, abs(total - params.top_p))
            if total < params.top_p:
                nucleus.append(i)
            total += probabilities(logits)[i]
        kept = np.isin(np.arange(len(logits)), nucleus)
    return kept, margin


def kept_by(row: mx.array) -> list[bool]:
    return [math.isfinite(value) for value in row.tolist()]


filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 10, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)


@settings(max_examples=examples(150))
@given(filters, st.integers(0, 2**32))
def test_only_tokens_that_the_filters_keep_are_drawn(params: SamplingParams, seed: int) -> None:
    logits = random_logits(seed)
    kept, margin = allowed(logits, params)
    assume(margin > 1e-4 or (params.min_p == 1.0 and params.top_p == 1.0))
    for index in range(5):
        assert kept[sample_token(mx.array(logits), params, seed, index).item()]


@settings(max_examples=examples(60))
@given(filters, st.integers(0, 2**32))
def test_every_token_that_the_filters_keep_can_be_drawn(params: SamplingParams, seed: int) -> None:
    logits = random_logits(seed, size=6) / 3
    kept, margin = allowed(logits, params)
    assume(margin > 1e-4)
    assume((probabilities(logits / params.temperature)[kept] > 0.05).all())
    drawn = {sample_token(mx.array(logits), params, seed, index).item() for index in range(250)}
    assert drawn == set(np.flatnonzero(kept).tolist())


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_top_k_keeps_the_k_largest(seed: int, k: int) -> None:
    logits = random_logits(seed)
    expected = set(np.argsort(-logits)[:k].tolist())
    assert {i for i, kept in enumerate(kept_by(keep_top_k(mx.array(logits), k))) if kept} == expected


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    row = mx.log(mx.array([0.5, 0.25, 0.125, 0.125]))
    assert kept_by(keep_top_p(row, 0.4)) == [True, False, False, False]
    assert kept_by(keep_top_p(row, 0.51)) == [True, True, False, False]
    assert kept_by(keep_top_p(row, 0.76)) == [True, True, True, True], (
        "tokens as likely as the last kept one are kept too"
    )


def test_top_p_keeps_the_most_likely_token_for_any_small_p() -> None:
    assert kept_by(keep_top_p(mx.array(LOGITS), 1e-12)) == [True, False, False, False, False, False]


def test_top_p_keeps_masked_tokens_masked() -> None:
    row = mx.array([1.0, 0.5, -mx.inf, -mx.inf])
    assert kept_by(keep_top_p(row, 0.99999999)) == [True, True, False, False]


def test_min_p_keeps_tokens_with_at_least_that_fraction_of_the_largest_probability() -> None:
    row = mx.log(mx.array([0.6, 0.29, 0.11]))
    assert kept_by(keep_min_p(row, 0.4)) == [True, True, False]
    assert kept_by(keep_min_p(row, 1.0)) == [True, False, False]


def test_filters_do_not_change_the_logits_that_they_keep() -> None:
    for row in (
        keep_top_k(mx.array(LOGITS), 3),
        keep_top_p(mx.array(LOGITS), 0.8),
        keep_min_p(mx.array(LOGITS), 0.2),
    ):
        kept = [value for value in row.tolist() if math.isfinite(value)]
        assert kept == LOGITS[: len(kept)]


@given(st.integers(0, 2**32), st.integers(0, 2**40), st.integers(0, 1000))
def test_temperature_zero_takes_the_most_likely_token_with_any_filters_and_seed(
    row_seed: int, seed: int, index: int
) -> None:
    logits = random_logits(row_seed)
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1)
    assert sample_token(mx.array(logits), params, seed, index).item() == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e-3])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    row = mx.array([0.0, 300.0, 299.0, -50.0])
    assert sample_token(row, SamplingParams(temperature=temperature), 1, 0).item() == 1


def test_a_huge_temperature_draws_all_tokens_equally_often() -> None:
    drawn = [
        sample_token(mx.array(LOGITS), SamplingParams(temperature=1e30), 5, i).item() for i in range(600)
    ]
    assert chi_square(drawn, np.full(6, 1 / 6)) < 20.5


def chi_square(drawn: list[int], expected: np.ndarray) -> float:
    """Pearson's statistic; with 5 degrees of freedom it exceeds 20.5 once in a thousand times."""
    counts = np.bincount(drawn, minlength=len(expected))
    return float(((counts - len(drawn) * expected) ** 2 / (len(drawn) * expected)).sum())


@pytest.mark.parametrize("vary", ["index", "seed"])
def test_draws_have_the_distribution_of_the_softmax(vary: str) -> None:
    row = mx.array(LOGITS)
    pairs = [(17, i) if vary == "index" else (i, 4) for i in range(3000)]
    drawn = [draw(row, seed, index).item() for seed, index in pairs]
    assert chi_square(drawn, probabilities(np.array(LOGITS))) < 20.5


def chi_square_limit(degrees: int) -> float:
    """Return the chi-square value that is exceeded once in a million times (Wilson and Hilferty, 1931)."""
    ninth, quantile = 2 / (9 * degrees), 4.7534  # of the normal distribution, at 1 - 1e-6
    return float(degrees * (1 - ninth + quantile * ninth**0.5) ** 3)


def is_fair(params: SamplingParams, num_draws: int) -> bool:
    """Return whether `num_draws` draws have the distribution that NumPy computes for the parameters."""
    logits, prompt, outputs = random_logits(21, size=16), [1, 2, 3], [2, 2, 4]
    adjusted = reference_adjusted(logits, params, prompt, outputs)
    kept, margin = allowed(adjusted, params)
    assert margin > 1e-3
    row = adjust_logits(mx.array(logits), params, prompt, outputs, ())
    drawn = [sample_token(row, params, 3, index).item() for index in range(num_draws)]
    assert set(drawn) <= set(np.flatnonzero(kept).tolist())
    expected = probabilities(adjusted[kept] / params.temperature)
    counts = np.bincount(drawn, minlength=len(logits))[kept]
    common = (
        expected * num_draws >= 5
    )  # chi-square needs 5 expected draws per class; rarer tokens form one class
    classes = [
        (counts[common], expected[common]),
        (counts[~common].sum()[None], expected[~common].sum()[None]),
    ]
    statistic = sum(
        float(((found - num_draws * share) ** 2 / np.maximum(num_draws * share, 1e-9)).sum())
        for found, share in classes
    )
    return statistic < chi_square_limit(max(1, int(common.sum())))


DISTRIBUTIONS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.7),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.8),
    "min-p": SamplingParams(min_p=0.1),
    "all filters": SamplingParams(temperature=1.3, min_p=0.02, top_k=9, top_p=0.9),
    "penalties": SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5, repetition_penalty=1.4),
    "bias": SamplingParams(logit_bias={0: 2.0, 5: -100.0}),
}


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_draws_have_the_distribution_that_the_parameters_describe(params: SamplingParams) -> None:
    assert is_fair(params, 4000)


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_draws_of_the_sampler_without_kernels_have_the_same_distribution(params: SamplingParams) -> None:
    with twins():
        assert is_fair(params, 4000)


def test_the_distribution_test_detects_a_biased_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, index: uniform(seed, index) ** 1.15)
    assert not is_fair(SamplingParams(), 4000)


def test_the_distribution_test_detects_a_missing_renormalization(monkeypatch: pytest.MonkeyPatch) -> None:
    """If top-p used the probabilities before top-k, it would keep too many tokens."""
    monkeypatch.setattr(sampler, "keep_top_k", lambda logits, k: logits)
    with twins(), pytest.raises(AssertionError):
        is_fair(SamplingParams(top_k=5), 4000)


# Adjustments of the logits before the draw: biases, forbidden tokens, penalties.


def reference_adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    outputs: list[int],
    ends: tuple[int, ...] = (),
) -> np.ndarray:
    """vLLM's definitions in float64, token by token."""
    adjusted = logits.astype(np.float64)
    for token in range(len(adjusted)):
        if len(outputs) < params.min_tokens and token in ends:
            adjusted[token] = -np.inf
        adjusted[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in outputs:
            factor = params.repetition_penalty
            adjusted[token] = adjusted[token] / factor if adjusted[token] > 0 else adjusted[token] * factor
        adjusted[token] -= params.frequency_penalty * outputs.count(token)
        adjusted[token] -= params.presence_penalty * (token in outputs)
    return adjusted


adjustments = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.5]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 23), st.floats(-100, 100, width=32), max_size=4),
    min_tokens=st.integers(0, 5),
)
some_tokens = st.lists(st.integers(0, 23), max_size=12)


@settings(max_examples=examples(300))
@given(adjustments, some_tokens, some_tokens, st.sets(st.integers(0, 23), max_size=3), st.integers(0, 2**32))
def test_adjusted_logits_match_the_reference(
    params: SamplingParams, prompt: list[int], outputs: list[int], ends: set[int], seed: int
) -> None:
    logits = random_logits(seed)
    row = mx.array(logits)
    adjusted = adjust_logits(row, params, prompt, outputs, ends)
    expected = reference_adjusted(logits, params, prompt, outputs, tuple(ends))
    np.testing.assert_allclose(np.array(adjusted), expected, rtol=1e-6, atol=1e-5)
    assert np.array_equal(np.array(row), logits), (
        "the row itself must not change: log-probabilities are computed from it"
    )


@settings(max_examples=examples(100))
@given(st.integers(1, 100), st.integers(0, 2**32))
def test_only_the_allowed_tokens_keep_their_logits(vocab_size: int, seed: int) -> None:
    """Bits after the last token have no meaning."""
    rng = np.random.default_rng(seed)
    allowed = rng.random(-(-vocab_size // 32) * 32) < 0.5
    words = mx.array(np.packbits(allowed, bitorder="little").view(np.int32))
    logits = rng.standard_normal(vocab_size).astype(np.float32)
    kept = np.array(keep_allowed(mx.array(logits), words))
    assert np.array_equal(kept, np.where(allowed[:vocab_size], logits, -np.inf))


def test_without_adjustments_the_same_array_is_returned() -> None:
    row = mx.array(LOGITS)
    assert adjust_logits(row, SamplingParams(), [1], [2], [3]) is row


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: forbid(row, [0, 5]), [-np.inf, 1.0, 0.5, 0.0, -1.0, -np.inf]),
        (lambda row: add_bias(row, {1: -100.0, 4: 1.5}), [2.0, -99.0, 0.5, 0.0, 0.5, -2.0]),
        (lambda row: penalize_repetition(row, [0, 0, 3, 4], 2.0), [1.0, 1.0, 0.5, 0.0, -2.0, -2.0]),
        (lambda row: penalize_output(row, [0, 0, 4], 0.5, 0.25), [0.75, 1.0, 0.5, 0.0, -1.75, -2.0]),
    ],
)
def test_each_adjustment_gives_the_values_computed_by_hand(change: object, expected: list[float]) -> None:
    assert change(mx.array(LOGITS)).tolist() == expected  # type: ignore[operator]


def test_a_frequency_penalty_keeps_greedy_output_from_repeating_one_token() -> None:
    row, outputs = mx.array([1.0, 0.9, 0.8, 0.7]), []
    params = SamplingParams(temperature=0.0, frequency_penalty=0.15)
    for _ in range(8):
        adjusted = adjust_logits(row, params, [], outputs, ())
        outputs.append(sample_token(adjusted, params, 0, len(outputs)).item())
    assert set(outputs) == {0, 1, 2, 3}


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    row = mx.array([-mx.inf, 0.0, -mx.inf, 0.0, -mx.inf])
    assert {draw(row, 2, index).item() for index in range(500)} == {1, 3}


@given(st.integers(0, 2**70), st.integers(0, 10_000))
def test_uniform_is_a_pure_function_of_seed_and_index(seed: int, index: int) -> None:
    number = uniform(seed, index)
    assert 0 <= number < 1
    random.seed(seed % 1000)
    random.random()
    assert uniform(seed, index) == number


def test_uniform_differs_for_adjacent_seeds_and_indices() -> None:
    assert len({uniform(seed, index) for seed in range(30) for index in range(30)}) == 900


def test_uniform_is_evenly_distributed_over_adjacent_seeds_and_indices() -> None:
    for numbers in ([uniform(seed, 0) for seed in range(6000)], [uniform(7, index) for index in range(6000)]):
        sixths = [int(6 * number) for number in numbers]
        assert chi_square(sixths, np.full(6, 1 / 6)) < 20.5


def test_log_probabilities_are_the_log_softmax_of_the_row() -> None:
    logits = random_logits(9)
    expected = np.log(probabilities(logits))
    np.testing.assert_allclose(np.array(log_probabilities(mx.array(logits))), expected, rtol=0, atol=2e-6)


def test_log_probabilities_are_accurate_with_a_large_vocabulary() -> None:
    """A single float32 sum over the row, as in `mx.logsumexp`, has an error of 1e-4 here."""
    logits = random_logits(3, size=49_152) * 3
    for row in (logits, logits[:49_151], logits - 50, logits + 50):
        found = np.array(log_probabilities(mx.array(row)))
        expected = row - row.max() - np.log(np.exp((row - row.max()).astype(np.float64)).sum())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
