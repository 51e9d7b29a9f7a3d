"""The decoder against a plain NumPy one in float64, and its logits on pages against those without a cache."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.kernels import twins
from tiny_llm.model import Model

from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_model import (
    CONTEXT,
    dense_model,
    logits_through_pages,
    random_prompt,
    random_weights,
    tiny_config,
    tiny_model,
)

Weights = dict[str, np.ndarray]


def numpy_rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def numpy_rope(x: np.ndarray, base: float) -> np.ndarray:
    """x [L, H, D]; pairs (i, i + D/2), positions 0 .. L - 1."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def numpy_attention(x: np.ndarray, w: Weights, prefix: str, config: ModelConfig) -> np.ndarray:
    L, D = len(x), config.head_dim
    q, k, v = ((x @ w[f"{prefix}.{name}_proj"].T).reshape(L, -1, D) for name in "qkv")
    q, k = numpy_rope(q, config.rope_theta), numpy_rope(k, config.rope_theta)
    group = config.num_attention_heads // config.num_key_value_heads
    out = np.empty_like(q)
    for head in range(config.num_attention_heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(D)
        scores[np.triu_indices(L, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
    return out.reshape(L, -1) @ w[f"{prefix}.o_proj"].T


def numpy_model(tokens: list[int], w: Weights, config: ModelConfig) -> np.ndarray:
    x = w["model.embed_tokens"][tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = numpy_rms_norm(x, w[f"{prefix}.input_layernorm"], config.rms_norm_eps)
        x = x + numpy_attention(normed, w, f"{prefix}.self_attn", config)
        normed = numpy_rms_norm(x, w[f"{prefix}.post_attention_layernorm"], config.rms_norm_eps)
        gate, up = (normed @ w[f"{prefix}.mlp.{name}_proj"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{prefix}.mlp.down_proj"].T
    x = numpy_rms_norm(x, w["model.norm"], config.rms_norm_eps)
    return x @ w.get("lm_head", w["model.embed_tokens"]).T


def logits_without_cache(model: Model, tokens: list[int]) -> np.ndarray:
    context = NoCacheContext(len(tokens), model.config.head_dim**-0.5)
    return np.array(model(mx.array([tokens], mx.int32), context)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_a_plain_numpy_decoder(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    matrices, vectors = random_weights(config, seed=4)
    weights = {name: np.array(array).astype(np.float64) for name, array in {**matrices, **vectors}.items()}
    tokens = random_prompt(30, seed=4)
    logits = logits_without_cache(dense_model(4, tie_word_embeddings=tied), tokens)
    np.testing.assert_allclose(logits, numpy_model(tokens, weights, config), rtol=1e-3, atol=1e-3)


def test_the_logits_from_pages_are_close_to_those_without_a_cache() -> None:
    tokens = random_prompt(40, seed=5)
    paged = logits_through_pages(dense_model(), tokens, [40], kv_dtype=mx.float32)
    np.testing.assert_allclose(
        np.array(paged), logits_without_cache(dense_model(), tokens), rtol=1e-4, atol=1e-4
    )


def test_the_readable_and_the_fast_model_agree() -> None:
    """Only closely: the packed matmul rounds activations to 16 bits."""
    tokens = random_prompt(50, seed=6)
    with twins():
        tiny_model.cache_clear()
        readable = np.array(logits_through_pages(tiny_model(), tokens, [50]))
    tiny_model.cache_clear()
    fast = np.array(logits_through_pages(tiny_model(), tokens, [50]))
    assert np.corrcoef(readable.ravel(), fast.ravel())[0, 1] > 0.999999


def test_only_the_requested_rows_get_logits() -> None:
    tokens = random_prompt(9, seed=7)
    context = NoCacheContext(9, 32**-0.5)
    everything = tiny_model()(mx.array([tokens], mx.int32), context)
    context.logit_rows = mx.array([8, 2], mx.int32)
    some = tiny_model()(mx.array([tokens], mx.int32), context)
    assert np.array_equal(np.array(some[0]), np.array(everything[0])[[8, 2]])


def test_a_token_never_sees_a_later_one() -> None:
    tokens = random_prompt(CONTEXT, seed=8)
    changed = [*tokens[:60], *random_prompt(CONTEXT - 60, seed=9)]
    first, second = (np.array(logits_through_pages(tiny_model(), t, [CONTEXT])) for t in (tokens, changed))
    assert np.array_equal(first[:60], second[:60])
    assert not np.array_equal(first[60:], second[60:])
