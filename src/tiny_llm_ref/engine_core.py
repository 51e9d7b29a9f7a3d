"""Requests in, tokens out: the loop around a batch manager. Schedule, run, sample, commit.

Knows token ids and nothing of text; has no thread of its own and never prints. One thread owns it,
because it owns every array.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx

from .batch_manager import BatchManager
from .beam_search import BeamSearch, BeamSearchParams
from .paged_batch import PagedBatchManager
from .paged_queues import BeamStep
from .sampler import adjust_logits, log_probabilities, sample_token
from .sampling_params import SamplingParams
from .sequence import Sequence, TokenLogprobs, completion_ids
from .step import StepLogits


class TokenOutput(NamedTuple):
    """One token that one sequence of a request has just got.

    finish_reason: "stop" or "length" where it was the last one; stop_token: the token of
    `stop_token_ids` that ended it, None for an end-of-sequence token. prompt_logprobs: with a
    sequence's first token, where they are asked for: one entry for each prompt token but the first.
    num_cached_tokens: tokens of the prompt that came from the prefix cache.
    """

    request_id: str
    seq_id: str
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    stop_token: int | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """How full the engine is, in sequences and blocks, and what it has met so far.

    num_cached_blocks: blocks that nobody uses, kept because their tokens may come again.
    prefix_cache_queries, prefix_cache_hits: prompt tokens of requests that have begun, and those of them that
    were in the pool already.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    num_blocks: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int


@dataclass
class _Searching:
    """A search, and the candidates of those of its beams that were computed since it last advanced."""

    search: BeamSearch
    candidates: dict[str, list[tuple[int, float]]]


class EngineCore:
    """Steps a batch manager, samples each ready sequence, and ends those that are done."""

    def __init__(self, manager: BatchManager, eos_token_ids: Seq[int], seed: int = 0) -> None:
        self.manager = manager
        self._eos = frozenset(eos_token_ids)
        self._seed = seed
        self._num_admitted = 0
        self._searches: dict[str, _Searching] = {}

    def add_request(self, request_id: str, tokens: list[int], params: SamplingParams) -> bool:
        """Queue a request; False when it cannot be queued now, an error when it never can.

        A request without a seed gets one here, from the engine's seed and its place in the order of
        arrival.
        """
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
        sampling = SamplingParams(n=width, max_tokens=params.max_tokens, cache_salt=salt)
        self.manager.add_request(tokens, request_id, sampling, beam_search=True)
        search = BeamSearch(params, self._eos)
        self._searches[request_id] = _Searching(search, {})
        self._num_admitted += 1
        return search

    def step(self) -> list[TokenOutput]:
        """Run one step; the tokens that it gave, at most one for each running sequence."""
        logits = self.manager.process_batch()
        outputs = self._sample(logits)
        self._advance_searches(logits)
        self.manager.commit({output.seq_id: output.token for output in outputs})
        for output in outputs:
            if output.finish_reason is not None:
                self.manager.finish(output.seq_id)
        return outputs

    def finish(self, seq_id: str) -> None:
        """End one sequence, for a reason that is not its token's (a stop string)."""
        self.manager.finish(seq_id)

    def cancel(self, request_id: str) -> None:
        """End a request, whatever its state; an unknown or ended id is ignored."""
        self._searches.pop(request_id, None)
        self.manager.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """True while a request has not ended."""
        return self.manager.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        manager = self.manager
        return EngineStats(
            num_running=len(manager.running),
            num_waiting=len(manager.waiting),
            num_free_blocks=manager.capacity.num_free,
            num_cached_blocks=manager.capacity.num_cached,
            num_blocks=manager.capacity.num_blocks,
            num_preemptions=manager.num_preemptions,
            prefix_cache_queries=manager.prefix_stats.queries,
            prefix_cache_hits=manager.prefix_stats.hits,
        )

    def _sample(self, logits: StepLogits) -> list[TokenOutput]:
        """Choose every ready sequence's token; all rows are evaluated together."""
        self._note_prompt_logprobs(logits)
        known = [self.manager.sequence(seq_id) for seq_id in logits]
        sequences = [sequence for sequence in known if sequence.request_id not in self._searches]
        rows = [logits[sequence.seq_id] for sequence in sequences]
        tokens = [self._choose(row, sequence) for row, sequence in zip(rows, sequences, strict=True)]
        mx.eval(tokens)
        return [
            self._output(sequence, int(token), row)
            for sequence, token, row in zip(sequences, tokens, rows, strict=True)
        ]

    def _advance_searches(self, logits: StepLogits) -> None:
        """Hand the likeliest tokens to the searches whose beams were computed; those that have all go on.

        Beams of one search may be computed in different steps, when they were preempted: the others wait.
        """
        for seq_id in list(logits):
            request_id = self.manager.sequence(seq_id).request_id
            under_way = self._searches.get(request_id)
            if under_way is None:
                continue
            search, candidates = under_way.search, under_way.candidates
            candidates[seq_id] = _likeliest(log_probabilities(logits[seq_id]), search.num_candidates)
            if len(candidates) == len(search.beams):
                self._advance(request_id, search, candidates)

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
            self.cancel(request_id)

    def _choose(self, row: mx.array, sequence: Sequence) -> mx.array:
        """The next token of a sequence, unevaluated, from its row [V]."""
        params, outputs = sequence.params, sequence.outputs
        row = adjust_logits(row, params, sequence.prompt, outputs, self._end_token_ids(params))
        return sample_token(row, params, sequence.seed, len(outputs))

    def _end_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a sequence."""
        return frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self._eos)

    def _note_prompt_logprobs(self, logits: StepLogits) -> None:
        """Take down the log-probabilities of the prompt tokens that this step's rows are about."""
        for seq_id, rows in logits.prompt_rows.items():
            sequence = self.manager.sequence(seq_id)
            assert logits.rows is not None
            for row in rows:
                token = sequence.prompt[len(sequence.prompt_logprobs) + 1]
                num_top = sequence.params.prompt_logprobs or 0
                sequence.prompt_logprobs.append(_logprobs(logits.rows[row], token, num_top))

    def _output(self, sequence: Sequence, token: int, row: mx.array) -> TokenOutput:
        params = sequence.params
        stopped_by = token if token in (params.stop_token_ids or ()) else None
        ended = token in self._end_token_ids(params)
        tells = params.prompt_logprobs is not None and not sequence.outputs
        full = sequence.num_tokens + 1 >= sequence.max_len
        return TokenOutput(
            request_id=sequence.request_id,
            seq_id=sequence.seq_id,
            token=token,
            logprobs=None if params.logprobs is None else _logprobs(row, token, params.logprobs),
            finish_reason="stop" if ended else "length" if full else None,
            stop_token=stopped_by,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if tells else None,
            num_cached_tokens=sequence.num_cached_tokens,
        )


def _logprobs(row: mx.array, token: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of one row [V]: the chosen token's, and the `num_top` likeliest, best first."""
    logprobs = log_probabilities(row)
    chosen = logprobs[token]
    rank = mx.sum(logprobs > chosen) + 1
    mx.eval(chosen, rank)
    return TokenLogprobs(float(chosen), int(rank), tuple(_likeliest(logprobs, num_top)))


def _likeliest(logprobs: mx.array, num_top: int) -> list[tuple[int, float]]:
    """The `num_top` likeliest tokens of a row [V] with their log-probabilities, best first."""
    num_top = min(num_top, logprobs.shape[-1])
    if num_top == 0:
        return []
    likeliest = mx.argpartition(-logprobs, num_top - 1)[:num_top]
    values = logprobs[likeliest]
    mx.eval(likeliest, values)
    pairs = zip(cast(list[int], likeliest.tolist()), cast(list[float], values.tolist()), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
