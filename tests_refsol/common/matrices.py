"""Matrices of toy layers."""

import mlx.core as mx
import numpy as np
from tiny_llm.linear import Linear


def matrix(weight: np.ndarray) -> Linear:
    """A dense float32 matrix from its weight [outputs, inputs]."""
    return Linear(mx.array(weight.astype(np.float32)))
