# A second solution of day 1.4, written from the docstrings alone.
"""The feed-forward half of a block. Source: Shazeer, "GLU Variants Improve Transformer" (2020)."""

from dataclasses import dataclass

import mlx.core as mx

from .linear import LinearLike


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Let one half of the hidden values decide how much of the other passes: silu(gate) * up, value by value.

    Both [..., I] -> [..., I]. silu(x) = x * sigmoid(x) with sigmoid(x) = 1 / (1 + e^-x): close to x for large
    x, close to 0 for very negative x, and slightly below 0 in between. Gates of 100 and -100 must give 100
    and 0: e^100 is inf in float32, and inf / inf is nan. `mx.sigmoid` is safe.

    >>> swiglu(mx.array([0.0, 100.0]), mx.array([5.0, 0.5])).tolist()
    [0.0, 50.0]
    """
    return gate * mx.sigmoid(gate) * up


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
        """Run the network on every token by itself: x [B, L, E] -> [B, L, E].

        Call each matrix once; it is an object, dense or quantized, with a bias or without, and not an array.
        In MLX `mx.split(a, 2)` cuts the first axis unless another is named.

        >>> from tiny_llm.linear import Linear
        >>> mlp = MLP(Linear(mx.array([[100.0], [3.0]])), Linear(mx.array([[2.0]])))  # gate 100, up 3, down 2
        >>> mlp(mx.array([[[1.0]]])).tolist()
        [[[600.0]]]
        """
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(swiglu(gate, up))
