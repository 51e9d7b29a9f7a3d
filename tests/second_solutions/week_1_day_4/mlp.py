# A second solution of day 1.4, written only from the docstrings.
"""The feed-forward network of a block. Source: Shazeer, "GLU Variants Improve Transformer" (2020)."""

import mlx.core as mx


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class MLP:
    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(swiglu(gate, up))
