"""Which bytes of a file belong to which tensor; no two tensors may share one. Knows no file format."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


class TensorRange(NamedTuple):
    """The bytes of a file from `begin` up to, but not including, `end`."""

    begin: int
    end: int
    name: str


def check_no_overlap(ranges: Iterable[TensorRange]) -> list[TensorRange]:
    """The ranges in the order of the file. Raises ValueError naming two that share bytes.

    A file of a few bytes could otherwise claim them for thousands of tensors, and fill the memory.
    """
    ordered = sorted(ranges)
    for before, after in pairwise(ordered):
        if after.begin < before.end:
            raise ValueError(
                f"tensor {after.name} begins at byte {after.begin}, within tensor {before.name}, "
                f"which ends at {before.end}"
            )
    return ordered
