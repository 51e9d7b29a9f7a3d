"""One transformer block: attention and the MLP each read a normalized copy of the stream and add to it.

The stream is the array [B, L, E] that passes from layer to layer: one vector for each token.
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
class TransformerBlock:
    """A pre-norm residual block: each part reads a normalized copy of the stream, and its output is added.

    The parts are named as in the checkpoint.

    input_layernorm, post_attention_layernorm: [E], the weights of the norms before attention and before the
        MLP. The second is named by its place, which is after attention and so before the MLP.
    """

    self_attn: Attention
    mlp: MLP
    input_layernorm: mx.array
    post_attention_layernorm: mx.array
    eps: float

    @accelerated(compiled=run_fused, takes=can_fuse)
    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """Run attention, then the MLP, on the stream x [B, L, E] -> [B, L, E].

        Call attention with the stream, normalized with `input_layernorm`, and the context; add its output to
        the stream. Call the MLP with that sum, normalized with `post_attention_layernorm`; add its output to
        the sum. The stream itself is never normalized: if both parts return 0, the result is x. Both norms
        use `eps`.

        In the example attention returns its input, and the MLP returns 0.

        >>> ones, no_mlp = mx.ones(2), mx.zeros_like
        >>> block = TransformerBlock(lambda x, context: x, no_mlp, ones, ones, 0.0)
        >>> block(mx.array([[[4.0, 4.0]]]), None).tolist()  # (4, 4), plus (1, 1) from attention
        [[[5.0, 5.0]]]
        """
        x = x + self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps))
