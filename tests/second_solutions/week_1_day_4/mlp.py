"""The gated network by the tanh form of the sigmoid."""

from dataclasses import dataclass

import mlx.core as mx

from .linear import LinearLike


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """sigmoid(x) = (1 + tanh(x / 2)) / 2."""
    opened = 0.5 * (1 + mx.tanh(0.5 * gate))
    return up * (gate * opened)


@dataclass(frozen=True)
class MLP:
    """The gated feed-forward network: down(swiglu(gate(x), up(x))), with I hidden values for each token.

    gate_up_proj: the checkpoint's gate_proj and up_proj in one matrix, [..., E] -> [..., 2 I]: the I gates
        first, then the I values for `up`.
    down_proj: [..., I] -> [..., E].
    """

    gate_up_proj: LinearLike
    down_proj: LinearLike

    def __call__(self, x: mx.array) -> mx.array:
        """The hidden values are cut in the middle by slices."""
        hidden = self.gate_up_proj(x)
        middle = hidden.shape[-1] // 2
        return self.down_proj(swiglu(hidden[..., :middle], hidden[..., middle:]))
