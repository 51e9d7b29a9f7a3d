"""Continuous batching over pages: takes requests and sampled tokens, returns logits.

A step: `process_batch` schedules and runs the model, the caller samples, `commit` appends the tokens. Owns
the queues, the allocator, the pool and every table. Knows nothing of sampling, of text, or of why a sequence
ends.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import mlx.core as mx

from tiny_llm_checkpoints.sizes import counted

from .batch_manager import Capacity, DraftStats, PrefixStats, max_sequence_length
from .compaction import compact_memory
from .errors import RequestTooLargeError
from .kv_pool import KVPool
from .layer_groups import LayerGroup, group_layers
from .model import Model
from .page_layout import PageLayout
from .page_scheduler import PageScheduler
from .paged_attention import BlockAllocator
from .paged_queues import BeamStep, PagedQueues
from .policies import DraftPolicy, Policies, PrefixPolicy
from .queues import QueueViews
from .sampling_params import SamplingParams
from .sequence import PagedSequence, completion_ids
from .step import Plan, StepLogits


class PagedBatchManager(QueueViews[PagedSequence]):
    """Runs many requests at once over one pool of pages.

    max_pages: the maximum number of blocks in the pool. page_size: tokens in a block. max_batch_size: the
    maximum number of sequences that run at once; each completion counts. model: if None, only the bookkeeping
    is done, and nothing is computed. max_batched_tokens: the maximum number of tokens in one step.
    max_model_len: the longest prompt + output in tokens, at most the model's context. groups: the layers that
    share a block table; None: derived from the model's windows. min_pages: blocks in the pool at the start.
    The pool doubles when blocks are short, up to max_pages, and halves when less than a quarter is in use.
    None: it always has max_pages blocks.

    Its parts do most of the work:
    - `_queues`: the waiting and running sequences, by id.
    - `_scheduler`: plans a step (admission; pages; preemption, which stops a running sequence to free its
      blocks) over the queues and `allocator`.
    - `_layout`: how a sequence's tokens are laid out in pages. Until day 3.5 a sequence has one block table.
      If layers differ in their windows (day 3.5), it has one for each group of layers, and `_layout` makes
      them.
    - `_swap_pool`: blocks on the host for preempted sequences (swapping, day 3.6); usually None.

    Invariant: a block's count is the number of block tables that have it, plus one if the prefix cache keeps
    it.
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
        """Queue a request, and return True. It takes no pages until a later step admits it.

        One sequence is queued for the whole request, its leader; the given `_new_leader` makes it. params:
        None means `SamplingParams()`. beam_search: if True, the leader is a search's first beam (`is_beam`),
        and `params.n` is the search's width.

        Reject an invalid request before anything changes, so that its id stays free for another request. Make
        these checks in this order, because a request may fail several of them, and only then call
        `_queues.add(leader)`:

        1. `max_sequence_length` raises ValueError for an empty prompt, and `RequestTooLargeError` for a
           request that is longer than `_context` tokens (its argument `context`) or has more completions or
           beams than `_max_seqs` (its argument `max_seqs`). It returns the leader's `max_len`.
        2. `_queues.refuse_id_in_use` raises `DuplicateRequestError` if the request's id or one of its
           `completion_ids` belongs to a request that has not ended.
        3. `_reject_if_too_large(leader)` raises `RequestTooLargeError` if the request needs more blocks
           than the pool can ever have. It would wait forever, and so would all requests after it.

        >>> manager = PagedBatchManager(max_pages=8, page_size=4, max_batch_size=4)
        >>> manager.add_request([5, 6, 7], "a", SamplingParams(n=2, max_tokens=4))
        True
        >>> [(one.seq_id, one.num_forks, one.max_len) for one in manager.waiting], manager.capacity.num_free
        ([('a/0', 1, 7)], 8)
        """
        params = params or SamplingParams()
        max_len = max_sequence_length(tokens, params, request_id, self._context, self._max_seqs)
        self._queues.refuse_id_in_use(request_id, completion_ids(request_id, params.n))
        leader = self._new_leader(tokens, request_id, params, seed, max_len, is_beam=beam_search)
        self._reject_if_too_large(leader)
        self._queues.add(leader)
        return True

    def shrink_pool(self) -> None:
        """Halve the pool, at most once per call, if it is mostly unused. Called once in each step.

        A block is in use if it is neither free nor idle. An idle block is kept by the prefix cache for later
        requests while no sequence has it; `prefix.num_idle` counts them. The pool halves, rounded down, if
        less than a quarter of its blocks is in use and the half is at least `_min_pages`; otherwise nothing
        changes.

        To halve the pool, in this order:

        1. Evict idle blocks until those in use and idle fit into the half: `prefix.evict(n)` frees n idle
           blocks, with n = in use + idle - half. For n < 1 it does nothing.
        2. `compact` moves the blocks in use and the idle ones to the front.
        3. `resize(half)` of the allocator, and of the pool (None without a model), cuts off the end.

        Why a quarter? A full pool doubles, and is then half full. If it halved as soon as less than half was
        in use, one request that comes and goes would make it grow and shrink, with all the copies, every few
        steps.

        >>> manager = PagedBatchManager(max_pages=64, page_size=4, max_batch_size=4, min_pages=4)
        >>> manager.allocator.resize(20)
        >>> for _ in range(3):
        ...     manager.shrink_pool()
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

        Without a model do nothing and return None. Otherwise:

        1. Give the pool the allocator's number of blocks (`pool.resize`).
        2. Swap blocks with the host (`_swap`). This comes before the plan's copies, because a copy may
           overwrite a block that goes to the host, or read one that comes back.
        3. Make the plan's copies (`pool.copy_blocks(plan.copies)`).
        4. If the plan has no chunks (it may only swap), return None.
        5. Run the model on tokens [1, T] int32 and a context -> [1, R, vocab_size]. `plan.pack()` returns the
           T token ids of all chunks, chunk after chunk, and the R indices among them that need logits.
           `_layout.context` makes the context from the pool; (`sequence.tables`, start, stop) of each chunk;
           the model's `config.attention_scale`; the R indices as an int32 array, even if R is 0. (A
           `PagedContext` would be right only as long as every sequence has one table.)
        6. If R > 0, call `pool.start(logits)` and return the logits, without the batch axis. `start` begins
           to compute them and all writes to the pool, and does not wait; sampling waits for the logits.
        7. If R is 0, because every chunk leaves its prompt unfinished, call `pool.evaluate()`, which computes
           the writes now, and return None.

        Steps 6 and 7 are needed because MLX is lazy, and these writes must be computed before the next write
        to the pool.

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
        """Schedule and run one step; return the logits of every sequence that is ready for its next token.

        Call these five methods once each. Their order follows from what they do and need:

        - `_scheduler.computed(plan)`: makes the plan's full blocks shareable by content. They must have been
          computed: if the model raises, none of them may be shared. (Call it without a model too.)
        - `shrink_pool`: moves blocks, so it must come before the plan names any. It is called in every
          step, even if there is nothing to compute.
        - `plan.conclude(rows, self._fork)`: marks the chunks' tokens as computed, forks each leader whose
          prompt is complete, and returns the result, `StepLogits`, which assigns rows to sequences. The forks
          share the leader's pages, and `computed` may exchange these for others: call `computed` first.
        - `run_plan(plan)`: returns `rows`, an array or None.
        - `_schedule`: plans the step, takes its pages, and returns the plan. If `plan.is_empty`, there is
          nothing to do: return `StepLogits(None, {})` at once.

        Raises `OutOfBlocksError` if nothing runs and too few pages are free for the next request; that
        request is dropped. `_schedule` does this.

        >>> manager = PagedBatchManager(max_pages=8, page_size=4, max_batch_size=4, max_batched_tokens=4)
        >>> manager.add_request([5] * 6, "a", SamplingParams(n=2, max_tokens=4))
        True
        >>> [sorted(manager.process_batch()) for _ in range(2)]  # 4 tokens of the prompt, then 2
        [[], ['a/0', 'a/1']]
        >>> manager.sequence("a/1").num_computed, manager.capacity.num_free
        (6, 6)
        """
        self.shrink_pool()
        plan = self._schedule()
        if plan.is_empty:
            return StepLogits(None, {})
        rows = self.run_plan(plan)
        self._scheduler.computed(plan)
        return plan.conclude(rows, self._fork)

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id; KeyError for an unknown or ended sequence."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def settle_drafts(self, seconds: float) -> None:
        """After the step's tokens are committed: release the pages of drafted tokens that were rejected.

        seconds: how long the step took.
        """
        self._scheduler.settle_drafts(self.last_plan, seconds)

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> None:
        """Replace a search's beams by those of `steps`, best first: each forks the beam that it continues.

        All beams of the request must be running and computed. Beams that no step continues end.
        """
        for parent in self._queues.advance(request_id, steps):
            self._scheduler.release(parent)

    def finish(self, seq_id: str) -> None:
        """End one sequence, waiting or running, and free its pages; KeyError for an unknown or ended id."""
        self._scheduler.release(self._queues.end(seq_id))

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, in any state; unknown and ended ids are ignored."""
        for seq_id in self._queues.remove_pending_forks(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised, put all running sequences back into the queue.

        Committed tokens stay. If the pool's arrays cannot be evaluated any more, they are replaced, and all
        keys and values are dropped. Returns the ids of the requests that the step was to compute.
        """
        computing = self._scheduler.undo()
        settled = [pool.settle() for pool in (self.pool, self._swap_pool) if pool is not None]
        if not all(settled):
            self._scheduler.drop_computed()
        return computing

    def compact(self) -> int:
        """Move all held blocks to the front of the pool, between two steps; return how many are free."""
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
        """How many prompt tokens there were, and how many of them came from the prefix cache."""
        return self._scheduler.prefix_stats

    @property
    def drafting(self) -> DraftPolicy:
        """The policy that guesses tokens."""
        return self._scheduler.drafting

    @property
    def draft_stats(self) -> DraftStats:
        """How many tokens were drafted, and how many of them were accepted."""
        return self._scheduler.draft_stats

    @property
    def capacity(self) -> Capacity:
        """The pool's blocks and how many are free; blocks by which it can still grow count as free."""
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
        """Copy the blocks that a plan swaps out to the host, then copy back those that it swaps in."""
        if self._swap_pool is not None:
            self._swap_pool.fill_from(pool, plan.swapped_out)
            pool.fill_from(self._swap_pool, [(host, block) for block, host in plan.swapped_in.items()])

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        """Return a ready sequence and, if it is a leader, its new forks, which share its logits and pages.

        A beam is not forked here: `advance` does that.
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
        """Make a request's leader: empty tables, nothing computed, `num_forks` other completions."""
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

    def _reject_if_too_large(self, leader: PagedSequence) -> None:
        """Raise `RequestTooLargeError` for a request that cannot run even with the whole pool."""
        num_completions = 1 + leader.num_forks
        blocks = max(self._most_blocks(leader), self._scheduler.reserved_blocks(leader))
        if blocks > self.max_pages:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: up to {leader.max_len} tokens in "
                f"{counted(num_completions, 'completion')} need {blocks} blocks of {self.block_size}; "
                f"the pool has {self.max_pages}",
                "n"
                if num_completions > 1 and self._layout.max_blocks(leader.max_len) <= self.max_pages
                else None,
            )

    def _most_blocks(self, leader: PagedSequence) -> int:
        """Return how many blocks a request must have at once: beams run together, completions need not."""
        longest_one = self._layout.max_blocks(leader.max_len)
        per_fork = self._layout.blocks_of_fork(len(leader.prompt), leader.max_len)
        return longest_one + (leader.num_forks * per_fork if leader.is_beam else 0)
