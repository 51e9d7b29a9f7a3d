"""The data of a batch manager's step: the plan that scheduling makes, and the resulting logits."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx

from .paged_attention import BlockCopy
from .sequence import Sequence, SequenceState

S = TypeVar("S", bound=Sequence)


class StepLogits(Mapping[str, mx.array]):
    """The logits of a step by sequence id, kept as one array: `rows` [R, vocab_size].

    row_of: the index in `rows` of each sequence's row; sequences that were just forked share one. The rows
    after the tokens of a sequence's draft follow it.
    prompt_rows: by sequence id, the indices in `rows` from which prompt log-probabilities are computed: one
    for each position that `Sequence.prompt_positions` returned, in order. num_tokens: tokens that the step
    computed.
    """

    def __init__(
        self,
        rows: mx.array | None,
        row_of: dict[str, int],
        prompt_rows: dict[str, range] | None = None,
        num_tokens: int = 0,
    ) -> None:
        self.rows = rows
        self.row_of = row_of
        self.prompt_rows = prompt_rows or {}
        self.num_tokens = num_tokens

    def __getitem__(self, seq_id: str) -> mx.array:
        row = self.row_of[seq_id]
        assert self.rows is not None
        return self.rows[row]

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self.row_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.row_of)

    def __len__(self) -> int:
        return len(self.row_of)


class Scheduled(NamedTuple, Generic[S]):
    """A chunk to compute: the positions start .. stop - 1 of a sequence, and the copies to make first.

    With speculation, the last positions may be those of the sequence's draft.
    """

    sequence: S
    start: int
    stop: int
    copies: Seq[BlockCopy] = ()

    @property
    def is_last(self) -> bool:
        """True if the chunk has the last known token, so the next token can be sampled."""
        return self.stop >= self.sequence.num_tokens

    @property
    def logit_positions(self) -> list[int]:
        """The positions that need logits: of prompt log-probabilities, of the last token, of the draft."""
        positions = list(self.sequence.prompt_positions(self.start, self.stop))
        return [*positions, *range(self.sequence.num_tokens - 1, self.stop)]


@dataclass
class Plan(Generic[S]):
    """What one step does, in this order: swap blocks out, swap blocks in, make all copies, compute chunks.

    chunks: for each sequence of the step, the tokens that it computes. swapped_out: pairs of a block of the
    pool and the host block that it is copied to. swapped_in: for each block of the pool that is filled from
    the host, the host block. swapped_out_sequences, swapped_in_sequences: the sequences whose blocks these
    are.
    """

    chunks: list[Scheduled[S]] = field(default_factory=list)
    swapped_out: list[tuple[int, int]] = field(default_factory=list)
    swapped_in: dict[int, int] = field(default_factory=dict)
    swapped_out_sequences: list[S] = field(default_factory=list)
    swapped_in_sequences: list[S] = field(default_factory=list)

    @property
    def copies(self) -> list[BlockCopy]:
        """The copies of all chunks; all sources are read before any target is written."""
        return [copy for chunk in self.chunks for copy in chunk.copies]

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to compute and nothing to swap."""
        return not (self.chunks or self.swapped_out or self.swapped_in)

    def drop_stopped_sequences(self) -> None:
        """Remove the chunks of sequences that are not running any more."""
        running = [chunk for chunk in self.chunks if chunk.sequence.state is SequenceState.RUNNING]
        self.chunks[:] = running

    def pack(self) -> tuple[list[int], list[int]]:
        """Return the token ids of all chunks, one chunk after another, and the indices that need logits."""
        tokens: list[int] = []
        logit_rows: list[int] = []
        for chunk in self.chunks:
            logit_rows.extend(len(tokens) + at - chunk.start for at in chunk.logit_positions)
            tokens.extend(chunk.sequence.tokens(chunk.start, chunk.stop))
        return tokens, logit_rows

    def conclude(self, rows: mx.array | None, fork: Callable[[S], list[S]]) -> StepLogits:
        """Mark the chunks' tokens as computed, and assign the rows of logits to sequences.

        rows: the logits in the order of `pack`; None without a model. fork: called with each sequence that is
        ready for its next token; returns the sequences that share its row.
        """
        logits, next_row = StepLogits(rows, {}), 0
        for chunk in self.chunks:
            first, next_row = next_row, next_row + len(chunk.logit_positions)
            last = next_row - 1 - len(chunk.sequence.draft) if chunk.is_last else next_row
            if last > first:
                logits.prompt_rows[chunk.sequence.seq_id] = range(first, last)
            chunk.sequence.num_computed = chunk.stop - len(chunk.sequence.draft)
            logits.num_tokens += chunk.stop - chunk.start
            if chunk.is_last:
                logits.row_of.update((sequence.seq_id, last) for sequence in fork(chunk.sequence))
        return logits
