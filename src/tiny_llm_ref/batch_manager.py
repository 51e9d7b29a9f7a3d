"""The interface of batch managers, which serve many requests at once, and the checks of new requests.

A step: `process_batch` schedules and runs the model, the caller samples, `commit` appends the tokens. The
dense and the paged manager differ in where they store keys and values; the engine sees no difference.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import zip_longest
from typing import NamedTuple, Protocol

from tiny_llm_checkpoints.sizes import counted

from .errors import RequestTooLargeError
from .sampling_params import SamplingParams
from .sequence import Sequence
from .step import StepLogits

MAX_PROMPT_ROWS = 64  # rows of prompt logits per sequence and step: 64 x 150,000 numbers take 38 MB


class Capacity(NamedTuple):
    """The memory for keys and values, in blocks. In the dense manager a block is one sequence's whole cache.

    num_blocks: all blocks. block_size: tokens in a block. num_free: blocks that are neither in use nor
    cached. nbytes: bytes of all blocks. num_cached: idle blocks in the prefix cache. num_host_blocks: blocks
    on the host, for sequences that are swapped out.
    """

    num_blocks: int
    block_size: int
    num_free: int
    nbytes: int
    num_cached: int = 0
    num_host_blocks: int = 0


class PrefixStats(NamedTuple):
    """Tokens of the prompts that are complete, and how many of them came from the prefix cache."""

    queries: int = 0
    hits: int = 0


class DraftStats(NamedTuple):
    """Counts of speculative decoding: drafts, their tokens, and those that were accepted.

    accepted_at: entry i counts the drafts of which at least i + 1 tokens were accepted.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()

    def plus(self, num_tokens: int, num_accepted: int) -> "DraftStats":
        """Return the counts with one more draft of `num_tokens` tokens."""
        counts = zip_longest(self.accepted_at, [1] * num_accepted, fillvalue=0)
        return DraftStats(
            self.num_drafts + 1,
            self.num_draft_tokens + num_tokens,
            self.num_accepted_tokens + num_accepted,
            tuple(map(sum, counts)),
        )


NO_DRAFTS = DraftStats()


class BatchManager(Protocol):
    """Runs many requests at once. Only one thread may use it."""

    @property
    def num_preemptions(self) -> int:
        """The number of preemptions so far."""

    @property
    def prefix_stats(self) -> PrefixStats:
        """How many prompt tokens there were, and how many of them came from the prefix cache."""

    @property
    def draft_stats(self) -> DraftStats:
        """How many tokens were drafted, and how many of them were accepted."""

    @property
    def waiting(self) -> Seq[Sequence]:
        """The waiting sequences, in the order in which they will run."""

    @property
    def running(self) -> Seq[Sequence]:
        """The running sequences, oldest first; with priorities, in the order in which they are served."""

    @property
    def num_waiting_requests(self) -> int:
        """The number of requests that have a waiting sequence."""

    @property
    def capacity(self) -> Capacity:
        """The memory for keys and values, and how much of it is free."""

    @property
    def has_work(self) -> bool:
        """True while a request has not ended."""

    @property
    def num_swapped(self) -> int:
        """The number of waiting sequences whose keys and values are on the host."""

    def sequence(self, seq_id: str) -> Sequence:
        """Return the sequence with this id; KeyError if it is unknown or has ended."""

    def has_sequence(self, seq_id: str) -> bool:
        """True while a sequence has not ended."""

    def has_request(self, request_id: str) -> bool:
        """True while a request has not ended."""

    def isolate(self, request_id: str | None) -> None:
        """From now on, start only this request's waiting sequences; None: those of all requests again."""

    def recover(self) -> list[str]:
        """After a step that raised, put all running sequences back into the queue.

        Returns the ids of the requests that the step was to compute.
        """

    def add_request(
        self, tokens: list[int], request_id: str, params: SamplingParams | None = None, seed: int = 0
    ) -> bool:
        """Queue a prompt; return True, or False if that is not possible now.

        `PagedBatchManager` and `DenseBatchManager` have no limit on waiting prompts and never return False.

        Raises `RequestTooLargeError`, with the limit, if it will never be possible.
        """

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; return the logits of every sequence that is ready for its next token."""

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id; KeyError for an unknown or ended sequence."""

    def settle_drafts(self, seconds: float) -> None:
        """After the step's tokens are committed: free the memory of drafted tokens that were rejected.

        seconds: how long the step took, from scheduling to the last token.
        """

    def finish(self, seq_id: str) -> None:
        """End one sequence and free its memory; KeyError if it is unknown or has ended."""

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, in any state; unknown and ended ids are ignored."""


def max_sequence_length(
    tokens: list[int], params: SamplingParams, request_id: str, context: int, max_seqs: int
) -> int:
    """Return the maximum number of tokens of a sequence of this request, prompt and outputs.

    context: the maximum number of tokens of any sequence. max_seqs: the maximum number of sequences at once.
    Raises ValueError for an empty prompt, and `RequestTooLargeError` for a request that can never run within
    these limits.
    """
    if not tokens:
        raise ValueError(f"the prompt of request {request_id!r} has no tokens: there is nothing to continue")
    max_outputs = context - len(tokens) if params.max_tokens is None else params.max_tokens
    if len(tokens) + max_outputs > context or len(tokens) >= context:
        raise RequestTooLargeError(
            f"request {request_id!r}: {counted(len(tokens), 'prompt token')} and "
            f"{counted(max(1, max_outputs), 'output token')} exceed the context of {context}",
            "max_tokens" if max_outputs >= context and len(tokens) < context else None,
        )
    check_num_sequences(request_id, params.n, max_seqs)
    return len(tokens) + max_outputs


def check_num_sequences(request_id: str, n: int, max_seqs: int, field: str = "n") -> None:
    """Raise `RequestTooLargeError` if a request has more completions, or beams, than may run at once."""
    if n > max_seqs:
        raise RequestTooLargeError(
            f"request {request_id!r}: {field} = {n} exceeds the {max_seqs} sequences that may run at once "
            "(max_num_seqs)",
            field,
        )


def tokens_wanted(sequence: Sequence) -> int:
    """Return how many tokens a sequence could compute now: 1 for a decode, the rest of a prompt, or 0.

    With `prompt_logprobs` it is at most `MAX_PROMPT_ROWS`, because each token needs a row of logits.
    """
    if sequence.params.prompt_logprobs is None:
        return sequence.num_uncomputed
    return min(sequence.num_uncomputed, MAX_PROMPT_ROWS)
