"""Continuous batching over pages: who runs in this step, with which pages, and what comes of it.

A step reads as a sentence: schedule, run, commit. `process_batch` schedules and runs, the caller
samples, `commit` takes the tokens. Owns the queues, the allocator, the pool and every table; knows
nothing of sampling, of text, or of why a sequence ends.
"""

from collections import deque
from collections.abc import Mapping

import mlx.core as mx

from .chunked_prefill import share_budget
from .errors import DuplicateRequestError, OutOfBlocksError, RequestTooLargeError
from .kv_pool import KVPool
from .model import Model
from .paged_attention import BlockAllocator, BlockTable
from .paged_kernel import PagedContext, Span, pack_batch
from .policies import Policies
from .sampling_params import SamplingParams
from .sequence import Sequence, SequenceState, completion_ids
from .step import Plan, Scheduled, StepLogits

PROMPT_ROWS_AT_ONCE = 64  # rows of logits a step: 64 x 150,000 numbers are 38 MB


class PagedBatchManager:
    """Runs many requests at once over one pool of pages.

    max_pages: blocks in the pool. page_size: tokens in a block. max_batch_size: sequences that run
    at once, each completion counted. model: None schedules without computing anything, for the
    bookkeeping alone. max_batched_tokens: tokens in one step. max_model_len: longest prompt + output
    in tokens, at most the model's context.

    Invariant: every block is free, or counted once for each table that holds it.
    """

    def __init__(
        self,
        max_pages: int,
        page_size: int,
        max_batch_size: int,
        *,
        model: Model | None = None,
        max_batched_tokens: int = 512,
        max_model_len: int | None = None,
        kv_dtype: mx.Dtype = mx.float16,
        policies: Policies | None = None,
    ) -> None:
        self.allocator = BlockAllocator(max_pages)
        self.block_size = page_size
        self.pool = None if model is None else KVPool(model.config, max_pages, page_size, kv_dtype)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._model = model
        self._max_seqs = max_batch_size
        self._max_tokens = max_batched_tokens
        self._context = max_model_len or (
            max_pages * page_size if model is None else model.config.max_position_embeddings
        )
        self._policies = policies or Policies()
        self._sequences: dict[str, Sequence] = {}  # a completion that is not forked yet maps to its leader

    def add_request(
        self, tokens: list[int], request_id: str, params: SamplingParams | None = None, seed: int = 0
    ) -> bool:
        """Queue a prompt; its pages are taken when it is its turn. True: it is queued.

        Raises `RequestTooLargeError` for a request that could never run, with the figures, and
        `DuplicateRequestError` for an id in use; neither changes anything.
        """
        params = params or SamplingParams()
        seq_ids = completion_ids(request_id, params.n)
        in_use = request_id in {sequence.request_id for sequence in self._sequences.values()}
        if in_use or any(seq_id in self._sequences for seq_id in seq_ids):
            raise DuplicateRequestError(
                f"request id {request_id!r} is in use by a request that has not ended"
            )
        if not tokens:
            raise ValueError(f"request {request_id!r} has no tokens: there is nothing to continue")
        max_outputs = self._context - len(tokens) if params.max_tokens is None else params.max_tokens
        leader = Sequence(
            seq_id=seq_ids[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=len(tokens) + max_outputs,
            table=BlockTable(self.allocator, self.block_size),
            num_forks=params.n - 1,
        )
        self._refuse_what_never_fits(leader)
        self.waiting.append(leader)
        self._sequences.update(dict.fromkeys(seq_ids, leader))
        return True

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; the logits of every sequence that is ready for its next token.

        Empty when all that ran were chunks of prompts, or nothing is left. Raises `OutOfBlocksError`
        when nothing runs and the next request finds too few pages: the request is dropped then.
        """
        plan = self._schedule()
        if not plan.chunks:
            return StepLogits(None, {})
        rows = None if self._model is None else self._run(self._model, plan)
        logits, next_row = StepLogits(rows, {}), 0
        for chunk in plan.chunks:
            first, next_row = next_row, next_row + len(chunk.logit_positions)
            last = next_row - 1 if chunk.is_last else next_row
            if last > first:
                logits.prompt_rows[chunk.sequence.seq_id] = range(first, last)
            chunk.sequence.num_computed = chunk.stop
            if chunk.is_last:
                logits.row_of.update((seq.seq_id, last) for seq in self._fork(chunk.sequence))
        return logits

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""
        for seq_id, token in tokens.items():
            self._sequences[seq_id].outputs.append(token)

    def finish(self, seq_id: str) -> None:
        """End one sequence: its pages go back. KeyError for one that has ended."""
        sequence = self._sequences.pop(seq_id)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.table.release()
        sequence.state = SequenceState.FINISHED

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""
        ended = {seq_id: seq for seq_id, seq in self._sequences.items() if seq.request_id == request_id}
        for seq_id, sequence in ended.items():
            if seq_id == sequence.seq_id:
                self.finish(seq_id)
            else:
                del self._sequences[seq_id]  # a completion that was never forked

    @property
    def has_work(self) -> bool:
        """True while a request has not ended."""
        return bool(self._sequences)

    def sequence(self, seq_id: str) -> Sequence:
        """The unfinished sequence of that id; KeyError for another."""
        return self._sequences[seq_id]

    # Schedule: plain bookkeeping over ints.

    def _schedule(self) -> Plan:
        """Admit what fits, share the token budget, and take the pages, preempting where they run out."""
        self._admit()
        granted = share_budget([_wanted(sequence) for sequence in self.running], self._max_tokens)
        plan = Plan([], [])
        for sequence, count in zip(list(self.running), granted, strict=True):
            if count and sequence in self.running and self._make_room(sequence, count):
                start = sequence.num_computed
                plan.copies.extend(sequence.table.append_tokens(count))
                plan.chunks.append(Scheduled(sequence, start, start + count))
        return plan

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while there are seats and the pages promised to them."""
        while self.waiting:
            sequence = self.waiting[0]
            seats = self._max_seqs - sum(1 + running.num_forks for running in self.running)
            if 1 + sequence.num_forks > seats:
                return
            needed = self._promised_blocks(sequence)
            available = self.allocator.num_free - sum(map(self._promised_blocks, self.running))
            if needed > available:
                if not self.running:
                    self._refuse_stuck(sequence, needed)
                return
            self.running.append(self.waiting.popleft())
            sequence.state = SequenceState.RUNNING

    def _promised_blocks(self, sequence: Sequence) -> int:
        """Blocks that must stay available for a sequence beyond those that it holds."""
        tokens = self._policies.preemption.promised_tokens(sequence)
        table = sequence.table
        own = table.blocks_to_append(max(0, tokens - table.num_tokens))
        shared_by_forks = len(sequence.prompt) // table.block_size
        per_fork = max(0, -(-tokens // table.block_size) - shared_by_forks)
        return own + sequence.num_forks * per_fork

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Preempt until `count` more tokens fit; False when `sequence` itself had to give way."""
        while sequence.table.blocks_to_append(count) > self.allocator.num_free:
            candidates = self.running[self.running.index(sequence) :]
            victim = self._policies.preemption.choose_victim(candidates)
            if victim is None:
                raise OutOfBlocksError(
                    f"sequence {sequence.seq_id!r} needs {sequence.table.blocks_to_append(count)} more "
                    f"blocks, {self.allocator.num_free} of {self.allocator.num_blocks} are free, and nobody "
                    "may be preempted"
                )
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits at the head of the queue to compute them again."""
        self.running.remove(sequence)
        sequence.give_up_pages()
        sequence.state = SequenceState.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    # Run: arrays.

    def _run(self, model: Model, plan: Plan) -> mx.array | None:
        """Compute the chunks of a plan in one packed forward pass -> logits [R, vocab_size].

        R counts the chunks' `logit_positions`, in packed order; None for R = 0.
        """
        assert self.pool is not None
        self.pool.copy_blocks(plan.copies)
        tokens: list[int] = []
        logit_rows: list[int] = []
        for chunk in plan.chunks:
            logit_rows.extend(len(tokens) + at - chunk.start for at in chunk.logit_positions)
            tokens.extend(chunk.sequence.tokens(chunk.start, chunk.stop))
        batch = pack_batch([Span(sequence.table, start, stop) for sequence, start, stop in plan.chunks])
        context = PagedContext(self.pool, batch, model.config.attention_scale, mx.array(logit_rows, mx.int32))
        logits = model(mx.array([tokens], mx.int32), context)[0]
        if not logit_rows:
            self.pool.evaluate()
            return None
        self.pool.evaluate(logits)
        return logits

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """The leader and, once its prompt is computed, the completions that share its pages."""
        forks = [
            leader.fork(seq_id, leader.seed + i)
            for i, seq_id in enumerate(completion_ids(leader.request_id, 1 + leader.num_forks)[1:], start=1)
        ]
        leader.num_forks = 0
        after = self.running.index(leader) + 1
        self.running[after:after] = forks
        self._sequences.update({fork.seq_id: fork for fork in forks})
        return [leader, *forks]

    # The door.

    def _refuse_what_never_fits(self, leader: Sequence) -> None:
        """Raise `RequestTooLargeError` for what could not run even with the whole pool to itself."""
        prompt_len, num_completions = len(leader.prompt), 1 + leader.num_forks
        if leader.max_len > self._context or prompt_len >= self._context:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: {prompt_len} prompt tokens and "
                f"{max(1, leader.max_len - prompt_len)} output tokens exceed the context of {self._context}"
            )
        if num_completions > self._max_seqs:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: n = {num_completions} exceeds the {self._max_seqs} "
                "sequences that may run at once"
            )
        blocks = max(-(-leader.max_len // self.block_size), self._promised_blocks(leader))
        if blocks > self.allocator.num_blocks:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: up to {leader.max_len} tokens in {num_completions} "
                f"completions need {blocks} blocks of {self.block_size}; "
                f"the pool has {self.allocator.num_blocks}"
            )

    def _refuse_stuck(self, sequence: Sequence, needed: int) -> None:
        """Drop a request that waits for pages which nobody is left to give back."""
        self.cancel(sequence.request_id)
        raise OutOfBlocksError(
            f"request {sequence.request_id!r} needs {needed} blocks, {self.allocator.num_free} of "
            f"{self.allocator.num_blocks} are free, and no running sequence will give any back"
        )


def _wanted(sequence: Sequence) -> int:
    """Tokens that a sequence could compute now; fewer where each of them needs a row of logits."""
    if sequence.params.prompt_logprobs is None:
        return sequence.num_uncomputed
    return min(sequence.num_uncomputed, PROMPT_ROWS_AT_ONCE)
