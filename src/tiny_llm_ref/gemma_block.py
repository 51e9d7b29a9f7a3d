"""Gemma's block: the inputs and the outputs of attention and MLP are normalized.

Source: Gemma 3's report (2025).
"""

from dataclasses import dataclass

import mlx.core as mx

from .fused_block import can_fuse, run_fused
from .grouped_attention import Attention
from .kernels import accelerated
from .kv_context import KVContext
from .mlp import MLP
from .norm import rms_norm


@dataclass(frozen=True, eq=False)
class GemmaBlock:
    """A residual block with four norms; its parts are named as in the checkpoint.

    Normalized values are multiplied by the norms' weights. Some files store these weights minus 1; the reader
    of such a file adds the 1.
    """

    self_attn: Attention
    mlp: MLP
    input_layernorm: mx.array
    post_attention_layernorm: mx.array
    pre_feedforward_layernorm: mx.array
    post_feedforward_layernorm: mx.array
    eps: float

    @accelerated(compiled=run_fused, takes=can_fuse)
    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """Run attention, then the MLP, on the stream x [B, L, E] -> [B, L, E]."""
        attended = self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        x = x + rms_norm(attended, self.post_attention_layernorm, self.eps)
        fed = self.mlp(rms_norm(x, self.pre_feedforward_layernorm, self.eps))
        return x + rms_norm(fed, self.post_feedforward_layernorm, self.eps)
