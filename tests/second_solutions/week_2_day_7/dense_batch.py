"""Continuous batching: the passes are split into spans, admission counts anew for each sequence."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import mlx.core as mx

from .batch_manager import Capacity, PrefixStats, longest
from .chunked_prefill import plan_chunks
from .flash_attention import flash_attention
from .model import Model
from .naive_cache import NaiveKVCache
from .queues import QueueViews, RequestQueues
from .sampling_params import SamplingParams
from .sequence import Sequence, completion_ids
from .step import Plan, StepLogits

Slot = list[NaiveKVCache]  # one cache a layer


class DenseSpan(NamedTuple):
    """The positions start .. stop - 1 of one sequence, computed in one step, and the sequence's slot."""

    slot: Slot
    start: int
    stop: int


class DenseContext:
    """A forward pass over the packed tokens of one step, T in all: the tokens of span after span."""

    def __init__(self, spans: Seq[DenseSpan], scale: float, logit_rows: mx.array | None) -> None:
        positions = [position for span in spans for position in range(span.start, span.stop)]
        self.positions = mx.array(positions, mx.int32)
        self.logit_rows = logit_rows
        self._spans = spans
        self._scale = scale

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Queries, keys and values are split into spans first."""
        lengths = [stop - start for _, start, stop in self._spans]
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
        split = [mx.split(x, ends, axis=2) for x in (q, k, v)] if ends else [[q], [k], [v]]
        outputs = []
        for span, queries, keys, values in zip(self._spans, *split, strict=True):
            stored = span.slot[layer].update(keys[0], values[0])
            seen = [mx.expand_dims(x, 0).astype(queries.dtype) for x in stored]
            outputs.append(flash_attention(queries, seen[0], seen[1], self._scale, True))
        return mx.concatenate(outputs, axis=-2)


class DenseBatchManager(QueueViews[Sequence]):
    """Runs up to `max_slots` sequences at once, each in contiguous caches of `max_seq_len` tokens."""

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
        """The forks to come are counted afterwards."""
        params = SamplingParams() if params is None else params
        ids = completion_ids(request_id, params.n)
        max_len = longest(tokens, params, request_id, self.max_seq_len, self.max_slots)
        self._queues.refuse_id_in_use(request_id, ids)
        leader = Sequence(
            seq_id=ids[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=max_len,
        )
        leader.num_forks = len(ids) - 1
        self._queues.add(leader)
        return True

    def admit(self) -> None:
        """What is available is counted for each."""
        while self.waiting:
            available = len(self._free) - sum(leader.num_forks for leader in self.running)
            if self.waiting[0].num_forks >= available:
                return
            self._take_slot(self._queues.start_next())

    def compute(self, plan: Plan[Sequence]) -> mx.array | None:
        """With rows and without them are two cases."""
        if self._model is None:
            return None
        tokens, rows = plan.pack()
        spans = [DenseSpan(self._slot(chunk.sequence), chunk.start, chunk.stop) for chunk in plan.chunks]
        needed = mx.array(rows, mx.int32) if rows else None
        context = DenseContext(spans, self._model.config.attention_scale, needed)
        logits = self._model(mx.array([tokens]), context)
        for span in spans:
            mx.eval([cache.k_cache for cache in span.slot], [cache.v_cache for cache in span.slot])
        if not rows:
            return None
        mx.eval(logits)
        return logits[0]

    def process_batch(self) -> StepLogits:
        """An expression for both cases."""
        self.admit()
        plan = plan_chunks(self.running, self._max_tokens)
        return plan.conclude(self.compute(plan), self._fork) if plan.chunks else StepLogits(None, {})

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id. Its key is computed in the next step."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def finish(self, seq_id: str) -> None:
        """A missing slot is None."""
        slot = self._slot_of.pop(self._queues.end(seq_id).seq_id, None)
        if slot is not None:
            self._free.append(slot)

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, waiting or running; unknown and ended ids are ignored."""
        for seq_id in self._queues.forget_forks_to_come(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised: all running sequences wait again, without slots; their requests."""
        stopped = list(self.running)
        for sequence in stopped:
            self._queues.put_back(sequence)
            sequence.num_computed = 0
        self._slot_of, self._free = {}, list(range(self.max_slots))
        return list(dict.fromkeys(sequence.request_id for sequence in stopped))

    @property
    def capacity(self) -> Capacity:
        """The slots as blocks: how many, of how many tokens, how many of them are free."""
        nbytes = sum(cache.allocated_bytes() for slot in self._slots for cache in slot)
        return Capacity(self.max_slots, self.max_seq_len, len(self._free), nbytes)

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """The leader and, once its prompt is computed, its other completions, each with a slot and a copy."""
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
        """The caches of a running sequence, one for each layer."""
        return self._slots[self._slot_of[sequence.seq_id]]


def _make_slot(model: Model | None, max_seq_len: int, dtype: mx.Dtype) -> Slot:
    """A cache for every layer of a model, its memory allocated."""
    if model is None:
        return []
    config = model.config
    caches = [
        NaiveKVCache(max_seq_len, config.num_key_value_heads, config.head_dim, dtype)
        for _ in range(config.num_hidden_layers)
    ]
    mx.eval([(cache.k_cache, cache.v_cache) for cache in caches])
    return caches
