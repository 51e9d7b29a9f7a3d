"""The feed-forward network of a block. Source: Shazeer, "GLU Variants Improve Transformer" (2020)."""

from dataclasses import dataclass

import mlx.core as mx

from .kernels import accelerated
from .linear import LinearLike


@accelerated(compiled="swiglu")
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute silu(gate) * up, value by value: the gate decides how much of `up` passes.

    Both [..., I] -> [..., I]. silu(x) = x * sigmoid(x) with sigmoid(x) = 1 / (1 + e^-x): close to x for large
    x, close to 0 for very negative x, and slightly below 0 for other negative x. With up = 1, gates of 100
    and -100 must give 100 and 0, although e^100 is inf in float32 and inf / inf is nan: `mx.sigmoid` is safe.

    >>> swiglu(mx.array([0.0, 100.0]), mx.array([5.0, 0.5])).tolist()
    [0.0, 50.0]
    """
    return gate * mx.sigmoid(gate) * up


@dataclass(frozen=True)
class MLP:
    """The gated feed-forward network: down(swiglu(gate(x), up(x))), with I hidden values for each token.

    gate_up_proj: the checkpoint's gate_proj and up_proj in one matrix, [..., E] -> [..., 2 I]: first the I
        gates, then the I values for `up`.
    down_proj: [..., I] -> [..., E].
    """

    gate_up_proj: LinearLike
    down_proj: LinearLike

    def __call__(self, x: mx.array) -> mx.array:
        """Run the network on each token separately: x [B, L, E] -> [B, L, E].

        Call each matrix once, like a function: it is not an array but an object, dense or quantized, with or
        without a bias. In MLX `mx.split(a, 2)` splits the first axis unless you name another.

        >>> from tiny_llm.linear import Linear
        >>> mlp = MLP(Linear(mx.array([[100.0], [3.0]])), Linear(mx.array([[2.0]])))  # gate 100, up 3, down 2
        >>> mlp(mx.array([[[1.0]]])).tolist()
        [[[600.0]]]
        """
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, L, I] each
        return self.down_proj(swiglu(gate, up))
