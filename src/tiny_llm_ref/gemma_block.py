"""Gemma's block: attention and MLP are normalised before and after, and the MLP's gate is a GELU.

Sources: Gemma 3's technical report (2025); Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), whose
tanh approximation this is; Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from dataclasses import dataclass
from math import pi, sqrt

import mlx.core as mx

from .grouped_attention import Attention
from .kv_context import KVContext
from .mlp import MLP
from .norm import rms_norm

_LINEAR = sqrt(8 / pi)
_CUBIC = 0.044715 * _LINEAR


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, both [..., I] -> [..., I].

    gelu(x) = x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3), computed as x sigmoid(2 z), which
    is the same and takes fewer steps.
    """
    return gate * mx.sigmoid(gate * (_LINEAR + _CUBIC * (gate * gate))) * up


class GeluMLP(MLP):
    """The MLP with a GELU for its gate: down(geglu(gate(x), up(x)))."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, E] -> [B, L, E]."""
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, L, I] each
        return self.down_proj(geglu(gate, up))


@dataclass(frozen=True)
class GemmaBlock:
    """Residual block with four norms; parameter names are the checkpoint's.

    The norms' weights are what normalised values are multiplied by; a reader of files that store them
    less one has added it.
    """

    self_attn: Attention
    mlp: MLP
    input_layernorm: mx.array
    post_attention_layernorm: mx.array
    pre_feedforward_layernorm: mx.array
    post_feedforward_layernorm: mx.array
    eps: float

    def __call__(self, x: mx.array, context: KVContext) -> mx.array:
        """x [B, L, E] -> [B, L, E]."""
        attended = self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        x = x + rms_norm(attended, self.post_attention_layernorm, self.eps)
        fed = self.mlp(rms_norm(x, self.pre_feedforward_layernorm, self.eps))
        return x + rms_norm(fed, self.post_feedforward_layernorm, self.eps)
