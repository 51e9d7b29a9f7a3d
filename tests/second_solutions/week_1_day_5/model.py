"""The decoder: a stream that is reduced over the layers."""

from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeVar

import mlx.core as mx

from tiny_llm_checkpoints.model_config import GELU, ModelConfig

from .block import TransformerBlock
from .gelu_mlp import GeluMLP
from .gemma_block import GemmaBlock
from .grouped_attention import Attention
from .kv_context import KVContext
from .linear import LinearLike, ScaledRows
from .mlp import MLP
from .norm import rms_norm
from .rope import inverse_frequencies
from .stacked_linear import stack

T_co = TypeVar("T_co", covariant=True)
Block = TransformerBlock | GemmaBlock


class ByName(Protocol[T_co]):
    """Parameters by name: a dict, or an object that makes each parameter when it is asked for."""

    def __getitem__(self, name: str, /) -> T_co:
        """Return the parameter of that name, such as `linears["lm_head"]`."""


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; its parts are named as in the checkpoint.

    embed_tokens: the embedding [vocab_size, E]; its `rows` turns token ids into vectors.
    norm: [E], the weight of the norm after the last layer.
    lm_head: the output projection, [..., E] -> [..., vocab_size]; may be the embedding itself.
    """

    config: ModelConfig
    embed_tokens: LinearLike
    layers: tuple[Block, ...]
    norm: mx.array
    lm_head: LinearLike

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """The stream is reduced over the layers."""
        stream = reduce(lambda x, layer: layer(x, context), self.layers, self.embed_tokens.rows(tokens))
        rows = context.logit_rows
        chosen = stream if rows is None else mx.take(stream, rows, axis=1)
        return self.lm_head(rms_norm(chosen, self.norm, self.config.rms_norm_eps))


def build_model(config: ModelConfig, linears: ByName[LinearLike], vectors: ByName[mx.array]) -> Model:
    """Layer after layer, then what stands around them."""
    layers = []
    for layer, inv_freq in enumerate(layer_frequencies(config)):
        layers.append(build_block(config, layer, inv_freq, linears, vectors))
    embedding = linears["model.embed_tokens"]
    lm_head = linears["lm_head"] if not config.tie_word_embeddings else embedding
    if config.scale_embeddings:
        embedding = ScaledRows(embedding, config.hidden_size**0.5)
    return Model(config, embedding, tuple(layers), vectors["model.norm"], lm_head)


def layer_frequencies(config: ModelConfig) -> list[mx.array]:
    """The rotary frequencies of each layer, [D/2]; windowed layers may have a base of their own."""
    full = inverse_frequencies(config.head_dim, config.rope_theta)
    if config.rope_factors is not None:
        full = full / mx.array(config.rope_factors, mx.float32)
    windowed = full
    if config.rope_local_theta is not None:
        windowed = inverse_frequencies(config.head_dim, config.rope_local_theta)
    return [full if window is None else windowed for window in config.windows]


def build_block(
    config: ModelConfig,
    layer: int,
    inv_freq: mx.array,
    linears: ByName[LinearLike],
    vectors: ByName[mx.array],
) -> Block:
    """Assemble one layer; inv_freq: its rotary frequencies. It asks for each of its parameters once."""
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    self_attn = Attention(
        layer=layer,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        inv_freq=inv_freq,
        qkv_proj=stack([linears[f"{attention}.{name}_proj"] for name in "qkv"]),
        o_proj=linears[f"{attention}.o_proj"],
        q_norm=vectors[f"{attention}.q_norm"] if config.qk_norm else None,
        k_norm=vectors[f"{attention}.k_norm"] if config.qk_norm else None,
        eps=config.rms_norm_eps,
    )
    kind_of_mlp = GeluMLP if config.hidden_act == GELU else MLP
    feed_forward = kind_of_mlp(
        gate_up_proj=stack([linears[f"{mlp}.{name}_proj"] for name in ("gate", "up")]),
        down_proj=linears[f"{mlp}.down_proj"],
    )
    norms = {f"{name}_layernorm": vectors[f"{prefix}.{name}_layernorm"] for name in config.layer_norms}
    kind_of_block = GemmaBlock if config.sandwich_norm else TransformerBlock
    return kind_of_block(self_attn=self_attn, mlp=feed_forward, **norms, eps=config.rms_norm_eps)
