# A second solution, written from the docstrings and the first hints.
"""Continuous batching over pages: requests in, logits out, tokens back.

A step is: `process_batch` schedules and runs, the caller samples, `commit` takes the tokens. Owns the queues,
the allocator, the pool and every table; knows nothing of sampling, of text, or of why a sequence ends.
"""

import mlx.core as mx

from .batch_manager import longest
from .sampling_params import SamplingParams
from .sequence import PagedSequence, completion_ids
from .step import Plan, StepLogits


class PagedBatchManager:
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
        another request. `_queues.add` changes something; these only look:
        - `longest`: ValueError for an empty prompt, `RequestTooLargeError` for a request that is longer than
          `_context` tokens or has more completions than `_max_seqs`. Its result is the leader's `max_len`.
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
        params = SamplingParams() if params is None else params
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
        frees n idle blocks: n is what is held, in use or idle, beyond the half (for n < 1 it does nothing).
        `compact` moves what is held to the front, and `resize` of the allocator and of the pool (None without
        a model) cuts the end off.

        >>> manager = PagedBatchManager(max_pages=64, page_size=4, max_batch_size=4, min_pages=4)
        >>> manager.allocator.resize(20)
        >>> sizes = [(manager.give_memory_back(), manager.allocator.num_blocks)[1] for _ in range(4)]
        >>> sizes
        [10, 5, 5, 5]
        """
        num_blocks = self.allocator.num_blocks
        held = num_blocks - self.allocator.num_free
        in_use = held - self.prefix.num_idle
        half = num_blocks // 2
        if 4 * in_use >= num_blocks or half < self._min_pages:
            return
        self.prefix.evict(held - half)
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
        next write to the pool. With R > 0 `pool.start` begins with the logits and all writes, and the caller
        goes on meanwhile. With R = 0, where all chunks are beginnings of prompts, only the writes matter:
        `pool.evaluate`.

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
        tokens, rows = plan.pack()
        spans = [(chunk.sequence.tables, chunk.start, chunk.stop) for chunk in plan.chunks]
        scale = self._model.config.attention_scale
        context = self._layout.context(self.pool, spans, scale, mx.array(rows, mx.int32))
        logits = self._model(mx.array([tokens], mx.int32), context)[0]
        if not rows:
            self.pool.evaluate()
            return None
        self.pool.start(logits)
        return logits

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; returns the logits of every sequence that is ready for its next token.

        It has five parts, each called once. What they need from one another tells their order:
        - `_scheduler.computed(plan)`: from now on other sequences may share the plan's blocks by content, so
          they must have been computed (without a model there is nothing to compute, and the rest happens all
          the same).
        - `give_memory_back`: moves blocks, so no plan may have named any yet.
        - `plan.conclude(rows, self._fork)`: counts the chunks' tokens as computed, makes the completions of a
          leader whose prompt is complete, which share its pages as `computed` left them, and says which row
          of `rows` (or None) is whose: its `StepLogits` is the result.
        - `run_plan`: the rows.
        - `_schedule`: plans the step and takes its pages. A plan that `is_empty` has nothing to do: the step
          is over, with `StepLogits(None, {})`.

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
        result = StepLogits(None, {})
        if not plan.is_empty:
            rows = self.run_plan(plan)
            self._scheduler.computed(plan)
            result = plan.conclude(rows, self._fork)
        return result
