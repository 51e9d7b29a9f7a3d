"""The decoder: look up the tokens, run the blocks, normalize, project to logits.

It knows nothing of caches, pages, batches or quantization, so all weeks of the course use the same model: its
matrices are objects that the loader made, and it hands keys and values to the context.
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
from .linear import LinearLike, ScaledRows
from .mlp import MLP
from .norm import rms_norm
from .rope import inverse_frequencies
from .stacked_linear import stack

T_co = TypeVar("T_co", covariant=True)
Block = TransformerBlock | GemmaBlock


class ByName(Protocol[T_co]):
    """Parameters by name: a dict, or an object that makes each parameter when it is looked up."""

    def __getitem__(self, name: str, /) -> T_co:
        """Return the parameter of that name, such as `linears["lm_head"]`."""


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; its parts are named as in the checkpoint.

    config: the hyper-parameters that it was built from.
    embed_tokens: the embedding [vocab_size, E]; its method `rows` turns token ids into vectors.
    norm: [E], the weight of the norm after the last layer.
    lm_head: the output projection, [..., E] -> [..., vocab_size]; it may be the embedding's matrix.
    """

    config: ModelConfig
    embed_tokens: LinearLike
    layers: tuple[Block, ...]
    norm: mx.array
    lm_head: LinearLike

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """Compute the logits of next tokens: token ids [B, L] int32 -> [B, R, vocab_size].

        Logits are scores, one for each token of the vocabulary; the most likely next token has the highest.
        Turn the tokens into vectors, pass these through every layer with the context, then through the last
        norm (with `config.rms_norm_eps`) and `lm_head`.

        `context.logit_rows`, [R] int32, lists the rows along L that need logits, the same for every sequence;
        the result has them in this order. None means all rows, R = L. Choose the rows after the last layer,
        because until then other tokens attend to every row. Choose them before the last norm, so that the
        model's largest matrix multiplies only R rows.

        >>> from tiny_llm.linear import Linear
        >>> from types import SimpleNamespace as Some
        >>> table = Linear(mx.array([[4.0, 4.0], [-2.0, 2.0]]))  # two tokens, and no layers
        >>> model = Model(Some(rms_norm_eps=0.0), table, (), mx.ones(2), table)
        >>> model(mx.array([[0, 1]]), Some(logit_rows=None)).tolist()  # normalized: (1, 1) and (-1, 1)
        [[[8.0, 0.0], [0.0, 4.0]]]
        """
        x = self.embed_tokens.rows(tokens)  # [B, L, E]
        for layer in self.layers:
            x = layer(x, context)
        if context.logit_rows is not None:
            x = x[:, context.logit_rows]
        return self.lm_head(rms_norm(x, self.norm, self.config.rms_norm_eps))


def build_model(config: ModelConfig, linears: ByName[LinearLike], vectors: ByName[mx.array]) -> Model:
    """Assemble a model from its parameters, named as in a checkpoint but without `.weight`.

    linears: the matrices. vectors: the norms' weights. Both read a parameter from the file when it is looked
    up, and do not keep it. So look up each name once, and only names that `config.parameter_shapes` lists.

    - `embed_tokens` is the matrix "model.embed_tokens". If `config.scale_embeddings` (Gemma), wrap it in
      `ScaledRows(matrix, scale)`: rows that are looked up are then multiplied by the scale,
      sqrt(hidden_size).
    - `layers` is a tuple: `build_block` for each layer from 0 on, with that layer's array of
      `layer_frequencies(config)`.
    - `norm` is the vector "model.norm".
    - `lm_head` is the matrix "lm_head". If `config.tie_word_embeddings`, no such matrix exists, and `lm_head`
      is the object that was looked up as "model.embed_tokens", not its `ScaledRows`. So the matrix is in
      memory once, and logits are not multiplied by Gemma's scale.

    >>> from tiny_llm.loader import load_model
    >>> model = load_model(None).model  # the embedded model, assembled by this function
    >>> len(model.layers), model.lm_head is model.embed_tokens
    (30, True)
    """
    table = linears["model.embed_tokens"]
    return Model(
        config=config,
        embed_tokens=ScaledRows(table, sqrt(config.hidden_size)) if config.scale_embeddings else table,
        layers=tuple(
            build_block(config, layer, inv_freq, linears, vectors)
            for layer, inv_freq in enumerate(layer_frequencies(config))
        ),
        norm=vectors["model.norm"],
        lm_head=table if config.tie_word_embeddings else linears["lm_head"],
    )


def layer_frequencies(config: ModelConfig) -> list[mx.array]:
    """Return the rotary frequencies of each layer, [D/2]; windowed layers may have a different base."""
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
    """Assemble one layer; inv_freq: its rotary frequencies. Looks up each of its parameters once."""
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
    mlp_class = GeluMLP if config.hidden_act == GELU else MLP
    feed_forward = mlp_class(
        gate_up_proj=stack([linears[f"{mlp}.{name}_proj"] for name in ("gate", "up")]),
        down_proj=linears[f"{mlp}.down_proj"],
    )
    norms = {f"{name}_layernorm": vectors[f"{prefix}.{name}_layernorm"] for name in config.layer_norms}
    block_class = GemmaBlock if config.sandwich_norm else TransformerBlock
    return block_class(self_attn=self_attn, mlp=feed_forward, **norms, eps=config.rms_norm_eps)
