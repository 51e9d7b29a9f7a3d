# A second solution of day 1.5, written from the docstrings alone.
"""One transformer block: attention and MLP each read a normalised copy of the stream and add to it."""

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
        """Run both halves on the stream x [B, L, E] -> [B, L, E].

        Attention, called with the context, reads the stream normalised by `input_layernorm`; its output is
        added to the stream. The MLP reads that sum normalised by `post_attention_layernorm`; its output is
        added to the sum. The stream itself is never normalised: if both halves give 0, x comes out as it was.
        `eps` goes into both norms. In the example attention gives back what it reads, and the MLP gives 0.

        >>> ones, no_mlp = mx.ones(2), mx.zeros_like
        >>> block = TransformerBlock(lambda x, context: x, no_mlp, ones, ones, 0.0)
        >>> block(mx.array([[[4.0, 4.0]]]), None).tolist()
        [[[5.0, 5.0]]]
        """
        x = x + self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps))
