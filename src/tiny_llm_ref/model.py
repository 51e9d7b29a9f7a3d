"""The decoder: embed, thirty-odd blocks, normalise, project to logits. One file for every week.

Knows nothing of caches, pages, batches or quantization: its layers are objects that the loader made,
and keys and values go to the context.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Protocol, TypeVar

import mlx.core as mx

from tiny_llm_checkpoints.model_config import GELU, ModelConfig

from .block import TransformerBlock
from .gelu_mlp import GeluMLP
from .gemma_block import GemmaBlock
from .grouped_attention import Attention
from .kv_context import KVContext
from .linear import LinearLike, ScaledRows, stack
from .mlp import MLP
from .norm import rms_norm
from .rope import inverse_frequencies

T_co = TypeVar("T_co", covariant=True)
Block = TransformerBlock | GemmaBlock


class ByName(Protocol[T_co]):
    """Parameters by name: a dict, or something that makes each when it is asked for."""

    def __getitem__(self, name: str, /) -> T_co:
        """The parameter of that name."""


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; parameter names are the checkpoint's."""

    config: ModelConfig
    embed_tokens: LinearLike
    layers: tuple[Block, ...]
    norm: mx.array
    lm_head: LinearLike

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """Token ids [B, L] (int32) -> logits [B, R, vocab_size] of the context's `logit_rows` (None: all)."""
        x = self.embed_tokens.rows(tokens)  # [B, L, E]
        for layer in self.layers:
            x = layer(x, context)
        if context.logit_rows is not None:
            x = x[:, context.logit_rows]
        return self.lm_head(rms_norm(x, self.norm, self.config.rms_norm_eps))


def build_model(config: ModelConfig, linears: ByName[LinearLike], vectors: ByName[mx.array]) -> Model:
    """Assemble a model from its parameters by their checkpoint names, without the `.weight` at the end.

    Each is asked for once, layer after layer, so whoever makes them need not hold them all.
    """
    full, windowed = _inverse_frequencies(config)
    table = linears["model.embed_tokens"]
    return Model(
        config=config,
        embed_tokens=ScaledRows(table, sqrt(config.hidden_size)) if config.scale_embeddings else table,
        layers=tuple(
            _build_block(config, layer, full if window is None else windowed, linears, vectors)
            for layer, window in enumerate(config.windows)
        ),
        norm=vectors["model.norm"],
        lm_head=table if config.tie_word_embeddings else linears["lm_head"],
    )


def _inverse_frequencies(config: ModelConfig) -> tuple[mx.array, mx.array]:
    """[D/2] each: those of layers that see everything, and those of windowed layers."""
    full = inverse_frequencies(config.head_dim, config.rope_theta)
    if config.rope_factors is not None:
        full = full / mx.array(config.rope_factors, mx.float32)
    if config.rope_local_theta is None:
        return full, full
    return full, inverse_frequencies(config.head_dim, config.rope_local_theta)


def _build_block(
    config: ModelConfig,
    layer: int,
    inv_freq: mx.array,
    linears: ByName[LinearLike],
    vectors: ByName[mx.array],
) -> Block:
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    self_attn = Attention(
        layer=layer,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        inv_freq=inv_freq,
        qkv_proj=stack(*(linears[f"{attention}.{name}_proj"] for name in "qkv")),
        o_proj=linears[f"{attention}.o_proj"],
        q_norm=vectors[f"{attention}.q_norm"] if config.qk_norm else None,
        k_norm=vectors[f"{attention}.k_norm"] if config.qk_norm else None,
        eps=config.rms_norm_eps,
    )
    kind_of_mlp = GeluMLP if config.hidden_act == GELU else MLP
    feed_forward = kind_of_mlp(
        gate_up_proj=stack(linears[f"{mlp}.gate_proj"], linears[f"{mlp}.up_proj"]),
        down_proj=linears[f"{mlp}.down_proj"],
    )
    norms = {f"{name}_layernorm": vectors[f"{prefix}.{name}_layernorm"] for name in config.layer_norms}
    kind_of_block = GemmaBlock if config.sandwich_norm else TransformerBlock
    return kind_of_block(self_attn=self_attn, mlp=feed_forward, **norms, eps=config.rms_norm_eps)
