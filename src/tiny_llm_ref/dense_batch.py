"""Continuous batching over contiguous caches: a request joins or leaves between any two steps.

Each running sequence has a slot: a cache for the longest sequence in every layer. The tokens of all sequences
in a step are packed: side by side in one row through every matrix. Each sequence attends to its own caches.
Source: Yu et al., "Orca" (OSDI 2022).
"""

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
    """A forward pass over the packed tokens of one step, T in all: the tokens of span after span.

    positions [T]: of each token in its own sequence. logit_rows: as in `KVContext`. scale: of the scores.
    """

    def __init__(self, spans: Seq[DenseSpan], scale: float, logit_rows: mx.array | None) -> None:
        positions = [position for span in spans for position in range(span.start, span.stop)]
        self.positions = mx.array(positions, mx.int32)
        self.logit_rows = logit_rows
        self._spans = spans
        self._scale = scale

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store and attend span by span: q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D], packed.

        The spans of `_spans` follow each other in the packed rows, stop - start rows each. First a span's
        keys and values are stored in its cache: `slot[layer].update(k, v)` takes both as [Hkv, n, D], without
        the batch axis, and returns all that the cache holds, [Hkv, S, D] each, in the cache's type. Then its
        queries attend to these, causally and scaled with `_scale`: `flash_attention` takes queries as the
        last ones of its keys. Give it keys and values in q's type; the result has q's type.

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

    model: None schedules without computing anything. max_batched_tokens: the most tokens in one step.

    `_queues` has all sequences that have not ended, waiting and running (`RequestQueues`). `_free` lists the
    numbers of the free slots; `_slot_of` maps each running sequence's id to the number of its slot.

    Invariant: every slot is free or belongs to exactly one running sequence. No sequence is ever preempted: a
    slot is as long as the longest sequence.
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

    def admit(self) -> None:
        """Start waiting sequences, the first one first, while there are slots for all their completions.

        A leader takes one slot when it starts; its `num_forks` other completions take theirs when they are
        forked. Until then as many free slots are promised to it, and no other sequence may start in them.
        After the fork a leader's `num_forks` is 0. If the first waiting sequence does not fit, no later one
        overtakes it: a request for many completions would wait for ever behind small ones.

        `RequestQueues.start_next` moves the first waiting sequence to the running ones and returns it;
        `_take_slot` gives it an empty slot.

        >>> manager = DenseBatchManager(max_slots=3, max_seq_len=32)
        >>> queued = [manager.add_request([1], name, SamplingParams(n=2)) for name in ("a", "b")]
        >>> manager.admit()  # "a/0" has a slot, and one is promised to "a/1"
        >>> [sequence.seq_id for sequence in manager.running], manager.capacity.num_free
        (['a/0'], 2)
        """
        promised = sum(sequence.num_forks for sequence in self.running)
        while self.waiting and 1 + self.waiting[0].num_forks <= len(self._free) - promised:
            sequence = self._queues.start_next()
            promised += sequence.num_forks
            self._take_slot(sequence)

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
        tokens, logit_rows = plan.pack()
        rows = mx.array(logit_rows, mx.int32) if logit_rows else None
        spans = [DenseSpan(self._slot(sequence), start, stop) for sequence, start, stop, _ in plan.chunks]
        context = DenseContext(spans, self._model.config.attention_scale, rows)
        logits = self._model(mx.array([tokens], mx.int32), context)[0]
        stored = [(cache.k_cache, cache.v_cache) for span in spans for cache in span.slot]
        mx.eval(stored, *([logits] if logit_rows else []))
        return logits if logit_rows else None

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

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id. Its key is computed in the next step."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

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
        if sequence.seq_id in self._slot_of:
            self._free.append(self._slot_of.pop(sequence.seq_id))

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
