"""Continuous batching over contiguous caches: a request joins or leaves between any two steps.

Each running sequence has a slot: a cache for the longest sequence in every layer. The tokens of all sequences
in a step are packed: side by side in one row through every matrix. Each sequence attends to its own caches.
Source: Yu et al., "Orca" (OSDI 2022).
"""

import mlx.core as mx

from .batch_manager import longest
from .chunked_prefill import plan_chunks
from .flash_attention import flash_attention
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import Plan, StepLogits


class DenseContext:
    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store and attend span by span: q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D], packed.

        The spans of `_spans` follow each other in the packed rows, stop - start rows each. First a span's
        keys and values are stored in `slot[layer]`, its cache. Then its queries attend, causally and scaled
        with `_scale`, to all that this cache holds, rounded to the cache's type: `flash_attention` takes
        queries as the last ones of its keys. Give it keys and values in q's type; the result has q's type.

        >>> slot = [NaiveKVCache(8, num_heads=1, head_dim=2, dtype=mx.float32)]
        >>> context, tokens = DenseContext([DenseSpan(slot, 0, 2)], 1.0, None), mx.ones((1, 1, 2, 2))
        >>> context.attend(0, tokens, tokens, mx.array([[[[2.0, 0.0], [4.0, 0.0]]]])).tolist()
        [[[[2.0, 0.0], [3.0, 0.0]]]]
        """
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
        """Queue a request's prompt; return True. `admit` starts it when there are slots.

        A request for n completions (`params.n`; params None: `SamplingParams()`) is queued as one `Sequence`,
        its leader: seq_id is the first of `completion_ids`, num_forks is n - 1, prompt is a tuple, max_len is
        what `longest` says for a context of `max_seq_len` tokens and `max_slots` sequences at once. The other
        completions are forked when the prompt is computed; until then the queues know the leader under all
        ids (`RequestQueues.add` sees to it).

        Raises ValueError for an empty prompt and `RequestTooLargeError` for a request that could never run
        (`longest` raises both), `DuplicateRequestError` for an id in use (`RequestQueues.refuse_id_in_use`).
        After an error nothing is queued.

        >>> manager = DenseBatchManager(max_slots=2, max_seq_len=32)
        >>> manager.add_request([5, 6, 7], "a", SamplingParams(n=2))
        True
        >>> [sequence.seq_id for sequence in manager.waiting], manager.sequence("a/1").num_forks
        (['a/0'], 1)
        """
        params = params or SamplingParams()
        seq_ids = completion_ids(request_id, params.n)
        self._queues.refuse_id_in_use(request_id, seq_ids)
        max_len = longest(tokens, params, request_id, self.max_seq_len, self.max_slots)
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
        """Start waiting sequences, the first one first, while there are slots for all their completions.

        A leader takes one slot when it starts; its `num_forks` other completions take theirs when they are
        forked. Until then as many free slots are promised to it, and no other sequence may start in them. If
        the first waiting sequence does not fit, no later one overtakes it: a request for many completions
        would wait for ever behind small ones.

        `RequestQueues.start_next` moves the first waiting sequence to the running ones and returns it;
        `_take_slot` gives it an empty slot.

        >>> manager = DenseBatchManager(max_slots=3, max_seq_len=32)
        >>> queued = [manager.add_request([1], name, SamplingParams(n=2)) for name in ("a", "b")]
        >>> manager.admit()  # "a/0" has a slot, and one is promised to "a/1"
        >>> [sequence.seq_id for sequence in manager.running], manager.capacity.num_free
        (['a/0'], 2)
        """
        while self.waiting:
            promised = sum(sequence.num_forks for sequence in self.running)
            if len(self._free) - promised < 1 + self.waiting[0].num_forks:
                return
            self._take_slot(self._queues.start_next())

    def compute(self, plan: Plan[Sequence]) -> mx.array | None:
        """Compute the chunks of a plan in one packed forward pass -> logits [R, V]; None if R is 0.

        `Plan.pack` returns the token ids of all chunks side by side, T of them, and the R indices among them
        that need logits. The model (`_model`) takes the tokens as [1, T] and a `DenseContext` with a span for
        each chunk in its sequence's slot (`_slot`), the config's `attention_scale`, and the R indices as an
        int32 array, None for R = 0. Without a model nothing is computed, and the result is None.

        Before it returns, one `mx.eval` computes the `k_cache` and `v_cache` of all these slots, and the
        logits if R > 0. MLX computes nothing until it must: without it, prompts would pile up as one growing
        graph. With R = 0 the model's result is not evaluated, so no logits are ever computed.

        >>> manager = DenseBatchManager(max_slots=2, max_seq_len=32, model=None)
        >>> manager.add_request([5, 6, 7], "a")
        True
        >>> manager.admit()
        >>> manager.compute(plan_chunks(manager.running, budget=8)) is None  # no model
        True
        """
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
        """Run one step: admit, plan, compute; return the logits of each sequence that needs its next token.

        `plan_chunks` shares `_max_tokens` among all that run after admission. A plan without chunks is not
        computed: the result is `StepLogits(None, {})`. `Plan.conclude` takes the logits of `compute`, records
        in each sequence what is computed, and returns the result; it calls its argument `fork` (here `_fork`)
        with each sequence that is ready, because a leader is forked when its prompt is complete.

        >>> manager = DenseBatchManager(max_slots=2, max_seq_len=32, max_batched_tokens=4)
        >>> manager.add_request([1] * 6, "a")
        True
        >>> [list(manager.process_batch()) for _ in range(2)]  # 4 tokens of the prompt, then 2
        [[], ['a']]
        """
        self.admit()
        plan = plan_chunks(self.running, self._max_tokens)
        if not plan.chunks:
            return StepLogits(None, {})
        return plan.conclude(self.compute(plan), self._fork)

    def finish(self, seq_id: str) -> None:
        """End one sequence, waiting or running; its slot, if it has one, is free for another.

        `RequestQueues.end` takes the sequence out of the queues. It raises KeyError for an unknown id, also
        one that has ended. `_slot_of` has the slot under the `seq_id` of the sequence that `end` returns, if
        it runs. Forget it there, and add it to `_free`, once. `_take_slot` resets the caches, not `finish`.

        >>> manager = DenseBatchManager(max_slots=1, max_seq_len=32)
        >>> queued = [manager.add_request([1], name) for name in ("a", "b")]
        >>> manager.admit()
        >>> manager.finish("b")  # waits, so it has no slot
        >>> manager.capacity.num_free, manager.finish("a"), manager.capacity.num_free
        (0, None, 1)
        """
        sequence = self._queues.end(seq_id)
        slot = self._slot_of.pop(sequence.seq_id, None)
        if slot is not None:
            self._free.append(slot)
