"""One matrix that does the work of several matrices with the same input.

A checkpoint has q_proj, k_proj and v_proj, and gate_proj and up_proj. The model calls one matrix for the
first three and one for the other two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .linear import BiasedLinear, Linear, LinearLike, stack_packed


@dataclass(frozen=True)
class StackedLinear:
    """Several matrices with the same input, called one by one; their outputs are concatenated."""

    parts: tuple[LinearLike, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: x [..., K] -> [..., N1 + N2 + ...]."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def rows(self, ids: mx.array) -> mx.array:
        """Raise TypeError: a stack is not an embedding."""
        raise TypeError("stacked matrices can only be multiplied: looking up rows is not supported")


def stack(parts: Sequence[LinearLike]) -> LinearLike:
    """Join matrices [N1, K], [N2, K], ... with the same input into one, [N1 + N2 + ..., K].

    Called with x [..., K], the result gives [..., N1 + N2 + ...]: the first part's outputs, then the
    second's, and so on. One call starts one operator and reads x once. The first rule that applies decides
    the result:

    1. All parts are `BiasedLinear`: a `BiasedLinear` of their matrices, stacked by these rules, and of their
       joined biases.
    2. `stack_packed(parts)` is not None: return it. It joins matrices that are packed for the compiled
       kernels.
    3. All parts are `Linear`, with weights of one dtype: a `Linear` of the joined weights.
    4. Otherwise: a `StackedLinear`, which leaves every part unchanged.

    Evaluate joined weights and biases with `mx.eval` before you return them; `stack_packed` has done so. MLX
    is lazy: an operation only records its work, and `mx.eval` does it. Without the `mx.eval`, the first
    forward pass would join the matrices of all layers at once, and the weights would be in memory twice.

    >>> both = stack([Linear(mx.array([[1.0], [2.0]])), Linear(mx.array([[30.0]]))])
    >>> both(mx.array([[1.0], [2.0]])).tolist()
    [[1.0, 2.0, 30.0], [2.0, 4.0, 60.0]]
    """
    biased = [part for part in parts if isinstance(part, BiasedLinear)]
    if len(biased) == len(parts):
        matrix = stack([part.matrix for part in biased])
        return BiasedLinear(matrix, _joined([part.bias for part in biased]))
    if (packed := stack_packed(parts)) is not None:
        return packed
    dense = [part for part in parts if isinstance(part, Linear)]
    if len(dense) == len(parts) and len({part.weight.dtype for part in dense}) == 1:
        return Linear(_joined([part.weight for part in dense]))
    return StackedLinear(tuple(parts))


def _joined(arrays: list[mx.array]) -> mx.array:
    """Join arrays along the first axis and evaluate the result, so that the parts can be freed now."""
    joined = mx.concatenate(arrays)
    mx.eval(joined)
    return joined
