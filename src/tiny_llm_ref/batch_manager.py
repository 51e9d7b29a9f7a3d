"""What serves many requests at once: the one face of every batch manager, and its door.

A step is: `process_batch` schedules and runs, the caller samples, `commit` takes the tokens. The dense
manager and the paged one differ in where keys and values live, and in nothing that the engine sees.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from .errors import RequestTooLargeError
from .sampling_params import SamplingParams
from .sequence import Sequence
from .step import StepLogits

PROMPT_ROWS_AT_ONCE = 64  # rows of logits a step: 64 x 150,000 numbers are 38 MB


class Capacity(NamedTuple):
    """The memory for keys and values: so many blocks of so many tokens, and how many of them are free.

    num_cached: blocks that nobody uses, and that are kept because their tokens may come again. In the dense
    manager a block is one sequence's whole cache. num_host_blocks: room on the host for what is swapped out.
    """

    num_blocks: int
    block_size: int
    num_free: int
    nbytes: int
    num_cached: int = 0
    num_host_blocks: int = 0


class PrefixStats(NamedTuple):
    """Prompt tokens of the requests that have begun, and those of them that were in the pool already."""

    queries: int = 0
    hits: int = 0


class BatchManager(Protocol):
    """Runs many requests at once. Everything that it holds belongs to one thread."""

    @property
    def num_preemptions(self) -> int:
        """How often somebody had to give way."""

    @property
    def prefix_stats(self) -> PrefixStats:
        """How often a prompt's beginning was there already."""

    @property
    def waiting(self) -> Seq[Sequence]:
        """Who waits, the next to run first."""

    @property
    def running(self) -> Seq[Sequence]:
        """Who runs, oldest first."""

    @property
    def num_waiting_requests(self) -> int:
        """Requests that have a waiting sequence."""

    @property
    def capacity(self) -> Capacity:
        """How full it is."""

    @property
    def has_work(self) -> bool:
        """True while a request has not ended."""

    @property
    def num_swapped(self) -> int:
        """Of those who wait, how many have their keys and values on the host."""

    def sequence(self, seq_id: str) -> Sequence:
        """The unfinished sequence of that id; KeyError for another."""

    def has_sequence(self, seq_id: str) -> bool:
        """True while a sequence has not ended."""

    def has_request(self, request_id: str) -> bool:
        """True while a request has not ended."""

    def isolate(self, request_id: str | None) -> None:
        """Let nobody else's turn come, of those who wait, until this is called again; None: everybody's."""

    def recover(self) -> list[str]:
        """After a step that raised: all who ran wait again; the requests that it was to compute."""

    def add_request(
        self, tokens: list[int], request_id: str, params: SamplingParams | None = None, seed: int = 0
    ) -> bool:
        """Queue a prompt: False not now; raises `RequestTooLargeError` never, with the figures."""

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; the logits of every sequence that is ready for its next token."""

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""

    def finish(self, seq_id: str) -> None:
        """End one sequence: its memory goes back. KeyError for one that has ended."""

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""


def longest(tokens: list[int], params: SamplingParams, request_id: str, context: int, seats: int) -> int:
    """Return the most tokens that a sequence of this request may have, prompt and outputs.

    Raises ValueError for an empty prompt, and `RequestTooLargeError` for a request that could never run in a
    context of `context` tokens, or with `seats` sequences at once.
    """
    if not tokens:
        raise ValueError(f"request {request_id!r} has no tokens: there is nothing to continue")
    max_outputs = context - len(tokens) if params.max_tokens is None else params.max_tokens
    if len(tokens) + max_outputs > context or len(tokens) >= context:
        raise RequestTooLargeError(
            f"request {request_id!r}: {len(tokens)} prompt tokens and "
            f"{max(1, max_outputs)} output tokens exceed the context of {context}",
            "max_tokens" if max_outputs >= context and len(tokens) < context else None,
        )
    refuse_too_many(request_id, params.n, seats)
    return len(tokens) + max_outputs


def refuse_too_many(request_id: str, n: int, seats: int, field: str = "n") -> None:
    """Raise `RequestTooLargeError` for more completions, or beams, than sequences that may run at once."""
    if n > seats:
        raise RequestTooLargeError(
            f"request {request_id!r}: {field} = {n} exceeds the {seats} sequences that may run at once",
            field,
        )


def wanted(sequence: Sequence) -> int:
    """Count the tokens that a sequence could compute now: 1 for a decode, the rest of a prompt, or 0.

    With `prompt_logprobs` each token needs a row of logits: at most `PROMPT_ROWS_AT_ONCE` then.
    """
    if sequence.params.prompt_logprobs is None:
        return sequence.num_uncomputed
    return min(sequence.num_uncomputed, PROMPT_ROWS_AT_ONCE)
