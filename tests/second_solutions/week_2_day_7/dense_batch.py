"""Continuous batching over contiguous caches: a request joins or leaves between any two steps.

Each running sequence has a slot: one cache per layer, long enough for the longest sequence. The tokens of all
sequences in a step are packed into one row, [1, T], so each matrix is read once for all of them. Each
sequence attends to its own caches. Source: Yu et al., "Orca" (OSDI 2022).
"""

import mlx.core as mx

from .batch_manager import max_sequence_length
from .chunked_prefill import plan_chunks
from .flash_attention import flash_attention
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import Plan, StepLogits


class DenseContext:
    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        outputs = []
        first = 0
        for span in self._spans:
            last = first + span.stop - span.start
            keys, values = span.slot[layer].update(k[0, :, first:last], v[0, :, first:last])
            outputs.append(
                flash_attention(
                    q[:, :, first:last],
                    keys[None].astype(q.dtype),
                    values[None].astype(q.dtype),
                    self._scale,
                    causal=True,
                )
            )
            first = last
        return mx.concatenate(outputs, axis=2)


class DenseBatchManager:
    def add_request(
        self, tokens: list[int], request_id: str, params: SamplingParams | None = None, seed: int = 0
    ) -> bool:
        params = params or SamplingParams()
        seq_ids = completion_ids(request_id, params.n)
        self._queues.refuse_id_in_use(request_id, seq_ids)
        max_len = max_sequence_length(tokens, params, request_id, self.max_seq_len, self.max_slots)
        leader = Sequence(
            seq_id=seq_ids[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=max_len,
            num_forks=params.n - 1,
        )
        self._queues.add(leader)
        return True

    def admit(self) -> None:
        while self.waiting:
            promised = sum(sequence.num_forks for sequence in self.running)
            if len(self._free) - promised < 1 + self.waiting[0].num_forks:
                return
            self._take_slot(self._queues.start_next())

    def compute(self, plan: Plan[Sequence]) -> mx.array | None:
        if self._model is None:
            return None
        token_ids, rows = plan.pack()
        slots = [self._slot(chunk.sequence) for chunk in plan.chunks]
        spans = [
            DenseSpan(slot, chunk.start, chunk.stop) for slot, chunk in zip(slots, plan.chunks, strict=True)
        ]
        logit_rows = mx.array(rows, mx.int32) if rows else None
        context = DenseContext(spans, self._model.config.attention_scale, logit_rows)
        logits = self._model(mx.array([token_ids], mx.int32), context)[0]  # [R, V]
        caches = [(cache.k_cache, cache.v_cache) for slot in slots for cache in slot]
        if not rows:
            mx.eval(caches)
            return None
        mx.eval(caches, logits)
        return logits

    def process_batch(self) -> StepLogits:
        self.admit()
        plan = plan_chunks(self.running, self._max_tokens)
        if not plan.chunks:
            return StepLogits(None, {})
        return plan.conclude(self.compute(plan), self._fork)

    def finish(self, seq_id: str) -> None:
        sequence = self._queues.end(seq_id)
        slot = self._slot_of.pop(sequence.seq_id, None)
        if slot is not None:
            self._free.append(slot)
