"""Day 1.7: from logits to a token.

When these tests pass, you have the filters, the penalties and the draw of a sampler whose tokens never depend
on the other requests in a batch, and the log-probabilities that are reported with them.
"""

from collections.abc import Callable, Iterable

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.sampler import (
    change_logits,
    draw,
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

from common.numpy_oracles import numpy_softmax

INF = float("inf")


def logits_of(*probabilities: float) -> mx.array:
    """Logits [V] whose softmax is these probabilities; 0 is -inf."""
    return mx.array([np.log(p) if p else -INF for p in probabilities], mx.float32)


def random_logits(seed: int, size: int) -> np.ndarray:
    """[size] float32, all different."""
    return np.random.default_rng(seed).normal(size=size, scale=3.0).astype(np.float32)


def check_row_unchanged(function: Callable[[mx.array], mx.array], logits: mx.array) -> None:
    """Assert that the function leaves its argument as it is."""
    before = logits.tolist()
    function(logits)
    assert logits.tolist() == before, (
        "the given row has changed: in MLX, `x /= y`, `x -= y` and `x[i] = y` change the caller's array;"
        " `x = x / y` makes a new one"
    )


def check_evaluates_nothing(function: Callable[[mx.array], mx.array], logits: mx.array) -> None:
    """Assert that the function only builds MLX's graph.

    `mx.compile` calls it with an array without values, and raises if something evaluates one.
    """
    try:
        mx.compile(function)(logits)
    except ValueError as error:
        if "[eval]" not in str(error):
            raise
        message = "the function evaluates an array: `item`, `tolist`, `float`, `if` and `mx.eval` do that"
        raise AssertionError(message) from error


def check_kept(out: mx.array, logits: mx.array, kept: Iterable[int]) -> None:
    """Assert that the logits of these tokens are unchanged and all others are -inf."""
    expected = np.full(logits.shape, -INF, np.float32)
    for token in kept:
        expected[token] = logits[token].item()
    np.testing.assert_array_equal(np.array(out), expected)


# Task 1: keep_top_k


def test_task_1_the_two_largest_logits_are_kept() -> None:
    """Oracle: by hand."""
    logits = mx.array([1.0, 4.0, 2.0, 3.0])
    check_kept(keep_top_k(logits, 2), logits, [1, 3])


def test_task_1_top_k_of_one_keeps_only_the_largest_logit() -> None:
    """Oracle: by hand. It holds even if all logits are negative."""
    logits = mx.array([-5.0, -1.0, -2.0])
    check_kept(keep_top_k(logits, 1), logits, [1])


@pytest.mark.parametrize("k", [4, 5, 1000])
def test_task_1_a_k_of_at_least_the_vocabulary_size_keeps_all_tokens(k: int) -> None:
    """Oracle: the docstring: k above V keeps all."""
    logits = mx.array([1.0, 4.0, 2.0, 3.0])
    check_kept(keep_top_k(logits, k), logits, range(4))


def test_task_1_ties_with_the_kth_logit_are_kept() -> None:
    """Oracle: the docstring. Taking the first k of a sorted order drops ties at random."""
    logits = mx.array([3.0, 1.0, 3.0, 5.0, 3.0])
    check_kept(keep_top_k(logits, 2), logits, [0, 2, 3, 4])


def test_task_1_tokens_removed_by_another_filter_stay_removed() -> None:
    """Oracle: by hand: -inf is smaller than every number."""
    logits = mx.array([-INF, 2.0, -INF, 1.0])
    check_kept(keep_top_k(logits, 1), logits, [1])
    check_kept(keep_top_k(logits, 3), logits, [1, 3])


@pytest.mark.parametrize("k", [1, 2, 7, 50, 99, 100])
def test_task_1_the_k_largest_of_many_logits_are_kept(k: int) -> None:
    """Oracle: NumPy's sort."""
    logits = random_logits(1, 100)
    check_kept(keep_top_k(mx.array(logits), k), mx.array(logits), np.argsort(logits)[-k:].tolist())


def test_task_1_the_given_row_does_not_change() -> None:
    """Oracle: the invariant: other functions may need the row again."""
    check_row_unchanged(lambda row: keep_top_k(row, 2), mx.array([1.0, 4.0, 2.0, 3.0]))


# Task 2: keep_top_p


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.001, [2]), (0.45, [2]), (0.6, [0, 2]), (0.7, [0, 2]), (0.8, [0, 2, 3]), (0.95, [0, 1, 2, 3])],
)
def test_task_2_the_smallest_set_that_reaches_p_is_kept(p: float, kept: list[int]) -> None:
    """Oracle: by hand: the sums from the most likely token on are 0.5, 0.75, 0.9 and 1.

    The token that crosses p is kept; a set without it is too small.
    """
    logits = logits_of(0.25, 0.1, 0.5, 0.15)
    check_kept(keep_top_p(logits, p), logits, kept)


def test_task_2_a_set_with_a_sum_of_exactly_p_is_enough() -> None:
    """Oracle: the docstring: before the second token the sum is 0.5, which is not less than p."""
    logits = mx.log(mx.array([0.5, 0.25, 0.25]))
    check_kept(keep_top_p(logits, 0.5), logits, [0])


def test_task_2_logits_need_not_be_log_probabilities() -> None:
    """Oracle: by hand: a constant that is added to all logits changes no probability."""
    for shift in (-300.0, 5.0, 300.0):
        logits = mx.array([1.0, 0.0, 2.0]) + shift  # probabilities 0.24, 0.09 and 0.67
        check_kept(keep_top_p(logits, 0.5), logits, [2])
        check_kept(keep_top_p(logits, 0.8), logits, [0, 2])


def test_task_2_ties_with_the_last_kept_token_are_kept() -> None:
    """Oracle: the docstring: 0.4 and 0.2 are enough, and two more are as likely as the second."""
    logits = mx.array([0.0, np.log(2.0), 0.0, 0.0])
    check_kept(keep_top_p(logits, 0.5), logits, range(4))


def test_task_2_tokens_removed_by_another_filter_do_not_count() -> None:
    """Oracle: by hand: without the third token, 0.5 and 0.3 become 0.625 and 0.375."""
    logits = logits_of(0.5, 0.3, 0.0)
    check_kept(keep_top_p(logits, 0.6), logits, [0])


def test_task_2_a_token_of_probability_zero_is_never_kept() -> None:
    """Oracle: the docstring. exp(-300) is 0 in float32: such a token is removed for every p."""
    logits = mx.array([0.0, -INF, -300.0, 0.0])
    for p in (0.9, 1.0):
        check_kept(keep_top_p(logits, p), logits, [0, 3])


def test_task_2_a_token_of_probability_zero_is_not_kept_if_rounding_leaves_the_sum_below_one() -> None:
    """Oracle: the docstring. Rounding may leave the sum of many equal probabilities below 1."""
    for size in range(3, 60):
        logits = np.zeros(size, np.float32)
        logits[0], logits[-1] = -300.0, -INF
        check_kept(keep_top_p(mx.array(logits), 1.0), mx.array(logits), range(1, size - 1))


def test_task_2_the_only_token_is_kept() -> None:
    """Oracle: by hand."""
    for p in (0.001, 1.0):
        check_kept(keep_top_p(mx.array([-7.0]), p), mx.array([-7.0]), [0])


@pytest.mark.parametrize("count", [1, 2, 5, 20, 60])
def test_task_2_the_kept_set_of_many_tokens_matches_numpy(count: int) -> None:
    """Oracle: NumPy in float64, with a p halfway between two sums, so rounding does not matter."""
    logits = random_logits(2, 200)
    probabilities = numpy_softmax(logits)
    order = np.argsort(-probabilities)
    sums = np.concatenate([[0.0], np.cumsum(probabilities[order])])
    out = keep_top_p(mx.array(logits), float(sums[count - 1] + sums[count]) / 2)
    check_kept(out, mx.array(logits), order[:count].tolist())


def test_task_2_the_given_row_does_not_change() -> None:
    """Oracle: the invariant: other functions may need the row again."""
    check_row_unchanged(lambda row: keep_top_p(row, 0.6), logits_of(0.25, 0.1, 0.5, 0.15))


# Task 3: keep_min_p


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.05, [0, 1, 2, 3]), (0.25, [0, 2, 3]), (0.5, [2, 3]), (0.7, [2])]
)
def test_task_3_the_threshold_is_a_fraction_of_the_largest_probability(min_p: float, kept: list[int]) -> None:
    """Oracle: by hand: relative to the largest probability they are 0.3, 0.1, 1 and 0.6.

    As absolute thresholds, 0.25 would keep two tokens and 0.7 none.
    """
    logits = logits_of(0.15, 0.05, 0.5, 0.3)
    check_kept(keep_min_p(logits, min_p), logits, kept)


def test_task_3_a_fraction_of_one_keeps_the_most_likely_token_and_its_ties() -> None:
    """Oracle: by hand."""
    logits = mx.array([1.0, 2.0, 2.0, 0.0])
    check_kept(keep_min_p(logits, 1.0), logits, [1, 2])


def test_task_3_a_fraction_of_zero_keeps_all_tokens() -> None:
    """Oracle: by hand: no token is less likely than impossible."""
    logits = mx.array([0.0, -20.0, -50.0, -INF])
    check_kept(keep_min_p(logits, 0.0), logits, range(4))


def test_task_3_tokens_removed_by_another_filter_stay_removed() -> None:
    """Oracle: by hand: 0.4 and 0.2 are left, and the second is half of the first."""
    logits = logits_of(0.4, 0.0, 0.2, 0.0)
    check_kept(keep_min_p(logits, 0.4), logits, [0, 2])
    check_kept(keep_min_p(logits, 0.6), logits, [0])


@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
@pytest.mark.parametrize("min_p", [0.001, 0.02, 0.3])
def test_task_3_the_kept_set_of_many_tokens_matches_numpy(min_p: float, shift: float) -> None:
    """Oracle: NumPy in float64: kept logits are at most ln(1 / min_p) below the largest."""
    logits = np.round(random_logits(3, 200), 2) + np.float32(shift)
    kept = np.flatnonzero(logits.astype(np.float64) >= logits.max() + np.log(min_p)).tolist()
    check_kept(keep_min_p(mx.array(logits), min_p), mx.array(logits), kept)


def test_task_3_the_given_row_does_not_change() -> None:
    """Oracle: the invariant: other functions may need the row again."""
    check_row_unchanged(lambda row: keep_min_p(row, 0.5), logits_of(0.15, 0.05, 0.5, 0.3))


# Task 4: draw


def drawn(function: Callable[[int], mx.array], count: int) -> np.ndarray:
    """[count]: the tokens that the function returns for 0, 1, 2, ..."""
    tokens = [function(index) for index in range(count)]
    kind = type(tokens[0])
    assert kind is mx.array, f"the token must be an mx.array without axes, not {kind.__name__}"
    return np.array(mx.stack(tokens))


def check_distribution(tokens: np.ndarray, probabilities: Iterable[float]) -> None:
    """Assert that tokens have these probabilities, by Pearson's chi-square test.

    The bound is twelve standard deviations above the mean of chi-square: right tokens fail it for about one
    seed in forty thousand at most, and wrong ones miss it by far.
    """
    expected = np.array(list(probabilities)) * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    assert len(counts) == len(expected), "a token outside the vocabulary"
    possible = expected > 0
    assert counts[~possible].sum() == 0, "an impossible token"
    freedom = possible.sum() - 1
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    bound = freedom + 12 * np.sqrt(2 * freedom) + 1e-9
    assert chi_square < bound, (
        f"{len(tokens)} draws gave {counts.tolist()}, not about {expected.round().astype(int).tolist()}"
    )


def test_task_4_the_only_possible_token_is_drawn() -> None:
    """Oracle: by hand."""
    assert drawn(lambda index: draw(mx.array([3.0]), 1, index), 20).tolist() == [0] * 20
    assert drawn(lambda index: draw(mx.array([-INF, -INF, 3.0, -INF]), 1, index), 20).tolist() == [2] * 20


def test_task_4_a_token_is_a_scalar_array() -> None:
    """Oracle: by hand: an array without axes, so that the tokens of a batch stack to [B]."""
    assert draw(logits_of(0.5, 0.5), 1, 2).shape == ()


def test_task_4_the_same_seed_and_index_draw_the_same_token() -> None:
    """Oracle: the same draw again. Common mistake: MLX's global random state."""
    logits = mx.zeros(1000)
    first = drawn(lambda index: draw(logits, 7, index), 30)
    mx.random.seed(99)
    again = drawn(lambda index: draw(logits, 7, index), 30)
    assert first.tolist() == again.tolist()
    backwards = [draw(logits, 7, index).item() for index in reversed(range(30))]
    assert first.tolist() == backwards[::-1]


def test_task_4_another_seed_or_index_draws_another_token() -> None:
    """Oracle: the definition: of 1000 tokens, all equally likely, 30 draws are almost all different."""
    logits = mx.zeros(1000)
    assert len(set(drawn(lambda index: draw(logits, 7, index), 30).tolist())) > 20
    assert len(set(drawn(lambda seed: draw(logits, seed, 7), 30).tolist())) > 20


def test_task_4_the_next_seed_does_not_repeat_the_next_index() -> None:
    """Oracle: the definition. Adding seed and index makes the completions of a request similar."""
    logits = mx.zeros(1000)
    later = drawn(lambda index: draw(logits, 7, index + 1), 30)
    neighbour = drawn(lambda index: draw(logits, 8, index), 30)
    assert (later == neighbour).sum() < 5


def test_task_4_a_draw_does_not_depend_on_other_rows_of_the_batch() -> None:
    """Oracle: the row without the others."""
    rows = mx.random.normal((3, 100), key=mx.random.key(4))
    separate = drawn(lambda index: draw(rows[1], 5, index), 20)
    interleaved = []
    for index in range(20):
        draw(rows[0], 6, index)
        interleaved.append(draw(rows[1], 5, index).item())
        draw(rows[2], 7, index)
    assert separate.tolist() == interleaved


@pytest.mark.parametrize("probabilities", [(0.5, 0.5), (0.1, 0.2, 0.3, 0.4), (0.05, 0.0, 0.7, 0.0, 0.25)])
def test_task_4_tokens_are_drawn_with_their_probabilities(probabilities: tuple[float, ...]) -> None:
    """Oracle: the probabilities, over 2000 indices of one seed."""
    logits = logits_of(*probabilities) + 50.0  # logits need not be log-probabilities
    check_distribution(drawn(lambda index: draw(logits, 11, index), 2000), probabilities)


def test_task_4_first_tokens_of_many_seeds_are_drawn_with_their_probabilities() -> None:
    """Oracle: the probabilities, over 2000 seeds at index 0."""
    probabilities = (0.6, 0.25, 0.1, 0.05)
    check_distribution(drawn(lambda seed: draw(logits_of(*probabilities), seed, 0), 2000), probabilities)


def test_task_4_the_first_token_whose_cumulative_probability_reaches_the_threshold_is_drawn() -> None:
    """Oracle: the docstring, by hand: compare 1 - u with the sums 0.25, 0.75, 0.75 and 1.

    Comparing with u instead of 1 - u gives the same distribution but other tokens than the reference.
    """
    logits, sums = logits_of(0.25, 0.5, 0.0, 0.25), np.array([0.25, 0.75, 0.75, 1.0])
    expected = [int((sums >= 1 - uniform(7, index)).argmax()) for index in range(60)]
    found = drawn(lambda index: draw(logits, 7, index), 60).tolist()
    mirrored = [int((sums >= uniform(7, index)).argmax()) for index in range(60)]
    assert found != mirrored, "these are the tokens of u; compare with 1 - u"
    assert found == expected, (
        "compare 1 - uniform(seed, index) with the cumulative sums in the order of the ids"
    )


def test_task_4_the_draw_evaluates_nothing() -> None:
    """Oracle: MLX. The engine evaluates the tokens of a whole batch together."""
    check_evaluates_nothing(lambda logits: draw(logits, 7, 3), mx.array(random_logits(4, 100)))


def test_task_4_the_given_row_does_not_change() -> None:
    """Oracle: the invariant: other functions may need the row again."""
    check_row_unchanged(lambda row: draw(row, 7, 3), mx.array(random_logits(4, 100)))


def test_task_4_a_cumulative_sum_that_equals_the_threshold_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: by hand: u is 0, so the threshold is the last sum, and the sums are 0, 0.5, 1 and 1."""
    monkeypatch.setattr("tiny_llm.sampler.uniform", lambda seed, index: 0.0)
    token = draw(mx.array([-INF, 2.0, 2.0, -INF]), 1, 1).item()
    assert token == 2, (
        f"token {token} instead of 2: 1 - u is 1 here, so the threshold is the last sum. Compare with >=;"
        " with >, no sum is above the threshold, and argmax of only False is 0"
    )


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-24])
def test_task_4_the_smallest_and_the_largest_random_number_draw_a_possible_token(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the docstring: the first and last tokens are impossible, so they are not drawn.

    Rounding may leave the sum of the probabilities below 1. Common mistakes that return token 0: a comparison
    that no token passes, and one that token 0 passes.
    """
    monkeypatch.setattr("tiny_llm.sampler.uniform", lambda seed, index: mx.array(number))
    cause = (
        "u is 0 here, and no sum reaches your threshold, so argmax of only False is 0. If you compare with"
        " >=, multiply 1 - u by the last sum, which rounding may leave below 1"
        if number == 0
        else "1 - u is 2**-24 here, and this token's sum must not reach it"
    )
    for size in range(3, 60):
        logits = np.zeros(size, np.float32)
        logits[0] = logits[-1] = -INF
        token = draw(mx.array(logits), 1, 1).item()
        assert token not in (0, size - 1), f"token {token} of {size} has the probability 0: {cause}"


# Task 5: sample_token


def sampled(logits: mx.array, params: SamplingParams, count: int = 60) -> np.ndarray:
    """The tokens of one request that has the same logits at every step."""
    return drawn(lambda index: sample_token(mx.array(logits), params, 13, index), count)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}],
    ids=str,
)
def test_task_5_the_given_row_does_not_change(options: dict[str, float]) -> None:
    """Oracle: the invariant: the engine computes log-probabilities from the row."""
    params = SamplingParams(**options)
    check_row_unchanged(lambda row: sample_token(row, params, 13, 0), logits_of(0.1, 0.2, 0.3, 0.4))


@pytest.mark.parametrize("temperature", [0.0, 1e-39, 1e-6])
def test_task_5_a_temperature_of_zero_picks_the_most_likely_token(temperature: float) -> None:
    """Oracle: by hand: no draw and no filter. Common mistake: a division by 0."""
    params = SamplingParams(temperature=temperature)
    assert set(sampled(mx.array([1.0, 1.1, 1.05]), params).tolist()) == {1}
    assert sample_token(mx.array([1.0, 1.1, 1.05]), params, 1, 1).shape == ()


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_task_5_a_greedy_request_draws_nothing(temperature: float) -> None:
    """Oracle: the docstring: every index gives the same token, though two logits are the largest."""
    tokens = sampled(mx.array([4.0, 4.0, 3.0]), SamplingParams(temperature=temperature))
    assert len(set(tokens.tolist())) == 1


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_task_5_choosing_a_token_evaluates_nothing(temperature: float) -> None:
    """Oracle: MLX. The engine evaluates the tokens of a whole batch together."""
    params = SamplingParams(temperature=temperature, top_k=50, top_p=0.9, min_p=0.001)
    logits = mx.array(random_logits(14, 100))
    check_evaluates_nothing(lambda row: sample_token(row, params, 13, 0), logits)


def test_task_5_a_temperature_of_one_keeps_the_probabilities() -> None:
    """Oracle: the probabilities, over 2000 indices."""
    probabilities = (0.1, 0.2, 0.3, 0.4)
    check_distribution(sampled(logits_of(*probabilities), SamplingParams(), 2000), probabilities)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_task_5_logits_are_divided_by_the_temperature(temperature: float) -> None:
    """Oracle: by hand: probabilities to the power of 1 / temperature, renormalized, over 2000 indices."""
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    expected = probabilities ** (1 / temperature)
    tokens = sampled(logits_of(*probabilities), SamplingParams(temperature=temperature), 2000)
    check_distribution(tokens, expected / expected.sum())


def test_task_5_the_same_seed_and_index_give_the_same_token() -> None:
    """Oracle: the same again, with another row of the batch in between."""
    rows = mx.random.normal((2, 100), key=mx.random.key(14))
    params = SamplingParams(temperature=2.0, top_k=50, top_p=0.9, min_p=0.001)
    first = sampled(rows[0], params)
    sampled(rows[1], params)
    mx.random.seed(3)
    assert sampled(rows[0], params).tolist() == first.tolist()
    assert len(set(first.tolist())) > 5


@pytest.mark.parametrize("top_k", [-1, 0])
def test_task_5_top_k_of_zero_or_less_is_disabled(top_k: int) -> None:
    """Oracle: the docstring: all tokens are drawn, as without a filter."""
    params = SamplingParams(top_k=top_k)
    assert set(sampled(logits_of(0.1, 0.2, 0.3, 0.4), params, 300).tolist()) == {0, 1, 2, 3}


def test_task_5_top_p_of_one_and_min_p_of_zero_are_disabled() -> None:
    """Oracle: the draw itself, at every index: a disabled filter changes nothing."""
    logits, params = mx.random.normal((100,), key=mx.random.key(9)), SamplingParams(top_p=1.0, min_p=0.0)
    assert sampled(logits, params).tolist() == drawn(lambda index: draw(logits, 13, index), 60).tolist()


def test_task_5_top_p_of_one_keeps_very_unlikely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: token 0 has 1.5e-8, and 1 - u is half of that, so it is drawn.

    In float32 the likeliest token has all of the probability: a filter at 1 would remove token 0.
    """
    monkeypatch.setattr("tiny_llm.sampler.uniform", lambda seed, index: 1 - 2.0**-27)
    assert sample_token(mx.array([-18.0, 0.0]), SamplingParams(top_p=1.0), 1, 1).item() == 0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"min_p": 0.4}, {1, 2, 3}),
        ({"min_p": 0.4, "top_k": 1}, {3}),
        ({"min_p": 0.7, "top_p": 0.999}, {1, 3}),
    ],
)
def test_task_5_filters_limit_the_tokens_that_are_drawn(options: dict[str, float], kept: set[int]) -> None:
    """Oracle: by hand, the set of tokens that 300 draws find."""
    logits = logits_of(0.1, 0.3, 0.2, 0.4)
    params = SamplingParams(**options)
    assert set(sampled(logits, params, 300).tolist()) == kept


@pytest.mark.parametrize("options", [{"min_p": 0.1}, {"top_p": 0.8}])
def test_task_5_the_temperature_is_applied_before_the_filters(options: dict[str, float]) -> None:
    """Oracle: by hand: at 0.5 probabilities of 0.64, 0.16, 0.16 and 0.04 become 0.89, 0.06, 0.06 and 0.003.

    Filters that see the first four would keep three tokens.
    """
    params = SamplingParams(temperature=0.5, **options)
    assert set(sampled(logits_of(0.64, 0.16, 0.16, 0.04), params, 300).tolist()) == {0}


def test_task_5_top_p_is_applied_after_top_k() -> None:
    """Oracle: by hand: 0.4 of 0.4 + 0.3 is 0.57, which is enough. Without top-k it is 0.4."""
    params = SamplingParams(top_k=2, top_p=0.55)
    assert set(sampled(logits_of(0.4, 0.3, 0.2, 0.1), params, 300).tolist()) == {0}


def test_task_5_top_p_is_applied_after_min_p() -> None:
    """Oracle: by hand: 0.4 of 0.4 + 0.3 is 0.57, which is enough. Without min-p it is 0.4."""
    params = SamplingParams(min_p=0.6, top_p=0.55)
    assert set(sampled(logits_of(0.4, 0.3, 0.2, 0.1), params, 300).tolist()) == {0}


def test_task_5_probabilities_are_renormalized_after_the_filters() -> None:
    """Oracle: by hand: 0.4 and 0.3 of 0.7, over 2000 indices."""
    tokens = sampled(logits_of(0.2, 0.4, 0.1, 0.3), SamplingParams(top_k=2), 2000)
    check_distribution(tokens, [0, 4 / 7, 0, 3 / 7])


# Task 6: penalize_repetition


def test_task_6_a_positive_logit_is_divided_and_a_negative_one_multiplied() -> None:
    """Oracle: by hand. Common mistake: dividing a negative logit, which makes the token likelier."""
    out = penalize_repetition(mx.array([2.0, -2.0, 4.0, -4.0]), [0, 1], 2.0)
    np.testing.assert_allclose(np.array(out), [1, -4, 4, -4], rtol=1e-6)


def test_task_6_a_penalty_below_one_makes_tokens_likelier() -> None:
    """Oracle: by hand."""
    out = penalize_repetition(mx.array([2.0, -2.0, 4.0, -4.0]), [0, 1], 0.5)
    np.testing.assert_allclose(np.array(out), [4, -1, 4, -4], rtol=1e-6)


def test_task_6_a_repeated_token_is_penalized_once() -> None:
    """Oracle: by hand."""
    out = penalize_repetition(mx.array([8.0, -8.0, 1.0]), [1, 0, 0, 1, 0], 2.0)
    np.testing.assert_allclose(np.array(out), [4, -16, 1], rtol=1e-6)


def test_task_6_change_logits_gets_each_id_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the docstring of `change_logits`: its ids are different."""
    given: list[list[int]] = []

    def recorded(logits: mx.array, token_ids: list[int], change: Callable[[mx.array], mx.array]) -> mx.array:
        given.append(token_ids)
        return change_logits(logits, token_ids, change)

    monkeypatch.setattr("tiny_llm.sampler.change_logits", recorded)
    penalize_repetition(mx.array([8.0, -8.0, 1.0]), [1, 0, 0, 1, 0], 2.0)
    repeated = [ids for ids in given if len(ids) > len(set(ids))]
    assert not repeated, "each id may be in the list only once"


def test_task_6_logits_of_zero_and_minus_infinity_do_not_change() -> None:
    """Oracle: by hand: a token that another rule removed stays removed."""
    out = penalize_repetition(mx.array([0.0, -INF, 3.0]), [0, 1], 1.5)
    np.testing.assert_array_equal(np.array(out), [0, -INF, 3])


def test_task_6_without_seen_tokens_the_logits_do_not_change() -> None:
    """Oracle: by hand."""
    out = penalize_repetition(mx.array([2.0, -2.0]), [], 2.0)
    np.testing.assert_array_equal(np.array(out), [2, -2])


def test_task_6_the_input_logits_are_not_modified() -> None:
    """Oracle: by hand: they may be needed again. Assigning to the array changes it."""
    logits = mx.array([2.0, -2.0, 4.0])
    penalize_repetition(logits, [0, 1], 2.0)
    np.testing.assert_array_equal(np.array(logits), [2, -2, 4])


def test_task_6_the_penalty_evaluates_nothing() -> None:
    """Oracle: MLX. The engine evaluates the tokens of a whole batch together."""
    check_evaluates_nothing(lambda row: penalize_repetition(row, [0, 1], 2.0), mx.array([2.0, -2.0, 4.0]))


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_task_6_the_penalties_of_many_tokens_match_a_plain_loop(penalty: float) -> None:
    """Oracle: a loop over the tokens, in Python. They may come from any iterable."""
    logits = random_logits(15, 300)
    seen = np.random.default_rng(16).integers(0, 300, size=200).tolist()
    expected = logits.astype(np.float64)
    for token in set(seen):
        expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
    out = penalize_repetition(mx.array(logits), iter(seen), penalty)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-6)


# Task 7: penalize_output


def test_task_7_the_presence_penalty_counts_once_and_the_frequency_penalty_each_time() -> None:
    """Oracle: by hand: token 0 came twice, 5 - 2 * 0.5 - 1, and token 2 once, 5 - 0.5 - 1."""
    out = penalize_output(mx.array([5.0, 5.0, 5.0]), [0, 2, 0], 0.5, 1.0)
    np.testing.assert_allclose(np.array(out), [3, 5, 3.5], rtol=1e-6)


def test_task_7_presence_penalty_works_without_frequency_penalty() -> None:
    """Oracle: by hand. It holds even if a logit becomes negative."""
    out = penalize_output(mx.array([5.0, -1.0, 0.0, 2.0]), [0, 1, 2, 2, 2], 0.0, 1.5)
    np.testing.assert_allclose(np.array(out), [3.5, -2.5, -1.5, 2], rtol=1e-6)


def test_task_7_frequency_penalty_works_without_presence_penalty() -> None:
    """Oracle: by hand. Common mistake: an indexed update that counts repeated tokens once."""
    out = penalize_output(mx.array([5.0, -1.0, 0.0, 2.0]), [0, 1, 2, 2, 2], 0.5, 0.0)
    np.testing.assert_allclose(np.array(out), [4.5, -1.5, -1.5, 2], rtol=1e-6)


def test_task_7_negative_penalties_make_tokens_likelier() -> None:
    """Oracle: by hand."""
    out = penalize_output(mx.array([1.0, 1.0]), [1, 1], -0.5, -1.0)
    np.testing.assert_allclose(np.array(out), [1, 3], rtol=1e-6)


def test_task_7_without_output_tokens_the_logits_do_not_change() -> None:
    """Oracle: by hand: the first token of a request has no output before it."""
    out = penalize_output(mx.array([2.0, -2.0]), [], 0.5, 1.0)
    np.testing.assert_array_equal(np.array(out), [2, -2])


def test_task_7_the_input_logits_are_not_modified() -> None:
    """Oracle: by hand: they may be needed again. Assigning to the array changes it."""
    logits = mx.array([2.0, -2.0, 4.0])
    penalize_output(logits, [0, 1], 0.5, 1.0)
    np.testing.assert_array_equal(np.array(logits), [2, -2, 4])


def test_task_7_the_penalties_evaluate_nothing() -> None:
    """Oracle: MLX. The engine evaluates the tokens of a whole batch together."""
    check_evaluates_nothing(lambda row: penalize_output(row, [0, 2, 0], 0.5, 1.0), mx.array([5.0, 5.0, 5.0]))


def test_task_7_the_penalties_of_many_tokens_match_a_plain_loop() -> None:
    """Oracle: a loop over the tokens, in Python. They may come from any iterable."""
    logits = random_logits(17, 300)
    outputs = np.random.default_rng(18).integers(0, 300, size=400).tolist()
    expected = logits.astype(np.float64)
    for token in outputs:
        expected[token] -= 0.3
    for token in set(outputs):
        expected[token] -= 0.7
    out = penalize_output(mx.array(logits), iter(outputs), 0.3, 0.7)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-5)


# Task 8: log_probabilities


def test_task_8_log_probabilities_are_logs_of_the_softmax() -> None:
    """Oracle: by hand: weights of 1, 2 and 5 are 1/8, 2/8 and 5/8."""
    out = log_probabilities(mx.array([0.0, np.log(2.0), np.log(5.0)]))
    np.testing.assert_allclose(np.array(out), np.log([1 / 8, 2 / 8, 5 / 8]), rtol=1e-5)


def test_task_8_the_only_token_has_log_probability_zero() -> None:
    """Oracle: by hand: ln 1."""
    np.testing.assert_allclose(np.array(log_probabilities(mx.array([-3.5]))), [0], atol=1e-7)


def test_task_8_the_given_row_does_not_change() -> None:
    """Oracle: the invariant: penalties and the draw use the row, too."""
    check_row_unchanged(log_probabilities, mx.array([1.0, 4.0, 2.0, 3.0]))


def test_task_8_log_probabilities_evaluate_nothing() -> None:
    """Oracle: MLX. The engine evaluates the rows of a whole batch together."""
    check_evaluates_nothing(log_probabilities, mx.array(random_logits(20, 300)))


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_task_8_large_logits_do_not_overflow(shift: float) -> None:
    """Oracle: by hand: 1/3 and 2/3, for small and large logits."""
    out = log_probabilities(mx.array([shift, shift + np.log(2.0)]))
    np.testing.assert_allclose(np.array(out), np.log([1 / 3, 2 / 3]), rtol=1e-3)


def test_task_8_very_unlikely_tokens_have_finite_log_probabilities() -> None:
    """Oracle: by hand: 0 and -200. The logarithm of a softmax is -inf: exp(-200) is 0 in float32."""
    np.testing.assert_allclose(np.array(log_probabilities(mx.array([0.0, -200.0]))), [0, -200], atol=1e-4)


def test_task_8_an_impossible_token_has_log_probability_minus_infinity() -> None:
    """Oracle: by hand."""
    out = log_probabilities(mx.array([1.0, -INF, 1.0]))
    np.testing.assert_allclose(np.array(out), [-np.log(2), -INF, -np.log(2)], rtol=1e-5)


@pytest.mark.parametrize("size", [2, 255, 256, 257, 1000, 49_152])
def test_task_8_every_vocabulary_size_matches_numpy(size: int) -> None:
    """Oracle: NumPy in float64. Sums over groups must not drop or add tokens at the end."""
    logits = random_logits(19, size)
    expected = np.log(numpy_softmax(logits))
    out = log_probabilities(mx.array(logits))
    assert out.shape == (size,)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.exp(np.array(out, np.float64)).sum(), 1, rtol=1e-4)


def test_task_8_the_sum_over_a_large_vocabulary_is_accurate() -> None:
    """Oracle: by hand: 1 and 49,151 weights of 1/49,151 are 2, so the first token has ln 1/2.

    One long sum in float32 is off by about 0.001 here: small terms are lost in a large
    sum.
    """
    logits = np.full(49_152, -np.log(49_151), np.float32)
    logits[0] = 0.0
    out = np.array(log_probabilities(mx.array(logits)))
    np.testing.assert_allclose(out[[0, 1, -1]], [-np.log(2), *[-np.log(2 * 49_151)] * 2], atol=5e-5, rtol=0)
