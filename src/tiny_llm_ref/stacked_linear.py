"""One matrix that does the work of several over the same input.

A checkpoint has q_proj, k_proj and v_proj, and gate_proj and up_proj; the model calls one matrix for each
group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .linear import BiasedLinear, Linear, LinearLike, stack_packed


@dataclass(frozen=True)
class StackedLinear:
    """Several matrices over the same input, called one by one; their outputs lie side by side."""

    parts: tuple[LinearLike, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N1 + N2 + ...]."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def rows(self, ids: mx.array) -> mx.array:
        """Raise TypeError: a stack is not a table."""
        raise TypeError("a stack of matrices is multiplied with, never looked up")


def stack(parts: Sequence[LinearLike]) -> LinearLike:
    """Join matrices [N1, K], [N2, K], ... over the same input into one, [N1 + N2 + ..., K].

    Called with x [..., K], it gives [..., N1 + N2 + ...]: the first part's outputs, then the second's, and so
    on. One call starts one operator and reads x once. The first case that fits decides:

    - all parts are `BiasedLinear`: a `BiasedLinear` of their matrices, stacked by these rules, and of their
      biases, joined;
    - `stack_packed(parts)` is not None: that; it joins matrices that are packed for the compiled kernels;
    - all are `Linear`, with weights of one dtype: a `Linear` of the joined weights;
    - otherwise: a `StackedLinear`, which leaves every part as it is.

    Evaluate what was joined with `mx.eval` before you return it. MLX is lazy: otherwise the first forward
    pass would join the matrices of all layers at once, and the weights would be in memory twice. Weights and
    biases need it; what `stack_packed` returns is evaluated already.

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
    """Arrays joined along the first axis and evaluated, so that each part can be freed now."""
    joined = mx.concatenate(arrays)
    mx.eval(joined)
    return joined
