"""One token stream that the engine is working on: what it is, and how far it got.

A request with `n` completions starts as one sequence, its leader, and is forked into n sequences
when its prompt has been computed. Holds plain numbers; knows nothing of arrays or text.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, Self

from .paged_attention import BlockTable
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
    """Invariant: the keys and values of the first `num_computed` tokens are in memory.

    `tokens` is the prompt followed by the outputs. Tokens recomputed after a preemption stay
    outputs. `max_len` bounds prompt + outputs. `num_forks` counts the completions that still share
    this sequence's prompt and are not yet sequences of their own. `prompt_logprobs` grows as the prompt
    is computed, where they are asked for: entry i is about the prompt's token i + 1. Forks share it.
    num_cached_tokens: tokens of the prompt that somebody else had computed.
    """

    seq_id: str
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_len: int
    num_forks: int = 0
    outputs: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed: int = 0
    num_cached_tokens: int = 0
    state: SequenceState = SequenceState.WAITING

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and outputs."""
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


@dataclass(eq=False, kw_only=True)
class PagedSequence(Sequence):
    """A sequence whose keys and values are in the blocks of `table`.

    stream: its tokens as the prefix cache sees them, as far as that has looked. is_beam: its request is a
    beam search: `num_forks` counts the places that are kept for more beams. parked: beams that were preempted
    with this one, and wait behind it.
    """

    table: BlockTable
    stream: TokenBlocks
    is_beam: bool = False
    parked: "Parked | None" = None

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute: all that are known, or those that all parked beams share."""
        return (self.num_tokens if self.parked is None else self.parked.num_shared) - self.num_computed

    @property
    def num_shareable(self) -> int:
        """Tokens, from the first, that another may have computed: all but the last of those to compute."""
        return self.num_computed + self.num_uncomputed - 1

    @property
    def is_at_edge(self) -> bool:
        """True where the next token begins a block."""
        return self.num_computed % self.table.block_size == 0

    def fork(self, seq_id: str, seed: int) -> Self:
        """A sequence that shares every page computed so far and draws with its own seed."""
        return replace(super().fork(seq_id, seed), table=self.table.fork(), stream=self.stream.copy())

    def note_shared(self, num_tokens: int) -> None:
        """The next tokens have come into the table by sharing, and need no computing."""
        self.num_computed += num_tokens
        if not self.outputs:
            self.num_cached_tokens += num_tokens

    def give_up_pages(self) -> None:
        """Release the table and forget what was computed; tokens and outputs stay."""
        self.table.release()
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
