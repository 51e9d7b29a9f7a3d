"""Continuous batching over pages: requests in, logits out, tokens back.

A step reads as a sentence: schedule, run, commit. `process_batch` schedules and runs, the caller samples,
`commit` takes the tokens. Owns the queues, the allocator, the pool and every table; knows nothing of
sampling, of text, or of why a sequence ends.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import mlx.core as mx

from .batch_manager import Capacity, PrefixStats, longest
from .compaction import compact_memory
from .errors import RequestTooLargeError
from .kv_pool import KVPool
from .layer_groups import LayerGroup, group_layers
from .model import Model
from .page_layout import PageLayout
from .page_scheduler import PageScheduler
from .paged_attention import BlockAllocator
from .paged_queues import BeamStep, PagedQueues
from .policies import Policies, PrefixPolicy
from .queues import QueueViews
from .sampling_params import SamplingParams
from .sequence import PagedSequence, completion_ids
from .step import Plan, StepLogits


class PagedBatchManager(QueueViews[PagedSequence]):
    """Runs many requests at once over one pool of pages.

    max_pages: blocks in the pool. page_size: tokens in a block. max_batch_size: sequences that run
    at once, each completion counted. model: None schedules without computing anything, for the
    bookkeeping alone. max_batched_tokens: tokens in one step. max_model_len: longest prompt + output
    in tokens, at most the model's context. groups: layers that share a table; None: as the model's windows
    have it. min_pages: where given, the pool begins with so many blocks, doubles while they are short, and
    halves while three quarters of it are idle.

    Invariant: every block is free, or counted once for each table that holds it and for the prefix cache.
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
        min_pages: int | None = None,
        groups: Seq[LayerGroup] | None = None,
    ) -> None:
        self.max_pages = max_pages
        self.block_size = page_size
        self._min_pages = min(max_pages, min_pages or max_pages)
        self.allocator = BlockAllocator(self._min_pages)
        self.pool = (
            None if model is None else KVPool.for_model(model.config, self._min_pages, page_size, kv_dtype)
        )
        windows = (None,) if model is None else model.config.windows
        self._layout = PageLayout(tuple(groups or group_layers(windows)), page_size, max_batched_tokens)
        policies = policies or Policies()
        self._swap_pool = (
            None
            if model is None or not policies.swap_blocks
            else KVPool.for_model(model.config, policies.swap_blocks, page_size, kv_dtype)
        )
        self.last_plan: Plan[PagedSequence] = Plan()
        self._queues: PagedQueues = PagedQueues(policies.priority_key)
        self._model = model
        self._max_seqs = max_batch_size
        self._context = max_model_len or (
            max_pages * page_size if model is None else model.config.max_position_embeddings
        )
        self._scheduler = PageScheduler(
            self._queues,
            self.allocator,
            policies,
            self._layout,
            max_seqs=max_batch_size,
            max_tokens=max_batched_tokens,
            max_blocks=max_pages,
        )

    def add_request(
        self,
        tokens: list[int],
        request_id: str,
        params: SamplingParams | None = None,
        seed: int = 0,
        *,
        beam_search: bool = False,
    ) -> bool:
        """Queue a prompt; its pages are taken when it is its turn. True: it is queued.

        One sequence waits, the leader, with an empty table; `num_forks` counts the other completions of `n`.
        beam_search: its `n` sequences are beams: it begins with one, and `advance` says how it goes on.

        Raises ValueError for an empty prompt, `RequestTooLargeError` for a request that could never run, with
        the figures, and `DuplicateRequestError` for an id in use; none of them changes anything.
        """
        params = params or SamplingParams()
        max_len = longest(tokens, params, request_id, self._context, self._max_seqs)
        seq_ids = completion_ids(request_id, params.n)
        self._queues.refuse_id_in_use(request_id, seq_ids)
        leader = PagedSequence(
            seq_id=seq_ids[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=max_len,
            tables=self._layout.tables(self.allocator),
            streams=self._layout.streams(params.cache_salt),
            num_forks=params.n - 1,
            is_beam=beam_search,
        )
        self._refuse_what_never_fits(leader)
        self._queues.add(leader)
        return True

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; the logits of every sequence that is ready for its next token.

        A pool that has grown and is mostly idle gives memory back first. Then the plan, with its pages taken,
        is computed in one packed pass: before it the pool takes the allocator's size and makes the plan's
        copies, and after it all writes are under way. The scheduler is told what was computed, and the plan
        hands out the rows of logits. Without a model all of this happens but the computing.

        Empty when all that ran were chunks of prompts, or nothing is left. Raises `OutOfBlocksError`
        when nothing runs and the next request finds too few pages: the request is dropped then.
        """
        self._give_memory_back()
        plan = self._schedule()
        if plan.is_empty:
            return StepLogits(None, {})
        rows = None if self._model is None else self._run(self._model, plan)
        self._scheduler.computed(plan)
        return plan.conclude(rows, self._fork)

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> None:
        """Let a search go on with these beams, best first: each shares the pages of the one it continues.

        All beams of the request must run and have been computed. Beams that nobody continues end.
        """
        for parent in self._queues.advance(request_id, steps):
            self._scheduler.give_up(parent)

    def finish(self, seq_id: str) -> None:
        """End one sequence, whether it waits or runs: its pages go back. KeyError for one that has ended."""
        self._scheduler.give_up(self._queues.end(seq_id))

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""
        for seq_id in self._queues.forget_forks_to_come(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised: all who ran wait again; the requests that it was to compute.

        Nothing of the step has happened but what was committed. Keys and values that cannot be read any more
        are given up, with the pool's arrays that they were in.
        """
        computing = self._scheduler.undo()
        settled = [pool.settle() for pool in (self.pool, self._swap_pool) if pool is not None]
        if not all(settled):
            self._scheduler.forget_everything()
        return computing

    def compact(self) -> int:
        """Move all blocks in use to the front of the pool, between two steps; how many are free then."""
        tables = [table for sequence in self.running for table in sequence.tables]
        return compact_memory(self.allocator, [*tables, self.prefix], self.pool)

    @property
    def prefix(self) -> PrefixPolicy:
        """What is shared by content."""
        return self._scheduler.prefix

    @property
    def num_preemptions(self) -> int:
        """How often somebody had to give way."""
        return self._scheduler.num_preemptions

    @property
    def num_swapped(self) -> int:
        """Sequences that wait with their keys and values on the host."""
        return self._scheduler.num_swapped

    @property
    def prefix_stats(self) -> PrefixStats:
        """How often a prompt's beginning was there already."""
        return self._scheduler.prefix_stats

    @property
    def capacity(self) -> Capacity:
        """How full the pool is; blocks that it could still grow by are free."""
        nbytes = 0 if self.pool is None else self.pool.nbytes
        to_come = self.max_pages - self.allocator.num_blocks
        swap_space = self._scheduler.swap_space
        return Capacity(
            num_blocks=self.max_pages,
            block_size=self.block_size,
            num_free=self.allocator.num_free + to_come,
            nbytes=nbytes,
            num_cached=self.prefix.num_idle,
            num_host_blocks=0 if swap_space is None else swap_space.allocator.num_blocks,
        )

    def _schedule(self) -> Plan[PagedSequence]:
        """What the next step computes; its pages are taken."""
        self.last_plan = self._scheduler.plan()
        return self.last_plan

    # Run: arrays.

    def _run(self, model: Model, plan: Plan[PagedSequence]) -> mx.array | None:
        """Move a plan's blocks and compute its chunks in one packed forward pass -> logits [R, vocab_size].

        R counts the chunks' `logit_positions`, in packed order; None for R = 0.
        """
        assert self.pool is not None
        self.pool.resize(self.allocator.num_blocks)
        self._swap(self.pool, plan)
        self.pool.copy_blocks(plan.copies)
        if not plan.chunks:
            return None
        tokens, logit_rows = plan.pack()
        spans = [(sequence.tables, start, stop) for sequence, start, stop, _ in plan.chunks]
        rows = mx.array(logit_rows, mx.int32)
        context = self._layout.context(self.pool, spans, model.config.attention_scale, rows)
        logits = model(mx.array([tokens], mx.int32), context)[0]
        if not logit_rows:
            self.pool.evaluate()
            return None
        self.pool.start(logits)  # whoever chooses the tokens describes how while the logits are computed
        return logits

    def _swap(self, pool: KVPool, plan: Plan[PagedSequence]) -> None:
        """Copy blocks to the host and back; what goes out is read before anything is written over it."""
        if self._swap_pool is not None:
            self._swap_pool.fill_from(pool, plan.swapped_out)
            pool.fill_from(self._swap_pool, [(host, block) for block, host in plan.swapped_in.items()])

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        """The leader and, once its prompt is computed, the completions that share its pages."""
        return [leader] if leader.is_beam else self._queues.fork(leader)

    def _give_memory_back(self) -> None:
        """Halve a pool that has grown, while less than a quarter of it is in use."""
        size, half = self.allocator.num_blocks, self.allocator.num_blocks // 2
        in_use = size - self.allocator.num_free - self.prefix.num_idle
        if half < self._min_pages or 4 * in_use >= size:
            return
        self.prefix.evict(size - self.allocator.num_free - half)
        self.compact()
        self.allocator.resize(half)
        if self.pool is not None:
            self.pool.resize(half)

    # The door.

    def _refuse_what_never_fits(self, leader: PagedSequence) -> None:
        """Raise `RequestTooLargeError` for what could not run even with the whole pool to itself."""
        num_completions = 1 + leader.num_forks
        blocks = max(self._most_blocks(leader), self._scheduler.reserved_blocks(leader))
        if blocks > self.max_pages:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: up to {leader.max_len} tokens in {num_completions} "
                f"completions need {blocks} blocks of {self.block_size}; "
                f"the pool has {self.max_pages}",
                "n"
                if num_completions > 1 and self._layout.most_blocks(leader.max_len) <= self.max_pages
                else None,
            )

    def _most_blocks(self, leader: PagedSequence) -> int:
        """Blocks that a request may need at once; beams run together, others one by one if need be."""
        longest_one = self._layout.most_blocks(leader.max_len)
        per_fork = self._layout.blocks_of_fork(len(leader.prompt), leader.max_len)
        return longest_one + (leader.num_forks * per_fork if leader.is_beam else 0)
