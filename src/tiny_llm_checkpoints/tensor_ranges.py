"""The byte ranges of tensors in a file, which must not overlap. Knows nothing of file formats."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


class TensorRange(NamedTuple):
    """A tensor's bytes in a file: from `begin` up to, but not including, `end`."""

    begin: int
    end: int
    name: str


def check_no_overlap(ranges: Iterable[TensorRange]) -> list[TensorRange]:
    """Return the ranges in file order. Raises a ValueError that names two tensors that share bytes.

    Otherwise a small file could claim the same bytes for thousands of tensors, which would fill the memory.
    """
    ordered = sorted(ranges)
    for before, after in pairwise(ordered):
        if after.begin < before.end:
            raise ValueError(
                f"tensor {after.name} starts at byte {after.begin}, within tensor {before.name}, "
                f"which ends at {before.end}"
            )
    return ordered
