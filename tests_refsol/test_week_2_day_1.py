"""Day 2.1: the quadratic cost of recomputing, and the KV cache that avoids it.

When these tests pass, you have a forward pass over only the new tokens that still attends to all earlier
ones, and a generation that gives the same tokens as recomputing everything, at a fraction of the work.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.generate import generate
from tiny_llm.kv_cache import (
    CachedContext,
    attention_with_cache,
    attention_without_cache,
    generate_with_cache,
)
from tiny_llm.kv_context import KVContext

from common.numpy_oracles import causal_attention
from common.toy_arrays import column, random_qkv
from common.toy_models import CountingModel, recompute_everything, tiny_config, tiny_model
from tiny_llm_checkpoints.model_config import ModelConfig

# Task 1: attention_without_cache


def test_task_1_one_generated_token_costs_a_pass_over_the_prompt_and_a_pass_over_prompt_and_token() -> None:
    """Oracle: counted by hand: 3 keys for the prompt, then 4 for the prompt and the token."""
    assert attention_without_cache(3, 1) == 3 + 4


def test_task_1_without_generated_tokens_only_the_prompt_is_computed() -> None:
    """Oracle: counted by hand."""
    assert attention_without_cache(5, 0) == 5


def test_task_1_the_formula_counts_one_more_pass_than_generate_runs() -> None:
    """Oracle: the tokens that `generate` of day 1.6 feeds to a model.

    To generate 2 tokens after 3 it runs passes over 3 and 4 tokens. The formula adds the pass
    over all 5, from which no token is chosen.
    """
    model = CountingModel(Successor(tiny_config()))
    assert list(generate(model, [1, 2, 3], 2, ())) == [4, 5]
    assert model.fed == [3, 4]
    assert attention_without_cache(3, 2) == 3 + 4 + 5, "the formula counts the pass over all 5 tokens too"


def test_task_1_a_prompt_of_128_and_100_new_tokens_cost_17978_keys() -> None:
    """Oracle: by hand: 128 for the prompt, 100 * 128 for the prompt again, 1 + 2 + ... + 100 for the tokens.

    The last of the 101 passes goes over all 228 tokens. The figure 16,576 that some texts print does not
    follow from the definition.
    """
    assert attention_without_cache(128, 100) == 128 + 12_800 + 5_050 == 17_978
    assert attention_with_cache(128, 100) == 228, "attention_with_cache is given: it computes each token once"


@pytest.mark.parametrize(("prompt_len", "gen_len"), [(1, 1), (1, 7), (4, 3), (10, 25), (100, 2)])
def test_task_1_the_formula_matches_a_loop_that_counts_keys(prompt_len: int, gen_len: int) -> None:
    """Oracle: the definition, counted key by key."""
    keys = 0
    for known in range(prompt_len, prompt_len + gen_len + 1):
        for _ in range(known):
            keys += 1
    assert attention_without_cache(prompt_len, gen_len) == keys


def test_task_1_ten_times_the_output_costs_a_hundred_times_the_keys() -> None:
    """Oracle: the definition: for long outputs the square of their number outweighs the rest."""
    assert attention_without_cache(1, 10_000) / attention_without_cache(1, 1_000) == pytest.approx(
        100, rel=0.01
    )


# Task 2: CachedContext.begin_pass


def test_task_2_the_first_pass_starts_at_position_zero() -> None:
    """Oracle: by hand."""
    context = CachedContext(scale=1.0)
    context.begin_pass(3)
    assert context.positions.tolist() == [0, 1, 2]


def test_task_2_later_passes_continue_the_positions() -> None:
    """Oracle: by hand. Common mistake: positions that start at 0 in each pass."""
    context = CachedContext(scale=1.0)
    context.begin_pass(3)
    context.begin_pass(1)
    assert context.positions.tolist() == [3]
    context.begin_pass(2)
    assert context.positions.tolist() == [4, 5]
    context.begin_pass(1)
    assert context.positions.tolist() == [6]


def test_task_2_only_the_last_of_the_new_tokens_needs_logits() -> None:
    """Oracle: by hand: rows count from the start of their pass; they are not positions in the sequence."""
    context = CachedContext(scale=1.0)
    for num_new_tokens, row in [(3, 2), (1, 0), (4, 3), (1, 0)]:
        context.begin_pass(num_new_tokens)
        assert context.logit_rows is not None
        assert context.logit_rows.tolist() == [row]


def test_task_2_num_tokens_counts_the_tokens_of_all_passes() -> None:
    """Oracle: by hand: 3 and 1 are 4, and 2 more are 6."""
    context = CachedContext(scale=1.0)
    for num_new_tokens, counted in [(3, 3), (1, 4), (2, 6)]:
        context.begin_pass(num_new_tokens)
        assert context.num_tokens == counted


def test_task_2_positions_are_int32() -> None:
    """Oracle: the protocol of a context, `kv_context.KVContext`."""
    context = CachedContext(scale=1.0)
    for num_new_tokens in (4, 1):
        context.begin_pass(num_new_tokens)
        assert context.positions.dtype == mx.int32
        assert context.positions.shape == (num_new_tokens,)


def test_task_2_contexts_count_independently() -> None:
    """Oracle: by hand."""
    first, second = CachedContext(scale=1.0), CachedContext(scale=1.0)
    first.begin_pass(5)
    second.begin_pass(2)
    assert first.positions.tolist() == [0, 1, 2, 3, 4]
    assert second.positions.tolist() == [0, 1]


# Task 3: CachedContext.attend


def test_task_3_equal_keys_give_the_mean_of_the_values_so_far() -> None:
    """Oracle: by hand: the running means of 2, 4 and 9 are 2, 3 and 5."""
    context, means = CachedContext(scale=1.0), []
    for value in (2.0, 4.0, 9.0):
        context.begin_pass(1)
        out = context.attend(0, column(1.0), column(0.0), column(value))
        assert out.shape == (1, 1, 1, 1)
        means.append(out.item())
    np.testing.assert_allclose(means, [2, 3, 5], rtol=1e-6)


def test_task_3_tokens_of_one_pass_do_not_see_later_tokens() -> None:
    """Oracle: by hand: the same means when all three tokens come in one pass."""
    context = CachedContext(scale=1.0)
    context.begin_pass(3)
    out = context.attend(0, column(1, 1, 1), column(0, 0, 0), column(2, 4, 9))
    np.testing.assert_allclose(np.array(out).ravel(), [2, 3, 5], rtol=1e-6)


def test_task_3_a_later_pass_sees_the_whole_past() -> None:
    """Oracle: by hand. A mask that is aligned to the first key, not to the last, hides earlier tokens."""
    context = CachedContext(scale=1.0)
    context.begin_pass(1)
    context.attend(0, column(1), column(0), column(2))
    context.begin_pass(2)
    out = context.attend(0, column(1, 1), column(0, 0), column(4, 9))
    np.testing.assert_allclose(np.array(out).ravel(), [3, 5], rtol=1e-6)


def test_task_3_scores_are_multiplied_by_the_scale() -> None:
    """Oracle: by hand: with scores 0 and ln 3 * 2 * 0.5 the weights are 1/4 and 3/4."""
    context = CachedContext(scale=0.5)
    context.begin_pass(2)
    out = context.attend(0, column(2, 2), column(0, np.log(3)), column(0, 8))
    np.testing.assert_allclose(np.array(out).ravel(), [0, 6], rtol=1e-6, atol=1e-6)


def attend_in_passes(
    layers: Sequence[tuple[np.ndarray, ...]], passes: Sequence[int], scale: float
) -> list[np.ndarray]:
    """The outputs of each layer when its tokens come in passes of the given sizes."""
    context, start = CachedContext(scale), 0
    outputs: list[list[np.ndarray]] = [[] for _ in layers]
    for count in passes:
        context.begin_pass(count)
        for layer, qkv in enumerate(layers):
            q, k, v = (mx.array(x[:, :, start : start + count]) for x in qkv)
            outputs[layer].append(np.array(context.attend(layer, q, k, v)))
        start += count
    return [np.concatenate(parts, axis=2) for parts in outputs]


PASSES = [(7,), (1, 6), (6, 1), (5, 1, 1), (2, 3, 2), (1, 1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("passes", PASSES)
def test_task_3_the_output_does_not_depend_on_how_tokens_are_split_into_passes(
    passes: tuple[int, ...],
) -> None:
    """Oracle: NumPy in float64, the whole sequence at once."""
    qkv = random_qkv(1, (1, 2, 7, 8), (1, 2, 7, 8))
    (out,) = attend_in_passes([qkv], passes, scale=0.3)
    np.testing.assert_allclose(out, causal_attention(*qkv, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(2, 3, 3), (1, 4, 2), (3, 6, 2), (2, 4, 1)])
def test_task_3_grouped_heads_and_several_sequences_match_numpy(
    batch: int, heads: int, kv_heads: int
) -> None:
    """Oracle: NumPy in float64; query head h reads key and value head h // (H / Hkv)."""
    qkv = random_qkv(2, (batch, heads, 6, 8), (batch, kv_heads, 6, 8))
    (out,) = attend_in_passes([qkv], (3, 1, 2), scale=0.4)
    np.testing.assert_allclose(out, causal_attention(*qkv, 0.4), rtol=1e-4, atol=1e-5)


def test_task_3_every_layer_has_its_own_keys_and_values() -> None:
    """Oracle: NumPy in float64, each layer separately. Common mistake: one cache for all layers."""
    layers = [random_qkv(seed, (1, 4, 5, 8), (1, 2, 5, 8)) for seed in (3, 4, 5)]
    outputs = attend_in_passes(layers, (2, 1, 1, 1), scale=0.35)
    for out, qkv in zip(outputs, layers, strict=True):
        np.testing.assert_allclose(out, causal_attention(*qkv, 0.35), rtol=1e-4, atol=1e-5)


def test_task_3_a_new_context_starts_empty() -> None:
    """Oracle: by hand: a second sequence starts without keys."""
    for value in (2.0, 5.0):
        context = CachedContext(scale=1.0)
        context.begin_pass(1)
        assert context.attend(0, column(1), column(0), column(value)).item() == pytest.approx(value)


# Task 4: generate_with_cache


@dataclass
class Successor:
    """A model whose most likely token after i is always i + 1, so the expected tokens are known."""

    config: ModelConfig

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        following = (tokens + 1) % self.config.vocab_size
        logits = (following[..., None] == mx.arange(self.config.vocab_size)).astype(mx.float32)
        return logits if context.logit_rows is None else logits[:, context.logit_rows]


def test_task_4_generation_continues_from_the_prompt() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate_with_cache(Successor(tiny_config()), [3], 4, ())) == [4, 5, 6, 7]
    assert list(generate_with_cache(Successor(tiny_config()), [30, 9, 20], 2, ())) == [21, 22]
    assert list(generate_with_cache(Successor(tiny_config()), [48], 2, ())) == [49, 0]


def test_task_4_generation_stops_after_an_end_token_and_yields_it() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate_with_cache(Successor(tiny_config()), [3], 10, (99, 6))) == [4, 5, 6]


def test_task_4_an_end_token_in_the_prompt_does_not_stop_generation() -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate_with_cache(Successor(tiny_config()), [6, 3], 2, (6,))) == [4, 5]


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_task_4_at_most_max_tokens_are_generated(max_tokens: int) -> None:
    """Oracle: by hand, with a model that counts up by 1."""
    assert list(generate_with_cache(Successor(tiny_config()), [8], max_tokens, ())) == [9, 10][:max_tokens]


def test_task_4_an_empty_prompt_is_rejected_at_the_first_next() -> None:
    """Oracle: the docstring."""
    model = CountingModel(Successor(tiny_config()))
    stream = generate_with_cache(model, [], 3, ())
    with pytest.raises(ValueError):
        next(iter(stream))
    assert model.fed == [], "the model must not be called with an empty prompt"


def expect_tokens(got: Iterable[int], prompt: list[int], count: int = 20) -> None:
    """Assert that the tokens are those of a loop without a cache, and name the first that is not."""
    tokens, want = list(got), recompute_everything(tiny_model(), prompt, count)
    assert len(tokens) == count, f"{len(tokens)} tokens were generated, expected {count}"
    for i, (token, other) in enumerate(zip(tokens, want, strict=True)):
        assert token == other, (
            f"generated token {i} (from 0) is {token}; without a cache it is {other}. "
            f"The tokens before it are correct: {tokens[:i]}"
        )


@pytest.mark.parametrize("prompt", [[7], [41, 3], [11, 5, 5, 30, 2, 49, 0, 17, 8]])
def test_task_4_tokens_are_the_same_as_without_a_cache(prompt: list[int]) -> None:
    """Oracle: a plain loop with `NoCacheContext`, which caches nothing."""
    expect_tokens(generate_with_cache(tiny_model(), prompt, 20, ()), prompt)


def test_task_4_the_prompt_is_computed_once_and_each_later_pass_computes_one_token() -> None:
    """Oracle: by hand, the tokens that the model is fed.

    The last token need not be fed, because no token after it is requested.
    """
    model, prompt = CountingModel(tiny_model()), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert len(list(generate_with_cache(model, prompt, 12, ()))) == 12
    assert model.fed[0] == 9, "the first pass must compute the whole prompt"
    assert set(model.fed[1:12]) == {1}, (
        f"each later pass must compute one token; yours computed {model.fed[1:12]}"
    )
    assert sum(model.fed) <= 9 + 12


def test_task_4_two_generations_at_the_same_time_are_independent() -> None:
    """Oracle: each one run separately, in a plain loop without a cache."""
    prompts = [[4, 40, 14], [23, 42]]
    streams = [generate_with_cache(tiny_model(), prompt, 8, ()) for prompt in prompts]
    pairs = list(zip(*streams, strict=True))
    for prompt, got in zip(prompts, zip(*pairs, strict=True), strict=True):
        expect_tokens(got, prompt, 8)
