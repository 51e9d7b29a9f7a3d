# A second solution of day 1.5, written only from the docstrings.
"""One transformer block: attention and the MLP each read a normalized copy of the stream and add to it.

The stream is the array [B, L, E] that passes from layer to layer: one vector for each token.
"""

import mlx.core as mx

from .kv_context import KVContext
from .norm import rms_norm


class TransformerBlock:
    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        x = x + self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps))
