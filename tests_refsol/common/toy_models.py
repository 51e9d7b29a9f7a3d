"""Toy models with random weights, and the tokens that they generate without a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model

from tiny_llm_checkpoints.model_config import ModelConfig

Windows = tuple[int | None, ...]
VOCAB_SIZE = 50


def tiny_config(windows: Windows = (None, None)) -> ModelConfig:
    """One layer per window, None for full attention; all windows have the same size.

    Four query heads on two key and value heads of size 8, a vocabulary of 50, a context of 64 tokens.
    """
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return ModelConfig(
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=len(windows),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        sliding_window=next((window for window in windows if window is not None), None),
        layer_types=tuple(kinds),
    )


@cache
def tiny_model(windows: Windows = (None, None)) -> Model:
    """A model of `tiny_config` with random float32 weights, always the same.

    Its weights are large enough that each token depends on the tokens before it.
    """
    config, rng = tiny_config(windows), np.random.default_rng(0)
    linears, vectors = {}, {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            vectors[name.removesuffix(".weight")] = mx.array(1 + 0.1 * noise)
        else:
            gain = 1.0 if "embed" in name else 2.0 * shape[1] ** -0.5
            linears[name.removesuffix(".weight")] = Linear(mx.array(gain * noise))
    return build_model(config, linears, vectors)


@dataclass
class CountingModel:
    """A model that records the number of tokens of each call. `model` is any object called like `Model`."""

    model: Any
    fed: list[int] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the wrapped model."""
        return self.model.config

    def __call__(self, tokens: mx.array, context: Any) -> mx.array:
        """Record the number of tokens and return the wrapped model's logits."""
        self.fed.append(tokens.shape[1])
        return self.model(tokens, context)


def logits_after(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """The logits [vocab_size] of the next token, without a cache or a batch.

    The result is cached: do not modify the array.
    """
    return _logits_after(model, tuple(tokens))


@cache
def _logits_after(model: Model, tokens: tuple[int, ...]) -> np.ndarray:
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    return np.array(model(mx.array([tokens], mx.int32), context)[0, -1])


def recompute_everything(model: Model, tokens: Sequence[int], max_tokens: int) -> list[int]:
    """The next `max_tokens` most likely tokens, computed without a cache or a batch."""
    known = list(tokens)
    for _ in range(max_tokens):
        known.append(int(logits_after(model, known).argmax()))
    return known[len(tokens) :]
