"""Small arrays whose attention can be computed by hand, and random ones for the NumPy oracles."""

import mlx.core as mx
import numpy as np

EMPTY = 30.0  # fills slots without a token: large enough that reading one changes the result


def random_qkv(
    seed: int, queries: tuple[int, ...], keys: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random queries of one shape, keys and values of another: such as (B, H, L, D) and (B, Hkv, S, D)."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in (queries, keys, keys))
    return q, k, v


def floats(array: mx.array) -> np.ndarray:
    """A NumPy float32 copy of an array of any float type, since NumPy has no bfloat16."""
    return np.array(array.astype(mx.float32))


def column(*values: float) -> mx.array:
    """Values of one sequence and one head of size 1: [1, 1, L, 1]."""
    return mx.array(values, mx.float32).reshape(1, 1, -1, 1)


def queries(heads: int, length: int) -> mx.array:
    """Queries of ones, [1, H, L, 2]: with keys of zeros all scores are equal."""
    return mx.ones((1, heads, length, 2))


def numbers(*values: float) -> mx.array:
    """A pool of one head of size 2, blocks of 2 tokens: [num_blocks, 1, 2, 2].

    Token i holds `values[i]` and a zero.
    """
    return mx.array([[value, 0] for value in values], mx.float32).reshape(-1, 1, 2, 2)
