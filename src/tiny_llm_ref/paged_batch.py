"""Continuous batching over pages: who runs in this step, with which pages, and what comes of it.

A step reads as a sentence: schedule, run, commit. `process_batch` schedules and runs, the caller
samples, `commit` takes the tokens. Owns the queues, the allocator, the pool and every table; knows
nothing of sampling, of text, or of why a sequence ends.
"""

from collections.abc import Mapping

import mlx.core as mx

from .batch_manager import Capacity, longest, wanted
from .chunked_prefill import share_budget
from .errors import OutOfBlocksError, RequestTooLargeError
from .kv_pool import KVPool
from .model import Model
from .paged_attention import BlockAllocator, BlockTable
from .paged_kernel import PagedContext, Span, pack_batch
from .policies import Policies
from .queues import QueueViews, RequestQueues
from .sampling_params import SamplingParams
from .sequence import PagedSequence, completion_ids
from .step import Plan, Scheduled, StepLogits


class PagedBatchManager(QueueViews[PagedSequence]):
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
        self.pool = None if model is None else KVPool.for_model(model.config, max_pages, page_size, kv_dtype)
        self.num_preemptions = 0
        self._queues = RequestQueues[PagedSequence]()
        self._model = model
        self._max_seqs = max_batch_size
        self._max_tokens = max_batched_tokens
        self._context = max_model_len or (
            max_pages * page_size if model is None else model.config.max_position_embeddings
        )
        self._policies = policies or Policies()

    def add_request(
        self, tokens: list[int], request_id: str, params: SamplingParams | None = None, seed: int = 0
    ) -> bool:
        """Queue a prompt; its pages are taken when it is its turn. True: it is queued.

        Raises `RequestTooLargeError` for a request that could never run, with the figures, and
        `DuplicateRequestError` for an id in use; neither changes anything.
        """
        params = params or SamplingParams()
        seq_ids = completion_ids(request_id, params.n)
        self._queues.refuse_id_in_use(request_id, seq_ids)
        leader = PagedSequence(
            seq_id=seq_ids[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=longest(tokens, params, request_id, self._context, self._max_seqs),
            table=BlockTable(self.allocator, self.block_size),
            num_forks=params.n - 1,
        )
        self._refuse_what_never_fits(leader)
        self._queues.add(leader)
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
        return plan.conclude(rows, self._fork)

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def finish(self, seq_id: str) -> None:
        """End one sequence: its pages go back. KeyError for one that has ended."""
        self._queues.end(seq_id).table.release()

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""
        for seq_id in self._queues.forget_forks_to_come(request_id):
            self.finish(seq_id)

    @property
    def capacity(self) -> Capacity:
        """How full the pool is."""
        nbytes = 0 if self.pool is None else self.pool.nbytes
        return Capacity(self.allocator.num_blocks, self.block_size, self.allocator.num_free, nbytes)

    # Schedule: plain bookkeeping over ints.

    def _schedule(self) -> Plan[PagedSequence]:
        """Admit what fits, share the token budget, and take the pages, preempting where they run out."""
        self._admit()
        granted = share_budget([wanted(sequence) for sequence in self.running], self._max_tokens)
        plan: Plan[PagedSequence] = Plan([], [])
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
            self._queues.start_next()

    def _promised_blocks(self, sequence: PagedSequence) -> int:
        """Blocks that must stay available for a sequence beyond those that it holds."""
        tokens = self._policies.preemption.promised_tokens(sequence)
        table = sequence.table
        own = table.blocks_to_append(max(0, tokens - table.num_tokens))
        shared_by_forks = len(sequence.prompt) // table.block_size
        per_fork = max(0, -(-tokens // table.block_size) - shared_by_forks)
        return own + sequence.num_forks * per_fork

    def _make_room(self, sequence: PagedSequence, count: int) -> bool:
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

    def _preempt(self, sequence: PagedSequence) -> None:
        """Take a running sequence's pages; it waits at the head of the queue to compute them again."""
        self._queues.put_back(sequence)
        sequence.give_up_pages()
        self.num_preemptions += 1

    # Run: arrays.

    def _run(self, model: Model, plan: Plan[PagedSequence]) -> mx.array | None:
        """Compute the chunks of a plan in one packed forward pass -> logits [R, vocab_size].

        R counts the chunks' `logit_positions`, in packed order; None for R = 0.
        """
        assert self.pool is not None
        self.pool.copy_blocks(plan.copies)
        tokens, logit_rows = plan.pack()
        batch = pack_batch([Span(sequence.table, start, stop) for sequence, start, stop in plan.chunks])
        context = PagedContext(self.pool, batch, model.config.attention_scale, mx.array(logit_rows, mx.int32))
        logits = model(mx.array([tokens], mx.int32), context)[0]
        if not logit_rows:
            self.pool.evaluate()
            return None
        self.pool.evaluate(logits)
        return logits

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        """The leader and, once its prompt is computed, the completions that share its pages."""
        return self._queues.fork(leader)

    # The door.

    def _refuse_what_never_fits(self, leader: PagedSequence) -> None:
        """Raise `RequestTooLargeError` for what could not run even with the whole pool to itself."""
        num_completions = 1 + leader.num_forks
        blocks = max(-(-leader.max_len // self.block_size), self._promised_blocks(leader))
        if blocks > self.allocator.num_blocks:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: up to {leader.max_len} tokens in {num_completions} "
                f"completions need {blocks} blocks of {self.block_size}; "
                f"the pool has {self.allocator.num_blocks}"
            )

    def _refuse_stuck(self, sequence: PagedSequence, needed: int) -> None:
        """Drop a request that waits for pages which nobody is left to give back."""
        self.cancel(sequence.request_id)
        raise OutOfBlocksError(
            f"request {sequence.request_id!r} needs {needed} blocks, {self.allocator.num_free} of "
            f"{self.allocator.num_blocks} are free, and no running sequence will give any back"
        )
