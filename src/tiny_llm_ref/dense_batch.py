"""Continuous batching over contiguous caches: a request joins or leaves between any two steps.

Each running sequence has a slot: one cache per layer, long enough for the longest sequence. The tokens of all
sequences in a step are packed into one row, [1, T], so each matrix is read once for all of them. Each
sequence attends to its own caches. Source: Yu et al., "Orca" (OSDI 2022).
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import mlx.core as mx

from .batch_manager import Capacity, DraftStats, PrefixStats, max_sequence_length
from .chunked_prefill import plan_chunks
from .flash_attention import flash_attention
from .model import Model
from .naive_cache import NaiveKVCache
from .queues import QueueViews, RequestQueues
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import Plan, StepLogits

Slot = list[NaiveKVCache]  # one cache for each layer


class DenseSpan(NamedTuple):
    """The positions start .. stop - 1 of a sequence, which one step computes, and the sequence's slot."""

    slot: Slot
    start: int
    stop: int


class DenseContext:
    """The context of a forward pass over the T packed tokens of one step, span after span.

    positions: [T], each token's position in its own sequence. logit_rows: as in `KVContext`. scale: the
    factor of the attention scores.
    """

    def __init__(self, spans: Seq[DenseSpan], scale: float, logit_rows: mx.array | None) -> None:
        positions = [position for span in spans for position in range(span.start, span.stop)]
        self.positions = mx.array(positions, mx.int32)
        self.logit_rows = logit_rows
        self._spans = spans
        self._scale = scale

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store and attend span by span: q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D], packed.

        The T packed rows are those of the spans in `_spans`, one span after the other. A span has
        stop - start rows.

        1. Store the span's keys and values in its cache: `slot[layer].update(k, v)` takes both as
           [Hkv, n, D], without the batch axis, and returns all stored keys and values, [Hkv, S, D] each, in
           the cache's type.
        2. Let the span's queries attend to these with `flash_attention`, causally and with `_scale`: the
           queries belong to the last of the S positions. Convert keys and values to q's type first; the
           result has q's type.

        >>> slot = [NaiveKVCache(8, num_heads=1, head_dim=2, dtype=mx.float32)]
        >>> context, tokens = DenseContext([DenseSpan(slot, 0, 2)], 1.0, None), mx.ones((1, 1, 2, 2))
        >>> context.attend(0, tokens, tokens, mx.array([[[[2.0, 0.0], [4.0, 0.0]]]])).tolist()
        [[[[2.0, 0.0], [3.0, 0.0]]]]
        """
        outputs, packed = [], 0
        for slot, start, stop in self._spans:
            rows = slice(packed, packed + stop - start)
            stored = slot[layer].update(k[0, :, rows], v[0, :, rows])
            keys, values = (x[None].astype(q.dtype) for x in stored)  # [1, Hkv, S, D]
            outputs.append(flash_attention(q[:, :, rows], keys, values, self._scale, causal=True))
            packed += stop - start
        return mx.concatenate(outputs, axis=2)


class DenseBatchManager(QueueViews[Sequence]):
    """Runs up to `max_slots` sequences at once, each in contiguous caches of `max_seq_len` tokens.

    model: if None, steps are scheduled, but nothing is computed. max_batched_tokens: the maximum number of
    tokens in one step.

    `_queues` has all sequences that have not ended, waiting and running (`RequestQueues`). `_free` lists the
    numbers of the free slots; `_slot_of` maps each running sequence's id to the number of its slot.

    Invariant: every slot is free or belongs to exactly one running sequence. No sequence is ever preempted
    (stopped before its end to free its memory for others), because a slot has memory for the longest
    sequence.
    """

    num_preemptions = 0
    num_swapped = 0
    prefix_stats = PrefixStats()
    draft_stats = DraftStats()

    def __init__(
        self,
        max_slots: int,
        max_seq_len: int,
        *,
        model: Model | None = None,
        max_batched_tokens: int = 512,
        kv_dtype: mx.Dtype = mx.float16,
    ) -> None:
        self.max_slots = max_slots
        self.max_seq_len = max_seq_len
        self._model = model
        self._max_tokens = max_batched_tokens
        self._queues = RequestQueues[Sequence]()
        self._slots = [_make_slot(model, max_seq_len, kv_dtype) for _ in range(max_slots)]
        self._free = list(range(max_slots))
        self._slot_of: dict[str, int] = {}

    def add_request(
        self, tokens: list[int], request_id: str, params: SamplingParams | None = None, seed: int = 0
    ) -> bool:
        """Queue a request's prompt; return True. `admit` starts it when enough slots are free.

        A request for n completions (`params.n`; params None means `SamplingParams()`) is queued as one
        `Sequence`, its leader. Its seq_id is the first of `completion_ids`, num_forks is n - 1, prompt is a
        tuple, and max_len is the result of `max_sequence_length` for a context of `max_seq_len` tokens and
        `max_slots` sequences at once. The other completions are forked when the prompt is computed: each
        becomes a sequence with a copy of the leader's caches. Until then the queues find the leader under all
        n ids; `RequestQueues.add` does this.

        Raises ValueError for an empty prompt and `RequestTooLargeError` for a request that can never run
        (`max_sequence_length` raises both), `DuplicateRequestError` for an id in use
        (`RequestQueues.refuse_id_in_use`). After an error nothing is queued.

        >>> manager = DenseBatchManager(max_slots=2, max_seq_len=32)
        >>> manager.add_request([5, 6, 7], "a", SamplingParams(n=2))
        True
        >>> [sequence.seq_id for sequence in manager.waiting], manager.sequence("a/1").num_forks
        (['a/0'], 1)
        """
        params = params or SamplingParams()
        max_len = max_sequence_length(tokens, params, request_id, self.max_seq_len, self.max_slots)
        seq_ids = completion_ids(request_id, params.n)
        self._queues.refuse_id_in_use(request_id, seq_ids)
        self._queues.add(
            Sequence(
                seq_id=seq_ids[0],
                request_id=request_id,
                prompt=tuple(tokens),
                params=params,
                seed=seed,
                max_len=max_len,
                num_forks=params.n - 1,
            )
        )
        return True

    def admit(self) -> None:
        """Start waiting sequences in order, while slots are free for all completions of the next one.

        A leader takes one slot when it starts. Its `num_forks` other completions take theirs when they are
        forked; after the fork its `num_forks` is 0. Until then as many free slots are reserved for them, and
        no other sequence may take these. If the first waiting sequence does not fit, start none of those
        after it: otherwise small requests could keep a request for many completions waiting forever.

        `RequestQueues.start_next` moves the first waiting sequence to the running ones and returns it;
        `_take_slot` gives it an empty slot.

        >>> manager = DenseBatchManager(max_slots=3, max_seq_len=32)
        >>> queued = [manager.add_request([1], name, SamplingParams(n=2)) for name in ("a", "b")]
        >>> manager.admit()  # "a/0" has a slot, and one is reserved for "a/1"
        >>> [sequence.seq_id for sequence in manager.running], manager.capacity.num_free
        (['a/0'], 2)
        """
        reserved = sum(sequence.num_forks for sequence in self.running)
        while self.waiting and 1 + self.waiting[0].num_forks <= len(self._free) - reserved:
            sequence = self._queues.start_next()
            reserved += sequence.num_forks
            self._take_slot(sequence)

    def compute(self, plan: Plan[Sequence]) -> mx.array | None:
        """Compute the chunks of a plan in one packed forward pass -> logits [R, vocab_size]; None if R is 0.

        Without a model (`_model` is None) compute nothing and return None. Otherwise:

        1. `plan.pack()` returns the T token ids of all chunks, chunk after chunk, and the R indices among
           them that need logits.
        2. Make a `DenseContext`: a span for each chunk, with its sequence's slot (`_slot`); the model
           config's `attention_scale`; the R indices as an int32 array, or None if R is 0.
        3. The model takes the tokens as [1, T] int32 and the context, and returns [1, R, vocab_size].
        4. Evaluate (`mx.eval`) the `k_cache` and `v_cache` of all caches in these slots, and the logits if
           R > 0. MLX is lazy: without this, the work of all prompts would pile up in one growing graph.
           With R = 0 do not evaluate the model's result, so that no logits are computed.
        5. Return the logits without the batch axis, or None if R is 0.

        >>> manager = DenseBatchManager(max_slots=2, max_seq_len=32, model=None)
        >>> manager.add_request([5, 6, 7], "a")
        True
        >>> manager.admit()
        >>> manager.compute(plan_chunks(manager.running, budget=8)) is None  # no model
        True
        """
        if self._model is None:
            return None
        tokens, logit_rows = plan.pack()
        rows = mx.array(logit_rows, mx.int32) if logit_rows else None
        spans = [DenseSpan(self._slot(sequence), start, stop) for sequence, start, stop, _ in plan.chunks]
        context = DenseContext(spans, self._model.config.attention_scale, rows)
        logits = self._model(mx.array([tokens], mx.int32), context)[0]
        stored = [(cache.k_cache, cache.v_cache) for span in spans for cache in span.slot]
        mx.eval(stored, *([logits] if logit_rows else []))
        return logits if logit_rows else None

    def process_batch(self) -> StepLogits:
        """Run one step; return the logits of each sequence that is ready for its next token.

        1. `admit` waiting sequences.
        2. `plan_chunks` plans the step for all running sequences, with `_max_tokens` as its budget. If the
           plan has no chunks, the result is `StepLogits(None, {})`.
        3. `compute` the plan.
        4. `plan.conclude(logits, self._fork)` records in each sequence that its chunk is computed, and
           returns the result. It calls `_fork` with each sequence that is ready for its next token. This call
           forks a leader whose prompt is complete.

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

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id; the next step computes its key and value."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def settle_drafts(self, seconds: float) -> None:
        """Nothing to free: without pages there is no speculation."""

    def finish(self, seq_id: str) -> None:
        """End one sequence, waiting or running, and free its slot if it has one.

        `RequestQueues.end` removes the sequence from the queues and returns it; it raises KeyError for an id
        that is unknown or has ended. If the `seq_id` of the returned sequence is in `_slot_of`, it has a
        slot: remove it there, and add the slot's number to `_free`. That `seq_id` may differ from the
        argument, because the id of a completion that is not forked yet stands for its leader. Do not reset
        the caches: `_take_slot` does that.

        >>> manager = DenseBatchManager(max_slots=1, max_seq_len=32)
        >>> queued = [manager.add_request([1], name) for name in ("a", "b")]
        >>> manager.admit()
        >>> manager.finish("b")  # waits, so it has no slot
        >>> manager.capacity.num_free, manager.finish("a"), manager.capacity.num_free
        (0, None, 1)
        """
        sequence = self._queues.end(seq_id)
        if sequence.seq_id in self._slot_of:
            self._free.append(self._slot_of.pop(sequence.seq_id))

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, waiting or running; unknown and ended ids are ignored."""
        for seq_id in self._queues.remove_pending_forks(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised, put all running sequences back into the queue, without slots.

        Returns the ids of their requests.
        """
        stopped = list(self.running)
        for sequence in stopped:
            self._queues.return_to_waiting(sequence)
            sequence.num_computed = 0
        self._slot_of, self._free = {}, list(range(self.max_slots))
        return list(dict.fromkeys(sequence.request_id for sequence in stopped))

    @property
    def capacity(self) -> Capacity:
        """The slots, counted as blocks: their number, their size in tokens, the free ones, their bytes."""
        nbytes = sum(cache.allocated_bytes() for slot in self._slots for cache in slot)
        return Capacity(self.max_slots, self.max_seq_len, len(self._free), nbytes)

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """Return a ready sequence; if it is a leader, also its new forks, which get copies of its caches."""
        sequences = self._queues.fork(leader)
        for fork in sequences[1:]:
            self._take_slot(fork)
            for own, cache in zip(self._slot(fork), self._slot(leader), strict=True):
                own.copy_from(cache)
        return sequences

    def _take_slot(self, sequence: Sequence) -> None:
        """Give a sequence a free slot, its caches empty."""
        self._slot_of[sequence.seq_id] = self._free.pop()
        for cache in self._slot(sequence):
            cache.reset()

    def _slot(self, sequence: Sequence) -> Slot:
        """Return the caches of a running sequence, one for each layer."""
        return self._slots[self._slot_of[sequence.seq_id]]


def _make_slot(model: Model | None, max_seq_len: int, dtype: mx.Dtype) -> Slot:
    """Make a cache for every layer of a model, with its memory allocated."""
    if model is None:
        return []
    config = model.config
    caches = [
        NaiveKVCache(max_seq_len, config.num_key_value_heads, config.head_dim, dtype)
        for _ in range(config.num_hidden_layers)
    ]
    mx.eval([(cache.k_cache, cache.v_cache) for cache in caches])
    return caches
