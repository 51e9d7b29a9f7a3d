"""Gemma's feed-forward network: the gate is a GELU.

Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), whose tanh approximation this is;
Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from math import pi, sqrt

import mlx.core as mx

from .kernels import accelerated
from .mlp import MLP

_LINEAR = sqrt(8 / pi)
_CUBIC = 0.044715 * _LINEAR


@accelerated(compiled="geglu")
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute gelu(gate) * up, value by value: both [..., I] -> [..., I].

    gelu(x) = x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3), computed as x sigmoid(2 z), which
    is equal and takes fewer operations.
    """
    return gate * mx.sigmoid(gate * (_LINEAR + _CUBIC * (gate * gate))) * up


class GeluMLP(MLP):
    """The MLP with a GELU gate: down(geglu(gate(x), up(x)))."""

    def __call__(self, x: mx.array) -> mx.array:
        """Run the network on each token separately: x [B, L, E] -> [B, L, E]."""
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, L, I] each
        return self.down_proj(geglu(gate, up))
