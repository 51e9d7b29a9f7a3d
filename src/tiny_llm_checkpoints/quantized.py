"""A quantized matrix in MLX's layout: the form that readers return and that the engine multiplies with."""

from typing import NamedTuple

import mlx.core as mx


class Quantized(NamedTuple):
    """A matrix [N, K] in MLX's quantized layout.

    weight [N, K * bits / 32] uint32, scales and biases [N, K / group_size].
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int
