"""What passes through a step of a batch manager: the plan that scheduling makes, the logits that come out."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx

from .paged_attention import BlockCopy
from .sequence import Sequence


class StepLogits(Mapping[str, mx.array]):
    """The logits of a step by sequence id, kept as one array: `rows` [R, vocab_size].

    Sequences that were just forked share a row: `row_of[seq_id]` is its index in `rows`.
    """

    def __init__(self, rows: mx.array | None, row_of: dict[str, int]) -> None:
        self.rows = rows
        self.row_of = row_of

    def __getitem__(self, seq_id: str) -> mx.array:
        row = self.row_of[seq_id]
        assert self.rows is not None
        return self.rows[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.row_of)

    def __len__(self) -> int:
        return len(self.row_of)


class Scheduled(NamedTuple):
    """A sequence and the positions start .. stop - 1 that a step computes of it."""

    sequence: Sequence
    start: int
    stop: int


class Plan(NamedTuple):
    """What one step does: the block copies first, then the chunks, packed in this order."""

    copies: list[BlockCopy]
    chunks: list[Scheduled]
