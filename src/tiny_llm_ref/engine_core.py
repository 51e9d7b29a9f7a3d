"""Requests in, tokens out: each step of a batch manager is scheduled, run, sampled and committed.

Works with token ids, never with text; does not start threads and never prints. One thread owns the core,
because the core owns every array.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from itertools import groupby, zip_longest
from time import perf_counter
from typing import Any

import mlx.core as mx

from .batch_manager import NO_DRAFTS, BatchManager, DraftStats
from .beam_search import BeamSearch, BeamSearchParams
from .errors import ends_process
from .faults import Failure, FaultIsolation
from .grammar import Grammar
from .paged_batch import PagedBatchManager
from .paged_queues import BeamStep
from .sampler import log_probabilities
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import StepLogits
from .token_output import (
    Choice,
    Place,
    TokenOutput,
    choose_together,
    choose_token,
    group_of,
    likeliest,
    make_outputs,
    record_prompt_logprobs,
)

STEP_SIZES = 16  # buckets of the histogram of steps: powers of two up to 16,384 tokens, then all larger ones


@dataclass(frozen=True)
class EngineStats:
    """How full the engine is, in sequences and blocks, and counts since it started.

    num_swapped: waiting sequences whose keys and values are in host memory. num_cached_blocks: idle blocks
    that the prefix cache keeps, because their tokens may come again. prefix_cache_queries: prompt tokens of
    requests whose prompt is complete; prefix_cache_hits: those that were found in the pool. num_host_blocks:
    capacity of the host memory for swapped-out blocks. num_tokens: tokens computed in all steps. steps_of:
    a histogram: how many steps computed 1 token, 2, 3 to 4, 5 to 8, ... tokens. num_waiting_requests:
    requests that have a waiting sequence. drafts: the counts of speculative decoding.
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
    drafts: DraftStats = NO_DRAFTS


def sum_stats(stats: Iterable[EngineStats]) -> EngineStats:
    """The statistics of several engines together: counts are added, histograms entry by entry.

    >>> one = EngineStats(1, 0, 0, 6, 1, 8, 0, 20, 16, num_tokens=5, steps_of=(1, 0, 1))
    >>> other = EngineStats(2, 3, 0, 0, 0, 8, 1, 10, 0, num_tokens=2, steps_of=(2,))
    >>> total = sum_stats([one, other])
    >>> total.num_running, total.num_blocks, total.prefix_cache_queries, total.num_tokens, total.steps_of
    (3, 16, 30, 7, (3, 0, 1))
    """
    total = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
    for one in stats:
        total = EngineStats(
            **{f.name: _added(getattr(total, f.name), getattr(one, f.name)) for f in fields(EngineStats)}
        )
    return total


def _added(left: Any, right: Any) -> Any:
    """The sum of two fields of `EngineStats`: of counts, of histograms, or of the counts of drafts."""
    if isinstance(left, DraftStats):
        return DraftStats(*map(_added, left, right))
    if isinstance(left, tuple):
        return tuple(map(sum, zip_longest(left, right, fillvalue=0)))
    return left + right


@dataclass
class _Searching:
    """A search, and the candidates of the beams that were computed since it last advanced, by sequence id."""

    search: BeamSearch
    candidates: dict[str, list[tuple[int, float]]]


class EngineCore:
    """Steps a batch manager, samples each ready sequence, and ends the sequences that are finished.

    A step that raises is undone, and the request that caused it is found (`FaultIsolation`) and fails; the
    others continue as if nothing had happened.
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
        self._faults = FaultIsolation(manager)

    def add_request(
        self, request_id: str, tokens: list[int], params: SamplingParams, grammar: Grammar | None = None
    ) -> bool:
        """Queue a request; False if it cannot be queued now. Raises ValueError if it can never be queued.

        A request without a seed gets one here, from the engine's seed and the request's arrival number.
        grammar: that of `params.structured_outputs`, at its start; from now on it belongs to the sequence.
        """
        if (grammar is None) != (params.structured_outputs is None):
            raise ValueError("structured_outputs and its compiled grammar must be given together")
        if params.priority and not isinstance(self.manager, PagedBatchManager):
            raise ValueError(f"priority ({params.priority}) needs batching='paged'")
        seed = params.seed if params.seed is not None else self._seed + (self._num_admitted << 20)
        queued = self.manager.add_request(tokens, request_id, params, seed)
        if queued and grammar is not None:
            self.manager.sequence(completion_ids(request_id, params.n)[0]).grammar = grammar
        self._num_admitted += queued
        return queued

    def add_beam_search(self, request_id: str, tokens: list[int], params: BeamSearchParams) -> BeamSearch:
        """Queue a beam search; the returned search advances with the engine's steps until it has no beams.

        Raises ValueError if the batch manager cannot share pages, and what its `add_request` raises.
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
        """Run one step; returns its outputs, at most one for each running sequence.

        Errors of requests and of the step are not raised: see `take_failures`.
        """
        start = perf_counter()
        self._faults.prepare_step()
        try:
            logits = self.manager.process_batch()
        except BaseException as error:  # from a kernel, an allocation, a policy or a library
            if ends_process(error):
                raise
            culprit = self._faults.find_culprit(error)
            if culprit is not None:
                self._fail(culprit, error)
            return []
        self._count(logits.num_tokens)
        self._faults.step_succeeded({sequence.request_id for sequence in self._ready(logits)})
        self._record_prompt_logprobs(logits)
        outputs = self._sample(logits)
        self._advance_searches(logits)
        committed = [output for output in outputs if self._commit(output)]
        self.manager.settle_drafts(perf_counter() - start)
        return committed

    def take_failures(self) -> list[Failure]:
        """The requests that have failed since the last call."""
        failures, self._failures = self._failures, {}
        return list(failures.values())

    def take_ended_searches(self) -> list[str]:
        """The ids of the beam searches that have ended since the last call."""
        ended, self._ended_searches = self._ended_searches, []
        return ended

    def finish(self, seq_id: str) -> None:
        """End one sequence for a reason that its tokens do not show, such as a stop string.

        Raises KeyError if the sequence is unknown or has ended.
        """
        self.manager.finish(seq_id)

    def cancel(self, request_id: str) -> None:
        """End a request in any state; ignores an unknown or ended id."""
        self._searches.pop(request_id, None)
        self.manager.cancel(request_id)

    def has_request(self, request_id: str) -> bool:
        """True until the request has ended."""
        return self.manager.has_request(request_id)

    @property
    def has_work(self) -> bool:
        """True while any request has not ended."""
        return self.manager.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the engine's load and counters."""
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
            drafts=manager.draft_stats,
        )

    # The results of a step. An error here fails only its own request.

    def _count(self, num_tokens: int) -> None:
        """Count a step that computed `num_tokens` tokens."""
        if num_tokens:
            self._num_tokens += num_tokens
            self._steps_of[min((num_tokens - 1).bit_length(), STEP_SIZES - 1)] += 1

    def _ready(self, logits: StepLogits) -> list[Sequence]:
        """The sequences that have logits and whose request has not failed."""
        return [self.manager.sequence(seq_id) for seq_id in logits if self.manager.has_sequence(seq_id)]

    def _record_prompt_logprobs(self, logits: StepLogits) -> None:
        """Record the log-probabilities of the prompt tokens for which this step has rows."""
        for seq_id, rows in logits.prompt_rows.items():
            sequence = self.manager.sequence(seq_id)
            with self._blaming(sequence.request_id):
                assert logits.rows is not None
                record_prompt_logprobs(sequence, (logits.rows[row] for row in rows))

    def _sample(self, logits: StepLogits) -> list[TokenOutput]:
        """Choose the next token of every ready sequence; all are evaluated together if that works."""
        choices = self._choose(logits)
        with suppress(Exception):  # the faulty one is found below, when each is evaluated on its own
            mx.eval([(choice.token, choice.check) for choice in choices])
        outputs = []
        for sequence, of_sequence in groupby(choices, key=lambda choice: choice.sequence):
            with self._blaming(sequence.request_id):
                outputs.append(make_outputs(list(of_sequence), self._eos))
        return outputs

    def _choose(self, logits: StepLogits) -> list[Choice]:
        """Choose the token of every place, in order; those with the same filters together."""
        choices: dict[Place, Choice | None] = {}
        together: dict[tuple[float, ...], list[Place]] = {}
        for place in self._places(logits):
            with self._blaming(place.sequence.request_id):
                assert logits.rows is not None
                choice = choose_token(place, logits.rows[place.row], self._eos)
                choices[place] = choice  # None keeps its place in the order
                if choice is None:
                    together.setdefault(group_of(place.sequence), []).append(place)
        for group in together.values():
            choices.update({choice.place: choice for choice in self._choose_together(logits, group)})
        return [choice for choice in choices.values() if choice is not None]

    def _places(self, logits: StepLogits) -> Iterator[Place]:
        """The places whose tokens are chosen: one for each ready sequence, and one for each drafted token."""
        for sequence in self._ready(logits):
            if sequence.request_id not in self._searches:
                first = logits.row_of[sequence.seq_id]
                for ahead in range(1 + len(sequence.draft)):
                    yield Place(sequence, first + ahead, ahead)

    def _choose_together(self, logits: StepLogits, group: list[Place]) -> list[Choice]:
        """Choose the tokens of a group; one after the other if that fails, to find the request at fault."""
        assert logits.rows is not None
        with suppress(Exception):
            return choose_together(logits.rows, group, self._eos)
        choices = []
        for place in group:
            with self._blaming(place.sequence.request_id):
                choices += choose_together(logits.rows, [place], self._eos)
        return choices

    def _commit(self, output: TokenOutput) -> bool:
        """Append a token to its sequence; end the sequence with its last token. False: its request failed."""
        if self.manager.has_sequence(output.seq_id):
            with self._blaming(output.request_id):
                for token in (*(one.token for one in output.earlier), output.token):
                    self.manager.commit({output.seq_id: token})
                if output.finish_reason is not None:
                    self.manager.finish(output.seq_id)
                return True
        return False

    def _advance_searches(self, logits: StepLogits) -> None:
        """Collect the likeliest tokens of the beams that were computed, and advance each complete search.

        After a preemption, the beams of one search may be computed in different steps: the search waits for
        all of them.
        """
        for sequence in self._ready(logits):
            searching = self._searches.get(sequence.request_id)
            if searching is None or not self.manager.has_sequence(sequence.seq_id):
                continue
            with self._blaming(sequence.request_id):
                search, candidates = searching.search, searching.candidates
                row = log_probabilities(logits[sequence.seq_id])
                candidates[sequence.seq_id] = likeliest(row, search.num_candidates)
                if len(candidates) == len(search.beams):
                    self._advance(sequence.request_id, search, candidates)

    def _advance(
        self, request_id: str, search: BeamSearch, candidates: dict[str, list[tuple[int, float]]]
    ) -> None:
        """Advance a search by its beams' candidates, or end it."""
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
        """Fail the request if the block raises."""
        try:
            yield
        except BaseException as error:  # from a library, for example
            if ends_process(error):
                raise
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: BaseException) -> None:
        """End a request with an error; a second error of the same request is ignored."""
        self._failures.setdefault(request_id, Failure(request_id, error))
        self.cancel(request_id)
