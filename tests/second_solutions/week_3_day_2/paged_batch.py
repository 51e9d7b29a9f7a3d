# A second solution, written only from the docstrings and the first hints.
"""Continuous batching over pages: takes requests and sampled tokens, returns logits.

A step: `process_batch` schedules and runs the model, the caller samples, `commit` appends the tokens. Owns
the queues, the allocator, the pool and every table. Knows nothing of sampling, of text, or of why a sequence
ends.
"""

import mlx.core as mx

from .batch_manager import max_sequence_length
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
        params = SamplingParams() if params is None else params
        max_len = max_sequence_length(tokens, params, request_id, self._context, self._max_seqs)
        self._queues.refuse_id_in_use(request_id, completion_ids(request_id, params.n))
        leader = self._new_leader(tokens, request_id, params, seed, max_len, is_beam=beam_search)
        self._reject_if_too_large(leader)
        self._queues.add(leader)
        return True

    def shrink_pool(self) -> None:
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
        self.shrink_pool()
        plan = self._schedule()
        result = StepLogits(None, {})
        if not plan.is_empty:
            rows = self.run_plan(plan)
            self._scheduler.computed(plan)
            result = plan.conclude(rows, self._fork)
        return result
