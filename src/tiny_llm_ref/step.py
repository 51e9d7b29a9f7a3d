"""What passes through a step of a batch manager: the plan that scheduling makes, the logits that come out."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx

from .paged_attention import BlockCopy
from .sequence import Sequence


class StepLogits(Mapping[str, mx.array]):
    """The logits of a step by sequence id, kept as one array: `rows` [R, vocab_size].

    Sequences that were just forked share a row: `row_of[seq_id]` is its index in `rows`. `prompt_rows` are
    those of prompt tokens whose log-probabilities are asked for: the rows of the positions that
    `Sequence.prompt_positions` named, in order.
    """

    def __init__(
        self, rows: mx.array | None, row_of: dict[str, int], prompt_rows: dict[str, range] | None = None
    ) -> None:
        self.rows = rows
        self.row_of = row_of
        self.prompt_rows = prompt_rows or {}

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

    @property
    def is_last(self) -> bool:
        """True where the chunk ends at the last known token: the next one can be sampled."""
        return self.stop == self.sequence.num_tokens

    @property
    def logit_positions(self) -> list[int]:
        """The positions that need logits: those of prompt log-probabilities, then the last one."""
        positions = list(self.sequence.prompt_positions(self.start, self.stop))
        return [*positions, self.stop - 1] if self.is_last else positions


class Plan(NamedTuple):
    """What one step does: the block copies first, then the chunks, packed in this order."""

    copies: list[BlockCopy]
    chunks: list[Scheduled]
