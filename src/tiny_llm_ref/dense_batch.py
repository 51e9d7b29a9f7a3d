"""Continuous batching over contiguous caches: a request joins or leaves between any two steps.

Each running sequence has a slot: room for the longest sequence in every layer, taken whole. The tokens of all
sequences stand side by side in one row through every matrix, and each sequence attends to its own cache.
Source: Yu et al., "Orca" (OSDI 2022).
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import mlx.core as mx

from .batch_manager import Capacity, PrefixStats, longest, wanted
from .chunked_prefill import share_budget
from .flash_attention import flash_attention
from .model import Model
from .naive_cache import NaiveKVCache
from .queues import QueueViews, RequestQueues
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import Plan, Scheduled, StepLogits

Slot = list[NaiveKVCache]  # one cache a layer


class DenseSpan(NamedTuple):
    """The positions start .. stop - 1 of one sequence, computed together in one step, and its slot."""

    slot: Slot
    start: int
    stop: int


class DenseContext:
    """A forward pass over the packed tokens of one step, [1, T]; each span attends to its own slot."""

    def __init__(self, spans: Seq[DenseSpan], scale: float, logit_rows: mx.array | None) -> None:
        positions = [position for span in spans for position in range(span.start, span.stop)]
        self.positions = mx.array(positions, mx.int32)
        self.logit_rows = logit_rows
        self._spans = spans
        self._scale = scale

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D]: span after span, in packed order.

        A span's keys and values are stored in its slot first; its queries then see all that the slot's cache
        holds, as it is stored, up to their own position.
        """
        outputs, packed = [], 0
        for slot, start, stop in self._spans:
            rows = slice(packed, packed + stop - start)
            stored = slot[layer].update(k[0, :, rows].swapaxes(0, 1), v[0, :, rows].swapaxes(0, 1))
            keys, values = (x.swapaxes(0, 1)[None].astype(q.dtype) for x in stored)  # [1, Hkv, S, D]
            outputs.append(flash_attention(q[:, :, rows], keys, values, self._scale, causal=True))
            packed += stop - start
        return mx.concatenate(outputs, axis=2)


class DenseBatchManager(QueueViews[Sequence]):
    """Runs up to `max_slots` sequences at once, each in a contiguous cache of `max_seq_len` tokens.

    model: None schedules without computing anything. max_batched_tokens: tokens in one step.

    Invariant: every slot is free or belongs to exactly one running sequence. Nobody is ever preempted: a slot
    has room for the whole life of a sequence.
    """

    num_preemptions = 0
    num_swapped = 0
    prefix_stats = PrefixStats()

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
        """Queue a prompt; when it is its turn it gets a slot for each completion. True: it is queued.

        The request's leader joins the queues (`RequestQueues`), which know it under all `completion_ids`; its
        forks come when its prompt is computed. `longest` says how many tokens it may have.

        Raises ValueError for an empty prompt, `RequestTooLargeError` for a request that could never run, and
        `DuplicateRequestError` for an id in use; none of them changes anything.
        """
        params = params or SamplingParams()
        max_len = longest(tokens, params, request_id, self.max_seq_len, self.max_slots)
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

    def process_batch(self) -> StepLogits:
        """Schedule and run one step; the logits of every sequence that is ready for its next token.

        First whoever has waited longest starts, while there are free slots for all of its completions; slots
        that running leaders still need for theirs are not free, and nobody overtakes the head of the queue.
        Then the token budget is shared among all who run (`share_budget` of what each is `wanted` to
        compute), each gets a chunk of the plan, and the chunks run together. `Plan.conclude` hands out the
        rows, forking leaders whose prompt is complete. Where nothing is granted: `StepLogits(None, {})`.
        """
        self._admit()
        plan = self._schedule()
        if not plan.chunks:
            return StepLogits(None, {})
        return plan.conclude(self._run(plan), self._fork)

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def finish(self, seq_id: str) -> None:
        """End one sequence: its slot is free. KeyError for one that has ended."""
        sequence = self._queues.end(seq_id)
        if sequence.seq_id in self._slot_of:
            self._free.append(self._slot_of.pop(sequence.seq_id))

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""
        for seq_id in self._queues.forget_forks_to_come(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised: all who ran wait again, without their slots; their requests."""
        stopped = list(self.running)
        for sequence in stopped:
            self._queues.put_back(sequence)
            sequence.num_computed = 0
        self._slot_of, self._free = {}, list(range(self.max_slots))
        return list(dict.fromkeys(sequence.request_id for sequence in stopped))

    @property
    def capacity(self) -> Capacity:
        """How many slots are free."""
        nbytes = sum(cache.allocated_bytes() for slot in self._slots for cache in slot)
        return Capacity(self.max_slots, self.max_seq_len, len(self._free), nbytes)

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while there are slots for all of their completions."""
        promised = sum(sequence.num_forks for sequence in self.running)
        while self.waiting and 1 + self.waiting[0].num_forks <= len(self._free) - promised:
            sequence = self._queues.start_next()
            promised += sequence.num_forks
            self._take_slot(sequence)

    def _schedule(self) -> Plan[Sequence]:
        """What each running sequence computes in this step."""
        plan: Plan[Sequence] = Plan([])
        granted = share_budget([wanted(sequence) for sequence in self.running], self._max_tokens)
        for sequence, count in zip(self.running, granted, strict=True):
            if count:
                start = sequence.num_computed
                plan.chunks.append(Scheduled(sequence, start, start + count))
        return plan

    def _run(self, plan: Plan[Sequence]) -> mx.array | None:
        """Compute the chunks of a plan in one packed forward pass -> logits [R, V]; None for R = 0."""
        if self._model is None:
            return None
        tokens, logit_rows = plan.pack()
        spans = [DenseSpan(self._slot(sequence), start, stop) for sequence, start, stop, _ in plan.chunks]
        context = DenseContext(
            spans, self._model.config.attention_scale, mx.array(logit_rows, mx.int32) if logit_rows else None
        )
        logits = self._model(mx.array([tokens], mx.int32), context)[0]
        stored = [(cache.k_cache, cache.v_cache) for span in spans for cache in span.slot]
        mx.eval(stored, *([logits] if logit_rows else []))
        return logits if logit_rows else None

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """The leader and, once its prompt is computed, its other completions; each copies its cache."""
        sequences = self._queues.fork(leader)
        for fork in sequences[1:]:
            self._take_slot(fork)
            for own, cache in zip(self._slot(fork), self._slot(leader), strict=True):
                own.update(cache.k_cache[: cache.current_len], cache.v_cache[: cache.current_len])
        return sequences

    def _take_slot(self, sequence: Sequence) -> None:
        self._slot_of[sequence.seq_id] = self._free.pop()
        for cache in self._slot(sequence):
            cache.reset()

    def _slot(self, sequence: Sequence) -> Slot:
        return self._slots[self._slot_of[sequence.seq_id]]


def _make_slot(model: Model | None, max_seq_len: int, dtype: mx.Dtype) -> Slot:
    """A cache for every layer of a model, its memory taken."""
    if model is None:
        return []
    config = model.config
    caches = [
        NaiveKVCache(max_seq_len, config.num_key_value_heads, config.head_dim, dtype)
        for _ in range(config.num_hidden_layers)
    ]
    mx.eval([(cache.k_cache, cache.v_cache) for cache in caches])
    return caches
