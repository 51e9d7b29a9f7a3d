"""One transformer block: attention and feed-forward, each normalised before and added to the stream."""

from dataclasses import dataclass

import mlx.core as mx

from .fused_block import can_fuse, run_fused
from .grouped_attention import Attention
from .kernels import accelerated
from .kv_context import KVContext
from .mlp import MLP
from .norm import rms_norm


@dataclass(frozen=True, eq=False)
class TransformerBlock:
    """Pre-norm residual block; parameter names are the checkpoint's."""

    self_attn: Attention
    mlp: MLP
    input_layernorm: mx.array
    post_attention_layernorm: mx.array
    eps: float

    @accelerated(compiled=run_fused, takes=can_fuse)
    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """x [B, L, E] -> [B, L, E]."""
        x = x + self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps))
