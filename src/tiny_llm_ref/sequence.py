"""One token stream that the engine is working on: what it is, and how far it got.

A request with `n` completions starts as one sequence, its leader, and is forked into n sequences
when its prompt has been computed. Holds plain numbers; knows nothing of arrays or text.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import zip_longest
from time import monotonic
from typing import NamedTuple, Self

from .paged_attention import BlockCopy, BlockTable
from .prefix_cache import TokenBlocks
from .sampling_params import SamplingParams


class SequenceState(Enum):
    """Where a sequence stands between admission and end."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class TokenLogprobs(NamedTuple):
    """A token's log-probability and rank, and the likeliest tokens in its place with theirs, best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt, its outputs so far, and how many of these tokens are computed (`num_computed`).

    Invariant: the keys and values of the first `num_computed` tokens are in memory.

    `tokens` is the prompt followed by the outputs. Tokens recomputed after a preemption stay
    outputs. max_len: the most tokens that it may ever have, prompt and outputs. num_computed: tokens, from
    the first, whose keys and values are in memory. `num_forks` counts the completions that still share
    this sequence's prompt and are not yet sequences of their own. `prompt_logprobs` grows as the prompt
    is computed, where they are asked for: entry i is about the prompt's token i + 1. Forks share it.
    num_cached_tokens: tokens of the prompt that were found in the prefix cache. scheduled: when it ran for
    the first time, in seconds on the monotonic clock. rank: its place in the order of service, the lowest
    first: its request's priority key and number, and its own place among the completions.
    """

    seq_id: str
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_len: int
    num_forks: int = 0
    rank: tuple[int, int, int] = (0, 0, 0)
    outputs: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed: int = 0
    num_cached_tokens: int = 0
    scheduled: float | None = None
    state: SequenceState = SequenceState.WAITING

    def run(self) -> None:
        """It is its turn."""
        self.state = SequenceState.RUNNING
        if self.scheduled is None:
            self.scheduled = monotonic()

    @property
    def num_tokens(self) -> int:
        """Number of tokens known so far: prompt and outputs."""
        return len(self.prompt) + len(self.outputs)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose keys and values are not in the pool: 1 for a decode, more for a prefill."""
        return self.num_tokens - self.num_computed

    def prompt_positions(self, start: int, stop: int) -> range:
        """Of the positions start .. stop - 1 those whose logits say something new about the prompt.

        Empty unless `prompt_logprobs` are asked for. What was said before a preemption is not said again.
        """
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs)), min(stop, len(self.prompt) - 1))

    def tokens(self, start: int, stop: int) -> list[int]:
        """The token ids at the positions start .. stop - 1."""
        split = len(self.prompt)
        return [*self.prompt[start:stop], *self.outputs[max(0, start - split) : max(0, stop - split)]]

    def fork(self, seq_id: str, seed: int) -> Self:
        """A sequence that has computed as much as this one, and draws with its own seed."""
        return replace(self, seq_id=seq_id, seed=seed, num_forks=0, outputs=list(self.outputs))


class SwappedTable(NamedTuple):
    """What a table held, on the host: its blocks from block `first` of the sequence on.

    first: the number of the text's block that was the table's first, 0 without a window. host_blocks: the
    host blocks that hold the text's blocks first, first + 1 and so on; empty for a window that had passed
    them all.
    """

    first: int
    host_blocks: list[int]


class Swapped(NamedTuple):
    """What a sequence had when it was swapped out.

    tables: one for each of its tables, in their order. num_computed: tokens that were computed then.
    num_cached_tokens: how many of its prompt had been found in the prefix cache.
    """

    tables: list[SwappedTable]
    num_computed: int
    num_cached_tokens: int


@dataclass(eq=False, kw_only=True)
class PagedSequence(Sequence):
    """A sequence whose keys and values are in the blocks of its tables.

    tables: one for each group of layers that see equally far; a single one where all layers see everything.
    streams: for each table its stream, the tokens cut into full blocks, as far as was asked for. is_beam:
    its request is a beam search: `num_forks` counts the places that are kept for more beams. parked: beams
    that were preempted with this one, and wait behind it. swapped: what it has on the host; None if
    nothing.
    """

    tables: list[BlockTable]
    streams: list[TokenBlocks]
    is_beam: bool = False
    parked: "Parked | None" = None
    swapped: Swapped | None = None

    @property
    def table(self) -> BlockTable:
        """The only table, or the first: that of the layers that see most."""
        return self.tables[0]

    @property
    def stream(self) -> TokenBlocks:
        """That table's stream."""
        return self.streams[0]

    def stream_of(self, table: int, num_blocks: int) -> TokenBlocks:
        """Return the stream of one of its tables, cut into at least `num_blocks` full blocks."""
        stream = self.streams[table]
        if len(stream) < num_blocks:
            size = stream.block_size
            stream.extend(self.tokens(len(stream) * size, num_blocks * size))
        return stream

    @property
    def blocks(self) -> list[int]:
        """The blocks of all tables, those of the first tokens first, one entry for each reference."""
        backwards = zip_longest(*(reversed(table.blocks) for table in self.tables))
        return [block for row in backwards for block in row if block is not None][::-1]

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute: all that are known, or those that all parked beams share."""
        return (self.num_tokens if self.parked is None else self.parked.num_shared) - self.num_computed

    @property
    def num_shareable(self) -> int:
        """Number of tokens from the first that may be shared: all but the last of those to compute."""
        return self.num_computed + self.num_uncomputed - 1

    @property
    def is_at_edge(self) -> bool:
        """Whether the next token to compute begins a block."""
        return self.num_computed % self.table.block_size == 0

    def blocks_to_append(self, num_new_tokens: int) -> int:
        """Free blocks that `append_tokens(num_new_tokens)` would take."""
        return sum(table.blocks_to_append(num_new_tokens) for table in self.tables)

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        """Make room for tokens in all tables, of blocks that must be free; the copies to make before."""
        return [copy for table in self.tables for copy in table.append_tokens(num_new_tokens)]

    def fork(self, seq_id: str, seed: int) -> Self:
        """A sequence that shares every page computed so far and draws with its own seed."""
        child = replace(
            super().fork(seq_id, seed), swapped=None, streams=[stream.copy() for stream in self.streams]
        )
        child.share_pages(self)
        return child

    def share_pages(self, parent: "PagedSequence") -> None:
        """Hold what another holds, and have computed what that has."""
        self.tables = [table.fork() for table in parent.tables]
        self.num_computed = parent.num_computed

    def note_shared(self, num_tokens: int) -> None:
        """Count the next tokens as computed: they have come into the tables by sharing."""
        self.num_computed += num_tokens
        if not self.outputs:
            self.num_cached_tokens += num_tokens

    def give_up_pages(self) -> None:
        """Release the tables and forget what was computed; tokens and outputs stay."""
        for table in self.tables:
            table.release()
        self.num_computed = 0
        if not self.outputs:
            self.num_cached_tokens = 0


class Parked(NamedTuple):
    """Beams that wait behind another for the tokens that all of them share: then they join it, as forks."""

    beams: list[PagedSequence]
    num_shared: int


def completion_ids(request_id: str, n: int) -> list[str]:
    """The sequence ids of a request's n completions; a single one has the request's own id."""
    return [request_id] if n == 1 else [f"{request_id}/{index}" for index in range(n)]
