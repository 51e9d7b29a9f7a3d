# A second solution of day 1.4, written from the docstrings alone.
"""One matrix that does the work of several over the same input.

A checkpoint has q_proj, k_proj and v_proj, and gate_proj and up_proj; the model calls one matrix for each
group.
"""

from collections.abc import Sequence

import mlx.core as mx

from .linear import BiasedLinear, Linear, LinearLike, stack_packed


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
    pass would join the matrices of all layers at once, and the weights would be in memory twice.

    >>> both = stack([Linear(mx.array([[1.0], [2.0]])), Linear(mx.array([[30.0]]))])
    >>> both(mx.array([[1.0], [2.0]])).tolist()
    [[1.0, 2.0, 30.0], [2.0, 4.0, 60.0]]
    """
    if all(isinstance(part, BiasedLinear) for part in parts):
        bias = mx.concatenate([part.bias for part in parts])
        mx.eval(bias)
        return BiasedLinear(stack([part.matrix for part in parts]), bias)
    packed = stack_packed(parts)
    if packed is not None:
        return packed
    if all(isinstance(part, Linear) for part in parts) and len({part.weight.dtype for part in parts}) == 1:
        weight = mx.concatenate([part.weight for part in parts])
        mx.eval(weight)
        return Linear(weight)
    return StackedLinear(tuple(parts))
