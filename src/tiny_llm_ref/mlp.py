"""The feed-forward half of a block. Source: Shazeer, "GLU Variants Improve Transformer" (2020)."""

from dataclasses import dataclass

import mlx.core as mx

from .kernels import accelerated
from .linear import LinearLike


@accelerated(compiled="swiglu")
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up with silu(x) = x * sigmoid(x); both [..., I] -> [..., I]."""
    return gate * mx.sigmoid(gate) * up


@dataclass(frozen=True)
class MLP:
    """down(swiglu(gate(x), up(x))), through I = intermediate_size.

    gate_up_proj is the checkpoint's gate_proj and up_proj, stacked: called with [..., E] it gives [..., 2 I],
    the gate's I numbers first. down_proj gives [..., E] for [..., I].
    """

    gate_up_proj: LinearLike
    down_proj: LinearLike

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, E] -> [B, L, E]."""
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, L, I] each
        return self.down_proj(swiglu(gate, up))
