"""Continuous batching over pages: requests in, logits out, tokens back.

A step is: `process_batch` schedules and runs, the caller samples, `commit` takes the tokens. Owns the queues,
the allocator, the pool and every table; knows nothing of sampling, of text, or of why a sequence ends.
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

    max_pages: the most blocks in the pool. page_size: tokens in a block. max_batch_size: sequences that run
    at once, each completion counted. model: None schedules without computing anything: only the bookkeeping.
    max_batched_tokens: tokens in one step. max_model_len: longest prompt + output in tokens, at most the
    model's context. groups: layers that share a block table; None: as the model's windows need it. min_pages:
    the blocks that the pool begins with; it doubles when they are short, up to max_pages, and halves when
    less than a quarter is in use. None: it has max_pages all the time.

    Most of what it does is in its parts:
    - `_queues`: the sequences that wait and run, by id.
    - `_scheduler`: plans a step (admission, pages, preemption) over the queues and `allocator`.
    - `_layout`: how a sequence's tokens are in pages. Here a sequence has one block table; if layers see
      differently far (sliding windows, day 3.5) it has one for each group of layers, and `_layout` knows.
    - `_swap_pool`: blocks on the host for preempted sequences (swapping, day 3.6); mostly None.

    Invariant: a block's count is the number of block tables that have it, and one more if the prefix cache
    has it.
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
        self.pool: KVPool | None = (
            None if model is None else KVPool.for_model(model.config, self._min_pages, page_size, kv_dtype)
        )
        windows = (None,) if model is None else model.config.windows
        self._layout = PageLayout(tuple(groups or group_layers(windows)), page_size, max_batched_tokens)
        policies = policies or Policies()
        self._swap_pool: KVPool | None = (
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
        """Queue a request, and return True. It takes no pages: a step does that when it admits the request.

        One sequence is queued for the whole request, its leader; the given `_new_leader` makes it. params:
        None is `SamplingParams()`. beam_search: the leader is a search's first beam, and `params.n` the
        search's width.

        Everything that is wrong with a request is found here, and then nothing changes: the id stays free for
        another request. `_queues.add` changes something; these only look. Call them in this order, so that a
        request that is wrong in two ways gets the first error:
        - `longest`: ValueError for an empty prompt, `RequestTooLargeError` for a request that is longer than
          `_context` tokens or has more completions (or beams) than `_max_seqs`, which would wait for ever.
          Its argument `context` is `_context`, `seats` is `_max_seqs`; its result is the leader's `max_len`.
        - `_queues.refuse_id_in_use`: `DuplicateRequestError` if the request's id or one of its
          `completion_ids` belongs to a request that has not ended.
        - `_refuse_what_never_fits`: `RequestTooLargeError` for a leader whose request needs more blocks than
          the pool can ever have. In the queue it would wait for ever, and all requests behind it too.

        >>> manager = PagedBatchManager(max_pages=8, page_size=4, max_batch_size=4)
        >>> manager.add_request([5, 6, 7], "a", SamplingParams(n=2, max_tokens=4))
        True
        >>> [(one.seq_id, one.num_forks, one.max_len) for one in manager.waiting], manager.capacity.num_free
        ([('a/0', 1, 7)], 8)
        """
        params = params or SamplingParams()
        max_len = longest(tokens, params, request_id, self._context, self._max_seqs)
        self._queues.refuse_id_in_use(request_id, completion_ids(request_id, params.n))
        leader = self._new_leader(tokens, request_id, params, seed, max_len, is_beam=beam_search)
        self._refuse_what_never_fits(leader)
        self._queues.add(leader)
        return True

    def give_memory_back(self) -> None:
        """Halve a pool that is mostly unused: once a call, between two steps.

        Blocks in use are those that are neither free nor idle in the prefix cache (`prefix.num_idle` counts
        those that it keeps for later requests and no sequence has). The pool halves, rounded down, if less
        than a quarter of its blocks is in use and half of it is at least `_min_pages`; otherwise nothing
        changes. Why a quarter: a pool doubles when it is full, so it is half full then; if it halved at less
        than a half, a request that comes and goes would make it grow and shrink, with all its copies, in
        every few steps.

        Blocks in use need not be in the front half, and idle ones may be too many for it. `prefix.evict(n)`
        frees n idle blocks: n = held - half, where held = in use + idle (for n < 1 it does nothing).
        `compact` moves what is held to the front, and `resize` of the allocator and of the pool (None without
        a model) cuts the end off.

        >>> manager = PagedBatchManager(max_pages=64, page_size=4, max_batch_size=4, min_pages=4)
        >>> manager.allocator.resize(20)
        >>> for _ in range(3):
        ...     manager.give_memory_back()
        ...     print(manager.allocator.num_blocks)
        10
        5
        5
        """
        size, half = self.allocator.num_blocks, self.allocator.num_blocks // 2
        in_use = size - self.allocator.num_free - self.prefix.num_idle
        if half < self._min_pages or 4 * in_use >= size:
            return
        self.prefix.evict(size - self.allocator.num_free - half)
        self.compact()
        self.allocator.resize(half)
        if self.pool is not None:
            self.pool.resize(half)

    def run_plan(self, plan: Plan[PagedSequence]) -> mx.array | None:
        """Compute a plan in one packed forward pass -> logits [R, vocab_size], or None if there are none.

        The pass writes to blocks of the pool, so these are made ready before: the pool gets the allocator's
        number of blocks (`resize`), then blocks are exchanged with the host (`_swap`), then the plan's copies
        are made (`copy_blocks`): a copy may overwrite a block that goes to the host, or read one that comes
        back. A plan may have no chunks, only blocks to exchange: then that is all.

        A chunk is a sequence and the positions start .. stop - 1 that it computes. `plan.pack()` gives the
        token ids of all chunks side by side, T of them, and the R indices among them that need logits. The
        model takes tokens [1, T] int32 and a context, and returns [1, R, vocab_size]. `_layout.context` makes
        the context: it wants each chunk's `sequence.tables`, start and stop; the model's
        `config.attention_scale`; the R indices as int32. (A `PagedContext` made here would be right only
        while every sequence has one table.)

        MLX is lazy: the pass is only described until something evaluates it, and that must happen before the
        next write to the pool. With R > 0 `pool.start(logits)` begins with the logits and all writes, and
        the caller goes on meanwhile; the logits are waited for when the caller samples. With R = 0, where all
        chunks are beginnings of prompts, no caller will wait: `pool.evaluate()` computes the writes here.

        Returns None without a model (then nothing happens at all), without a chunk, and for R = 0.

        >>> manager = PagedBatchManager(max_pages=8, page_size=4, max_batch_size=4)
        >>> manager.run_plan(Plan()) is None  # no model: nothing is computed
        True
        """
        if self._model is None or self.pool is None:
            return None
        self.pool.resize(self.allocator.num_blocks)
        self._swap(self.pool, plan)
        self.pool.copy_blocks(plan.copies)
        if not plan.chunks:
            return None
        tokens, logit_rows = plan.pack()
        spans = [(sequence.tables, start, stop) for sequence, start, stop, _ in plan.chunks]
        scale, rows = self._model.config.attention_scale, mx.array(logit_rows, mx.int32)
        context = self._layout.context(self.pool, spans, scale, rows)
        logits = self._model(mx.array([tokens], mx.int32), context)[0]
        if not logit_rows:
            self.pool.evaluate()
            return None
        self.pool.start(logits)
        return logits

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; returns the logits of every sequence that is ready for its next token.

        It has five parts, each called once. What they need from one another tells their order:
        - `_scheduler.computed(plan)`: from now on other sequences may share the plan's blocks by content, so
          they must have been computed: if the model raises, nothing of the plan may be shared (without a
          model there is nothing to compute, and the rest happens all the same).
        - `give_memory_back`: moves blocks, so it comes before this step's plan names any; an idle step gives
          memory back too.
        - `plan.conclude(rows, self._fork)`: counts the chunks' tokens as computed, makes the completions of a
          leader whose prompt is complete, which share its pages as `computed` left them, and says which row
          of `rows` (or None) is whose: its `StepLogits` is the result.
        - `run_plan`: the rows.
        - `_schedule`: plans the step, takes its pages, and keeps the plan as `last_plan`. A plan that
          `is_empty` has nothing to do: the step is over, with `StepLogits(None, {})`.

        Raises `OutOfBlocksError` if nothing runs and the next request finds too few pages; that request is
        dropped. `_schedule` does this.

        >>> manager = PagedBatchManager(max_pages=8, page_size=4, max_batch_size=4, max_batched_tokens=4)
        >>> manager.add_request([5] * 6, "a", SamplingParams(n=2, max_tokens=4))
        True
        >>> [sorted(manager.process_batch()) for _ in range(2)]  # 4 tokens of the prompt, then 2
        [[], ['a/0', 'a/1']]
        >>> manager.sequence("a/1").num_computed, manager.capacity.num_free
        (6, 6)
        """
        self.give_memory_back()
        plan = self._schedule()
        if plan.is_empty:
            return StepLogits(None, {})
        rows = self.run_plan(plan)
        self._scheduler.computed(plan)
        return plan.conclude(rows, self._fork)

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> None:
        """Continue a search with these beams, best first: each shares the pages of the beam it continues.

        All beams of the request must run and have been computed. Beams that are not continued end.
        """
        for parent in self._queues.advance(request_id, steps):
            self._scheduler.give_up(parent)

    def finish(self, seq_id: str) -> None:
        """End one sequence, waiting or running: its pages are freed. KeyError for an unknown or ended id."""
        self._scheduler.give_up(self._queues.end(seq_id))

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""
        for seq_id in self._queues.forget_forks_to_come(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised: all that ran wait again; returns the requests that it was to compute.

        Only what was committed stays. Keys and values that cannot be read any more are given up, with the
        pool's arrays that they were in.
        """
        computing = self._scheduler.undo()
        settled = [pool.settle() for pool in (self.pool, self._swap_pool) if pool is not None]
        if not all(settled):
            self._scheduler.forget_everything()
        return computing

    def compact(self) -> int:
        """Move all blocks in use to the front of the pool, between two steps; returns how many are free."""
        tables = [table for sequence in self.running for table in sequence.tables]
        return compact_memory(self.allocator, [*tables, self.prefix], self.pool)

    @property
    def prefix(self) -> PrefixPolicy:
        """The policy that shares blocks by content."""
        return self._scheduler.prefix

    @property
    def num_preemptions(self) -> int:
        """The number of preemptions so far."""
        return self._scheduler.num_preemptions

    @property
    def num_swapped(self) -> int:
        """The number of sequences that wait with their keys and values on the host."""
        return self._scheduler.num_swapped

    @property
    def prefix_stats(self) -> PrefixStats:
        """How many prompt tokens there were, and how many of them were in the pool already."""
        return self._scheduler.prefix_stats

    @property
    def capacity(self) -> Capacity:
        """How full the pool is; blocks that it can still grow by count as free."""
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
        """Plan the next step, take its pages, and keep the plan as `last_plan`."""
        self.last_plan = self._scheduler.plan()
        return self.last_plan

    def _swap(self, pool: KVPool, plan: Plan[PagedSequence]) -> None:
        """Copy a plan's swapped blocks to the host, then others back; nothing without a swap pool."""
        if self._swap_pool is not None:
            self._swap_pool.fill_from(pool, plan.swapped_out)
            pool.fill_from(self._swap_pool, [(host, block) for block, host in plan.swapped_in.items()])

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        """The sequences that share a ready sequence's logits: it, and its completions if they are to come.

        The completions become sequences of their own here, which share its pages. A beam has none: `advance`
        forks it.
        """
        return [leader] if leader.is_beam else self._queues.fork(leader)

    # Admission.

    def _new_leader(
        self,
        tokens: list[int],
        request_id: str,
        params: SamplingParams,
        seed: int,
        max_len: int,
        *,
        is_beam: bool,
    ) -> PagedSequence:
        """A request's leader: nothing computed, empty tables, `num_forks` for the completions to come."""
        return PagedSequence(
            seq_id=completion_ids(request_id, params.n)[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=max_len,
            tables=self._layout.tables(self.allocator),
            streams=self._layout.streams(params.cache_salt),
            num_forks=params.n - 1,
            is_beam=is_beam,
        )

    def _refuse_what_never_fits(self, leader: PagedSequence) -> None:
        """Raise `RequestTooLargeError` for a request that could not run even with the whole pool."""
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
        """The most blocks that a request must have at once: beams run together, completions need not."""
        longest_one = self._layout.most_blocks(leader.max_len)
        per_fork = self._layout.blocks_of_fork(len(leader.prompt), leader.max_len)
        return longest_one + (leader.num_forks * per_fork if leader.is_beam else 0)
