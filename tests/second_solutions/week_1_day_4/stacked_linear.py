"""One matrix for several: forms told apart by their classes."""

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
    """The classes of all parts decide."""
    kinds = {type(part) for part in parts}
    if kinds == {BiasedLinear}:
        bias = mx.concatenate([part.bias for part in parts], axis=0)
        mx.eval(bias)
        return BiasedLinear(bias=bias, matrix=stack([part.matrix for part in parts]))
    packed = stack_packed(parts)
    if packed is not None:
        return packed
    if kinds != {Linear} or any(part.weight.dtype != parts[0].weight.dtype for part in parts):
        return StackedLinear(tuple(parts))
    weight = mx.concatenate([part.weight for part in parts], axis=0)
    mx.eval(weight)
    return Linear(weight)
