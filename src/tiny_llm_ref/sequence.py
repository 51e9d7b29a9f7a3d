"""A sequence: one prompt with its outputs, and how far the engine has computed it.

A request for `n` completions starts as one sequence, its leader, which is forked into n sequences when its
prompt has been computed. Holds plain numbers; knows nothing of arrays or text.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import zip_longest
from time import monotonic
from typing import NamedTuple, Self

from .grammar import Grammar
from .paged_attention import BlockCopy, BlockTable
from .prefix_cache import TokenBlocks
from .sampling_params import SamplingParams


class SequenceState(Enum):
    """The states of a sequence, from its arrival in the queue to its end."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class TokenLogprobs(NamedTuple):
    """A token's log-probability and rank; `top`: the likeliest tokens at its place, best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt, its outputs so far, and how many of these tokens are computed (`num_computed`).

    The tokens of a sequence are the prompt, then the outputs. Invariant: the keys and values of the first
    `num_computed` tokens are in memory.

    draft: during a step, guesses of the tokens after the known ones (speculative decoding); otherwise empty.

    max_len: its length limit in tokens, prompt and outputs together. num_forks: the other completions of
    its request that are still to be forked from it. rank: its place in the order of service, the lowest
    first: its request's priority key, its request's number, and its index among the completions. outputs:
    the generated tokens, which a preemption does not remove. prompt_logprobs: if requested, entry i is about
    the prompt's token i + 1; the list grows while the prompt is computed, and forks share it. num_computed:
    the number of tokens, from the first, whose keys and values are in memory. num_cached_tokens: tokens of
    the prompt that were found in the prefix cache. scheduled: when it first ran, in seconds on the monotonic
    clock. grammar: what its outputs must be a text of, after all outputs so far; None: any text.
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
    draft: list[int] = field(default_factory=list)
    grammar: Grammar | None = None

    def run(self) -> None:
        """Mark it as running, and note the time if it is the first time."""
        self.state = SequenceState.RUNNING
        if self.scheduled is None:
            self.scheduled = monotonic()

    @property
    def num_tokens(self) -> int:
        """The number of tokens known so far: prompt and outputs."""
        return len(self.prompt) + len(self.outputs)

    @property
    def num_uncomputed(self) -> int:
        """The number of known tokens that are not computed: 1 for a decode, more for a prefill."""
        return self.num_tokens - self.num_computed

    def prompt_positions(self, start: int, stop: int) -> range:
        """Return the positions within start .. stop - 1 whose logits are needed for `prompt_logprobs`.

        Empty unless the request asks for them. Positions that were reported before a preemption are left out.
        """
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs)), min(stop, len(self.prompt) - 1))

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the token ids at the positions start .. stop - 1; after the known ones comes the draft."""
        found = list(self.prompt[start:stop])
        first = len(self.prompt)
        for part in (self.outputs, self.draft):
            found += part[max(0, start - first) : max(0, stop - first)]
            first += len(part)
        return found

    def fork(self, seq_id: str, seed: int) -> Self:
        """Return a copy that has computed the same tokens, with another id and seed."""
        grammar = None if self.grammar is None else self.grammar.fork()
        outputs = list(self.outputs)
        return replace(
            self, seq_id=seq_id, seed=seed, num_forks=0, outputs=outputs, draft=[], grammar=grammar
        )


class SwappedTable(NamedTuple):
    """The host blocks of one table of a swapped sequence.

    first: the index, among all blocks of the text, of the first block that the table held; 0 without a
    window. host_blocks: the host blocks that hold the text's blocks first, first + 1 and so on; empty if the
    window had passed all of them.
    """

    first: int
    host_blocks: list[int]


class Swapped(NamedTuple):
    """The state of a sequence when it was swapped out.

    tables: one for each of its tables, in their order. num_computed, num_cached_tokens: the sequence's
    numbers at that time.
    """

    tables: list[SwappedTable]
    num_computed: int
    num_cached_tokens: int


@dataclass(eq=False, kw_only=True)
class PagedSequence(Sequence):
    """A sequence whose keys and values are in the blocks of its tables.

    tables: one for each group of layers with the same window; only one if no layer has a window. streams: one
    for each table; it has the sequence's tokens in full blocks, as many as have been needed so far. is_beam:
    True if its request is a beam search; then `num_forks` counts the slots reserved for more beams. parked:
    beams that were preempted with this one, and wait for it. swapped: its blocks on the host; None if it has
    none.
    """

    tables: list[BlockTable]
    streams: list[TokenBlocks]
    is_beam: bool = False
    parked: "Parked | None" = None
    swapped: Swapped | None = None

    @property
    def table(self) -> BlockTable:
        """The sequence's block table, the first one if it has several.

        It has several on day 3.5, where layers have windows; the first is that of the layers without one, if
        there are any.
        """
        return self.tables[0]

    @property
    def stream(self) -> TokenBlocks:
        """The first table's stream."""
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
        """The blocks of all tables, in the order of the tokens, one entry for each reference."""
        last_first = zip_longest(*(reversed(table.blocks) for table in self.tables))
        return [block for row in last_first for block in row if block is not None][::-1]

    @property
    def num_uncomputed(self) -> int:
        """The number of tokens to compute; while beams are parked, only tokens that all beams share count."""
        return (self.num_tokens if self.parked is None else self.parked.num_shared) - self.num_computed

    @property
    def num_shareable(self) -> int:
        """The number of tokens, from the first, that the prefix cache may provide: all but the last one."""
        return self.num_computed + self.num_uncomputed - 1

    @property
    def is_at_block_start(self) -> bool:
        """True if the next token to compute is the first of a block."""
        return self.num_computed % self.table.block_size == 0

    def blocks_to_append(self, num_new_tokens: int) -> int:
        """Return how many free blocks `append_tokens(num_new_tokens)` would take."""
        return sum(table.blocks_to_append(num_new_tokens) for table in self.tables)

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        """Add places for tokens in all tables; return the copies to make first.

        Enough blocks must be free.
        """
        return [copy for table in self.tables for copy in table.append_tokens(num_new_tokens)]

    def settle_draft(self) -> list[int]:
        """Count the accepted tokens of the draft as computed, and release the pages of the others.

        Call it when the step's tokens are committed: then all known tokens but the last are computed. Returns
        the released blocks.
        """
        num_rejected = self.num_computed + len(self.draft) + 1 - self.num_tokens
        self.num_computed, self.draft = self.num_tokens - 1, []
        return [block for table in self.tables for block in table.remove_tokens(num_rejected)]

    def fork(self, seq_id: str, seed: int) -> Self:
        """Return a copy that shares every page computed so far, with another id and seed."""
        child = replace(
            super().fork(seq_id, seed), swapped=None, streams=[stream.copy() for stream in self.streams]
        )
        child.share_pages(self)
        return child

    def share_pages(self, parent: "PagedSequence") -> None:
        """Replace the tables by forks of the parent's, and take over its number of computed tokens."""
        self.tables = [table.fork() for table in parent.tables]
        self.num_computed = parent.num_computed

    def add_shared_tokens(self, num_tokens: int) -> None:
        """Count the next `num_tokens` tokens as computed: shared blocks in the tables hold them."""
        self.num_computed += num_tokens
        if not self.outputs:
            self.num_cached_tokens += num_tokens

    def release_pages(self) -> None:
        """Release the tables, so that no token counts as computed. Prompt and outputs stay."""
        self.draft = []
        for table in self.tables:
            table.release()
        self.num_computed = 0
        if not self.outputs:
            self.num_cached_tokens = 0


class Parked(NamedTuple):
    """Preempted beams that wait until another beam has computed the tokens they share, then fork from it.

    num_shared: the number of these tokens.
    """

    beams: list[PagedSequence]
    num_shared: int


def completion_ids(request_id: str, n: int) -> list[str]:
    """Return the sequence ids of a request's n completions; if n is 1, the only one is the request's id."""
    return [request_id] if n == 1 else [f"{request_id}/{index}" for index in range(n)]
