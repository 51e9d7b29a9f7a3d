"""The block: both halves in one loop."""

from dataclasses import dataclass

import mlx.core as mx

from .grouped_attention import Attention
from .kv_context import KVContext
from .mlp import MLP
from .norm import rms_norm


@dataclass(frozen=True, eq=False)
class TransformerBlock:
    """A pre-norm residual block; its parts are named as in the checkpoint.

    input_layernorm, post_attention_layernorm: [E], the weights of the norms before attention and before the
        MLP. The second name says where it is: after attention, so before the MLP.
    """

    self_attn: Attention
    mlp: MLP
    input_layernorm: mx.array
    post_attention_layernorm: mx.array
    eps: float

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """Both halves are the same step with another function."""
        halves = (
            (self.input_layernorm, lambda normed: self.self_attn(normed, context)),
            (self.post_attention_layernorm, self.mlp),
        )
        for weight, half in halves:
            x = half(rms_norm(x, weight, self.eps)) + x
        return x
