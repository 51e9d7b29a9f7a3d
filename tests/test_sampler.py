"""The sampler, one row at a time, against a plain NumPy reference in float64, and its draws by chi-square."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_llm.sampler import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    sample_token,
    uniform,
)
from tiny_llm.sampling_params import SamplingParams

from tiny_model import examples

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0]


def random_logits(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def allowed(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, float]:
    """The reference: tokens that survive temperature, min-p, top-k and top-p, in this order.

    Also how near the nearest decision was, so that a test can leave out what float32 may decide otherwise.
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
        likeliest = [i for i in np.argsort(-logits) if kept[i]]
        total, nucleus = 0.0, []
        for i in likeliest:
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
def test_a_drawn_token_is_one_that_the_filters_leave(params: SamplingParams, seed: int) -> None:
    logits = random_logits(seed)
    kept, margin = allowed(logits, params)
    assume(margin > 1e-4 or (params.min_p == 1.0 and params.top_p == 1.0))
    for index in range(5):
        assert kept[sample_token(mx.array(logits), params, seed, index).item()]


@settings(max_examples=examples(60))
@given(filters, st.integers(0, 2**32))
def test_every_token_that_the_filters_leave_can_be_drawn(params: SamplingParams, seed: int) -> None:
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
    assert kept_by(keep_top_p(row, 0.76)) == [True, True, True, True], "tokens as likely as the last one stay"


def test_top_p_keeps_the_likeliest_token_however_small_p_is() -> None:
    assert kept_by(keep_top_p(mx.array(LOGITS), 1e-12)) == [True, False, False, False, False, False]


def test_top_p_never_brings_a_masked_token_back() -> None:
    row = mx.array([1.0, 0.5, -mx.inf, -mx.inf])
    assert kept_by(keep_top_p(row, 0.99999999)) == [True, True, False, False]


def test_min_p_keeps_what_is_at_least_that_fraction_of_the_likeliest() -> None:
    row = mx.log(mx.array([0.6, 0.29, 0.11]))
    assert kept_by(keep_min_p(row, 0.4)) == [True, True, False]
    assert kept_by(keep_min_p(row, 1.0)) == [True, False, False]


def test_filters_leave_the_kept_logits_as_they_are() -> None:
    for row in (
        keep_top_k(mx.array(LOGITS), 3),
        keep_top_p(mx.array(LOGITS), 0.8),
        keep_min_p(mx.array(LOGITS), 0.2),
    ):
        kept = [value for value in row.tolist() if math.isfinite(value)]
        assert kept == LOGITS[: len(kept)]


@given(st.integers(0, 2**32), st.integers(0, 2**40), st.integers(0, 1000))
def test_temperature_zero_takes_the_likeliest_whatever_the_filters_and_the_seed(
    row_seed: int, seed: int, index: int
) -> None:
    logits = random_logits(row_seed)
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1)
    assert sample_token(mx.array(logits), params, seed, index).item() == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    row = mx.array([0.0, 300.0, 299.0, -50.0])
    assert sample_token(row, SamplingParams(temperature=temperature), 1, 0).item() == 1


def test_a_huge_temperature_draws_evenly() -> None:
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


def test_draws_after_top_k_and_top_p_are_renormalised() -> None:
    row, params = mx.array(LOGITS), SamplingParams(top_k=4, top_p=0.9)
    drawn = [sample_token(row, params, 3, i).item() for i in range(3000)]
    kept, _ = allowed(np.array(LOGITS), params)
    assert kept.tolist() == [True, True, True, False, False, False]
    expected = probabilities(np.array(LOGITS)[kept])
    assert chi_square(drawn, expected) < 13.9, "2 degrees of freedom: once in a thousand times"


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    row = mx.array([-mx.inf, 0.0, -mx.inf, 0.0, -mx.inf])
    assert {draw(row, 2, index).item() for index in range(500)} == {1, 3}


@given(st.integers(0, 2**70), st.integers(0, 10_000))
def test_uniform_is_a_pure_function_of_seed_and_index(seed: int, index: int) -> None:
    number = uniform(seed, index).item()
    assert 0 <= number < 1
    mx.random.seed(seed % 1000)
    mx.random.uniform()
    assert uniform(seed, index).item() == number


def test_uniform_differs_between_neighbouring_seeds_and_indices() -> None:
    numbers = {uniform(seed, index).item() for seed in range(30) for index in range(30)}
    assert len(numbers) > 890, "float32 leaves room for a collision or two among 900"


def test_log_probabilities_are_those_of_the_logits_before_any_filter() -> None:
    logits = random_logits(9)
    expected = np.log(probabilities(logits))
    np.testing.assert_allclose(np.array(log_probabilities(mx.array(logits))), expected, rtol=0, atol=2e-6)
