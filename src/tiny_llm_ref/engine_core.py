"""Requests in, tokens out: the loop around a batch manager. Schedule, run, sample, commit.

Knows token ids and nothing of text; has no thread of its own and never prints. One thread owns it,
because it owns every array.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import mlx.core as mx

from .batch_manager import BatchManager
from .beam_search import BeamSearch, BeamSearchParams
from .errors import ends_process
from .faults import Failure, Trials
from .paged_batch import PagedBatchManager
from .paged_queues import BeamStep
from .sampler import log_probabilities
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import StepLogits
from .token_output import TokenOutput, choose_token, likeliest, note_prompt_logprobs, tell

STEP_SIZES = 16  # powers of two that steps are counted by: up to 16,384 tokens, then all larger ones


@dataclass(frozen=True)
class EngineStats:
    """How full the engine is, in sequences and blocks, and what it has met so far.

    num_swapped: of those that wait, how many have their keys and values on the host. num_cached_blocks:
    blocks that nobody uses, kept because their tokens may come again. prefix_cache_queries,
    prefix_cache_hits: prompt tokens of requests that have begun, and those of them that were in the pool
    already. num_host_blocks: room on the host for what is swapped out. num_tokens: tokens computed in all
    steps. steps_of: how many steps computed up to 1, 2, 4, 8, ... tokens, and more than the power before.
    num_waiting_requests: requests that have a waiting sequence.
    """

    num_running: int
    num_waiting: int
    num_swapped: int
    num_free_blocks: int
    num_cached_blocks: int
    num_blocks: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_host_blocks: int = 0
    num_tokens: int = 0
    steps_of: tuple[int, ...] = ()
    num_waiting_requests: int = 0


@dataclass
class _Searching:
    """A search, and the candidates of those of its beams that were computed since it last advanced."""

    search: BeamSearch
    candidates: dict[str, list[tuple[int, float]]]


class EngineCore:
    """Steps a batch manager, samples each ready sequence, and ends those that are done.

    A step that raises is undone, and who is to blame is found (`Trials`): that request has failed, and the
    others go on as if nothing had happened.
    """

    def __init__(self, manager: BatchManager, eos_token_ids: Seq[int], seed: int = 0) -> None:
        self.manager = manager
        self._eos = frozenset(eos_token_ids)
        self._seed = seed
        self._num_admitted = 0
        self._num_tokens = 0
        self._steps_of = [0] * STEP_SIZES
        self._searches: dict[str, _Searching] = {}
        self._failures: dict[str, Failure] = {}
        self._ended_searches: list[str] = []
        self._trials = Trials(manager)

    def add_request(self, request_id: str, tokens: list[int], params: SamplingParams) -> bool:
        """Queue a request; False when it cannot be queued now, an error when it never can.

        A request without a seed gets one here, from the engine's seed and its place in the order of
        arrival.
        """
        if params.priority and not isinstance(self.manager, PagedBatchManager):
            raise ValueError(f"priority ({params.priority}) is for batching='paged'")
        seed = params.seed if params.seed is not None else self._seed + (self._num_admitted << 20)
        queued = self.manager.add_request(tokens, request_id, params, seed)
        self._num_admitted += queued
        return queued

    def add_beam_search(self, request_id: str, tokens: list[int], params: BeamSearchParams) -> BeamSearch:
        """Queue a beam search; what is returned advances with the engine's steps, and is over without beams.

        Raises ValueError where the batch manager cannot share pages, and what its `add_request` raises.
        """
        if not isinstance(self.manager, PagedBatchManager):
            raise ValueError("beam search shares pages between beams: it needs batching='paged'")
        width, salt = params.beam_width, params.cache_salt
        sampling = SamplingParams(
            n=width, max_tokens=params.max_tokens, cache_salt=salt, priority=params.priority
        )
        self.manager.add_request(tokens, request_id, sampling, beam_search=True)
        search = BeamSearch(params, self._eos)
        self._searches[request_id] = _Searching(search, {})
        self._num_admitted += 1
        return search

    def step(self) -> list[TokenOutput]:
        """Run one step; its outputs, one token each, at most one for each running sequence.

        Never raises for what a request or the step did: see `take_failures`.
        """
        self._trials.begin_step()
        try:
            logits = self.manager.process_batch()
        except BaseException as error:  # whatever a kernel, an allocation, a policy or a library raised
            if ends_process(error):
                raise
            guilty = self._trials.blame(error)
            if guilty is not None:
                self._fail(guilty, error)
            return []
        self._count(logits.num_tokens)
        self._trials.passed({sequence.request_id for sequence in self._ready(logits)})
        self._note_prompt_logprobs(logits)
        outputs = self._sample(logits)
        self._advance_searches(logits)
        return [output for output in outputs if self._commit(output)]

    def take_failures(self) -> list[Failure]:
        """The requests that have ended with an error since this was last asked."""
        failures, self._failures = self._failures, {}
        return list(failures.values())

    def take_ended_searches(self) -> list[str]:
        """The beam searches that have come to their end since this was last asked."""
        ended, self._ended_searches = self._ended_searches, []
        return ended

    def finish(self, seq_id: str) -> None:
        """End one sequence, for a reason that is not its token's (a stop string)."""
        self.manager.finish(seq_id)

    def cancel(self, request_id: str) -> None:
        """End a request, whatever its state; an unknown or ended id is ignored."""
        self._searches.pop(request_id, None)
        self.manager.cancel(request_id)

    def has_request(self, request_id: str) -> bool:
        """True while a request has not ended."""
        return self.manager.has_request(request_id)

    @property
    def has_work(self) -> bool:
        """True while a request has not ended."""
        return self.manager.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        manager, capacity = self.manager, self.manager.capacity
        return EngineStats(
            num_running=len(manager.running),
            num_waiting=len(manager.waiting),
            num_swapped=manager.num_swapped,
            num_free_blocks=capacity.num_free,
            num_cached_blocks=capacity.num_cached,
            num_blocks=capacity.num_blocks,
            num_preemptions=manager.num_preemptions,
            prefix_cache_queries=manager.prefix_stats.queries,
            prefix_cache_hits=manager.prefix_stats.hits,
            num_host_blocks=capacity.num_host_blocks,
            num_tokens=self._num_tokens,
            steps_of=tuple(self._steps_of),
            num_waiting_requests=manager.num_waiting_requests,
        )

    # What a step gave. Who raises here has failed alone.

    def _count(self, num_tokens: int) -> None:
        """A step has computed so many tokens."""
        if num_tokens:
            self._num_tokens += num_tokens
            self._steps_of[min((num_tokens - 1).bit_length(), STEP_SIZES - 1)] += 1

    def _ready(self, logits: StepLogits) -> list[Sequence]:
        """The sequences that have logits, and whose request has not failed."""
        return [self.manager.sequence(seq_id) for seq_id in logits if self.manager.has_sequence(seq_id)]

    def _note_prompt_logprobs(self, logits: StepLogits) -> None:
        """Take down the log-probabilities of the prompt tokens that this step's rows are about."""
        for seq_id, rows in logits.prompt_rows.items():
            sequence = self.manager.sequence(seq_id)
            with self._blaming(sequence.request_id):
                assert logits.rows is not None
                note_prompt_logprobs(sequence, (logits.rows[row] for row in rows))

    def _sample(self, logits: StepLogits) -> list[TokenOutput]:
        """Choose every ready sequence's token; all are evaluated together, where that works."""
        choices = []
        for sequence in self._ready(logits):
            if sequence.request_id not in self._searches:
                with self._blaming(sequence.request_id):
                    choices.append(choose_token(sequence, logits[sequence.seq_id], self._eos))
        with suppress(Exception):  # whose fault it is shows when each is evaluated alone
            mx.eval([(choice.token, choice.check) for choice in choices])
        outputs = []
        for choice in choices:
            with self._blaming(choice.sequence.request_id):
                outputs.append(tell(choice, self._eos))
        return outputs

    def _commit(self, output: TokenOutput) -> bool:
        """Let a sequence have its token, and end if that is its last; False where its request has failed."""
        if self.manager.has_sequence(output.seq_id):
            with self._blaming(output.request_id):
                self.manager.commit({output.seq_id: output.token})
                if output.finish_reason is not None:
                    self.manager.finish(output.seq_id)
                return True
        return False

    def _advance_searches(self, logits: StepLogits) -> None:
        """Hand the likeliest tokens to the searches whose beams were computed; those that have all go on.

        Beams of one search may be computed in different steps, when they were preempted: the others wait.
        """
        for sequence in self._ready(logits):
            under_way = self._searches.get(sequence.request_id)
            if under_way is None or not self.manager.has_sequence(sequence.seq_id):
                continue
            with self._blaming(sequence.request_id):
                search, candidates = under_way.search, under_way.candidates
                row = log_probabilities(logits[sequence.seq_id])
                candidates[sequence.seq_id] = likeliest(row, search.num_candidates)
                if len(candidates) == len(search.beams):
                    self._advance(sequence.request_id, search, candidates)

    def _advance(
        self, request_id: str, search: BeamSearch, candidates: dict[str, list[tuple[int, float]]]
    ) -> None:
        """Let a search go on from its beams' candidates, or end."""
        assert isinstance(self.manager, PagedBatchManager)
        ids = completion_ids(request_id, search.params.beam_width)[: len(search.beams)]
        choices = search.advance([candidates[seq_id] for seq_id in ids])
        candidates.clear()
        if choices:
            self.manager.advance(request_id, [BeamStep(ids[parent], token) for parent, token in choices])
        else:
            self._ended_searches.append(request_id)
            self.cancel(request_id)

    @contextmanager
    def _blaming(self, request_id: str) -> Iterator[None]:
        """A request has failed if the block raises."""
        try:
            yield
        except BaseException as error:  # whatever it was
            if ends_process(error):
                raise
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: BaseException) -> None:
        """End a request with an error, once."""
        self._failures.setdefault(request_id, Failure(request_id, error))
        self.cancel(request_id)
