"""Day 2.7: continuous batching over contiguous caches: requests join and leave between any two steps.

When it passes, you have a batch manager that serves many requests at once: it admits them in order, packs
their tokens into one pass, and no request's answer depends on who runs beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.batch_manager import PROMPT_ROWS_AT_ONCE
from tiny_llm.dense_batch import DenseBatchManager, DenseContext, DenseSpan
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import DuplicateRequestError, RequestTooLargeError
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.kv_context import KVContext
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model
from tiny_llm.naive_cache import NaiveKVCache
from tiny_llm.sampling_params import SamplingParams

from tiny_llm_checkpoints.model_config import ModelConfig

# The model runs with and without compiled kernels; the warning that there are none is not this day's matter.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")


# Task 1: DenseContext.attend


def empty_slot(layers: int = 1, kv_heads: int = 1, size: int = 2, dtype: mx.Dtype = mx.float32) -> list:
    """A slot for one sequence of up to 16 tokens: a cache for each layer."""
    return [NaiveKVCache(16, kv_heads, size, dtype) for _ in range(layers)]


def packed(*numbers: float) -> mx.array:
    """Packed tokens of one head of size 2, [1, 1, T, 2]: a number and a zero for each."""
    return mx.array([[[[number, 0] for number in numbers]]], mx.float32)


def test_task_1_a_prompt_attends_to_itself() -> None:
    """Oracle: by hand: with equal keys the means so far of 2, 4 and 9 are 2, 3 and 5."""
    context = DenseContext([DenseSpan(empty_slot(), 0, 3)], 1.0, None)
    out = context.attend(0, packed(1, 1, 1), packed(0, 0, 0), packed(2, 4, 9))
    assert out.shape == (1, 1, 3, 2)
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 5], rtol=1e-6)


def test_task_1_every_span_attends_to_its_own_slot() -> None:
    """Oracle: by hand: the means so far of 2 and 4, of 10, and of 7 and 9.

    Looking at the neighbours is the mistake that this finds.
    """
    spans = [DenseSpan(empty_slot(), 0, 2), DenseSpan(empty_slot(), 0, 1), DenseSpan(empty_slot(), 0, 2)]
    context = DenseContext(spans, 1.0, None)
    out = context.attend(0, packed(1, 1, 1, 1, 1), packed(0, 0, 0, 0, 0), packed(2, 4, 10, 7, 9))
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [2, 3, 10, 7, 8], rtol=1e-6)


def test_task_1_the_next_step_sees_what_the_slot_holds() -> None:
    """Oracle: by hand: one sequence goes on with 9 behind 2 and 4, the other with 4 and 4 behind 10."""
    first, second = empty_slot(), empty_slot()
    step = DenseContext([DenseSpan(first, 0, 2), DenseSpan(second, 0, 1)], 1.0, None)
    step.attend(0, packed(1, 1, 1), packed(0, 0, 0), packed(2, 4, 10))
    step = DenseContext([DenseSpan(first, 2, 3), DenseSpan(second, 1, 3)], 1.0, None)
    out = step.attend(0, packed(1, 1, 1), packed(0, 0, 0), packed(9, 4, 4))
    np.testing.assert_allclose(np.array(out)[0, 0, :, 0], [5, 7, 6], rtol=1e-6)


def test_task_1_keys_and_values_are_stored_in_the_slot_of_the_layer() -> None:
    """Oracle: by hand: the caches of the other layers stay empty."""
    first, second = empty_slot(layers=3), empty_slot(layers=3)
    context = DenseContext([DenseSpan(first, 0, 1), DenseSpan(second, 0, 2)], 1.0, None)
    context.attend(1, packed(1, 1, 1), packed(3, 4, 5), packed(6, 7, 8))
    assert [cache.current_len for cache in first] == [0, 1, 0]
    assert [cache.current_len for cache in second] == [0, 2, 0]
    assert second[1].k_cache[:2].tolist() == [[[4, 0]], [[5, 0]]]
    assert second[1].v_cache[:2].tolist() == [[[7, 0]], [[8, 0]]]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_task_1_a_token_is_seen_as_it_is_stored(dtype: mx.Dtype) -> None:
    """Oracle: by hand: the only value there is, rounded to the cache's type; the result keeps the query's.

    Attending to the new keys and values before they are rounded is the mistake: the next step sees others.
    """
    context = DenseContext([DenseSpan(empty_slot(dtype=dtype), 0, 1)], 1.0, None)
    out = context.attend(0, packed(1), packed(1), packed(0.1))
    assert out.dtype == mx.float32
    assert mx.array([0.1]).astype(dtype).item() != pytest.approx(0.1, rel=1e-4)
    assert out[0, 0, 0, 0].item() == pytest.approx(mx.array([0.1]).astype(dtype).item(), rel=1e-5)


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One sequence in float64, one query at a time: q [H, S, D], k and v [Hkv, S, D] -> [H, S, D]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group, out = q.shape[0] // k.shape[0], np.zeros_like(q)
    for h, i in np.ndindex(q.shape[:2]):
        scores = k[h // group, : i + 1] @ q[h, i] * scale
        weights = np.exp(scores - scores.max())
        out[h, i] = weights / weights.sum() @ v[h // group, : i + 1]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 3)])
def test_task_1_prompts_chunks_and_decodes_side_by_side(heads: int, kv_heads: int) -> None:
    """Oracle: each sequence alone and at once, NumPy in float64; each of two layers has keys of its own."""
    rng = np.random.default_rng(31)
    steps = [[(0, 0, 5), (1, 0, 2)], [(0, 5, 6), (1, 2, 6), (2, 0, 1)], [(2, 1, 4), (0, 6, 7), (1, 6, 7)]]
    lengths = [7, 7, 4]

    def layer_of(length: int) -> tuple[np.ndarray, ...]:
        shapes = [(count, length, 8) for count in (heads, kv_heads, kv_heads)]
        return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)

    sequences = [[layer_of(length) for _ in range(2)] for length in lengths]
    slots = [empty_slot(layers=2, kv_heads=kv_heads, size=8) for _ in sequences]
    found = [[np.zeros((heads, length, 8)) for _ in range(2)] for length in lengths]
    for spans in steps:
        context = DenseContext([DenseSpan(slots[i], start, stop) for i, start, stop in spans], 0.35, None)
        for layer in range(2):
            rows = [[x[:, start:stop] for x in sequences[i][layer]] for i, start, stop in spans]
            q, k, v = (mx.array(np.concatenate(parts, axis=1)[None]) for parts in zip(*rows, strict=True))
            out, row = np.array(context.attend(layer, q, k, v)), 0
            assert out.shape == (1, heads, sum(stop - start for _, start, stop in spans), 8)
            for i, start, stop in spans:
                found[i][layer][:, start:stop] = out[0, :, row : row + stop - start]
                row += stop - start
    for layers, outputs in zip(sequences, found, strict=True):
        for qkv, out in zip(layers, outputs, strict=True):
            np.testing.assert_allclose(out, causal_attention(*qkv, 0.35), rtol=1e-4, atol=1e-5)


# Task 2: DenseBatchManager.add_request


def limits(max_tokens: int | None = 4, n: int = 1) -> SamplingParams:
    """What matters to scheduling: how many tokens, how many completions; the likeliest token each time."""
    return SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0)


def ids(sequences: Sequence) -> list[str]:
    """The ids of sequences, in order."""
    return [sequence.seq_id for sequence in sequences]


def test_task_2_a_request_waits() -> None:
    """Oracle: by hand: it is queued, and has no slot before a step gives it one."""
    manager = DenseBatchManager(2, 16)
    assert not manager.has_work
    assert manager.add_request([5, 6, 7], "a", limits(), seed=9) is True
    assert manager.has_work
    assert (ids(manager.waiting), ids(manager.running)) == (["a"], [])
    assert manager.capacity.num_free == 2
    sequence = manager.sequence("a")
    assert (sequence.seq_id, sequence.request_id, sequence.prompt) == ("a", "a", (5, 6, 7))
    assert (sequence.params, sequence.seed) == (limits(), 9)
    assert (sequence.outputs, sequence.num_computed, sequence.num_forks) == ([], 0, 0)


def test_task_2_requests_wait_in_the_order_of_their_arrival() -> None:
    """Oracle: by hand; that of their names or lengths is another."""
    manager = DenseBatchManager(2, 16)
    for name, length in (("m", 3), ("z", 1), ("a", 2)):
        manager.add_request([1] * length, name, limits())
    assert ids(manager.waiting) == ["m", "z", "a"]


def test_task_2_a_prompt_is_what_it_was_when_it_came() -> None:
    """Oracle: by hand: the caller may use the list again."""
    manager, tokens = DenseBatchManager(2, 16), [5, 6, 7]
    manager.add_request(tokens, "a", limits())
    tokens.append(8)
    assert manager.sequence("a").prompt == (5, 6, 7)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(1, 4), (4, 7), (13, 16), (None, 16)])
def test_task_2_the_length_is_limited_by_the_request_or_the_cache(
    max_tokens: int | None, max_len: int
) -> None:
    """Oracle: by hand: 3 prompt tokens and the outputs, or all 16 that the cache has room for."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits(max_tokens))
    assert manager.sequence("a").max_len == max_len


def test_task_2_without_parameters_there_are_the_usual_ones() -> None:
    """Oracle: by hand: `SamplingParams()` asks for 16 tokens, one completion."""
    manager = DenseBatchManager(2, 32)
    manager.add_request([5, 6, 7], "a")
    assert manager.sequence("a").params == SamplingParams()
    assert manager.sequence("a").max_len == 19


def test_task_2_completions_wait_as_one_sequence_known_by_all_their_ids() -> None:
    """Oracle: by hand: three completions are a leader and two forks to come."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=3))
    assert ids(manager.waiting) == ["a/0"]
    leader = manager.sequence("a/0")
    assert (leader.request_id, leader.num_forks) == ("a", 2)
    assert manager.sequence("a/1") is manager.sequence("a/2") is leader


def test_task_2_an_empty_prompt_is_refused() -> None:
    """Oracle: the docstring; nothing changes."""
    manager = DenseBatchManager(2, 16)
    with pytest.raises(ValueError):
        manager.add_request([], "a", limits())
    assert not manager.has_work
    assert ids(manager.waiting) == []


TOO_LARGE = {
    "prompt_and_outputs": (13, limits(4)),
    "no_place_for_an_output": (16, limits(1)),
    "no_place_for_any_output": (16, limits(None)),
    "prompt_alone": (40, limits(None)),
    "completions": (2, limits(n=3)),
}


@pytest.mark.parametrize(("length", "params"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_task_2_what_could_never_run_is_refused(length: int, params: SamplingParams) -> None:
    """Oracle: by hand, for 2 slots of 16 tokens: 17 tokens, no place for an output, or 3 at once.

    Nothing changes: the id is free for a request that can run.
    """
    manager = DenseBatchManager(2, 16)
    with pytest.raises(RequestTooLargeError):
        manager.add_request([1] * length, "a", params)
    assert not manager.has_work
    assert manager.add_request([1] * 12, "a", limits(4, n=2))
    assert ids(manager.waiting) == ["a/0"]


@pytest.mark.parametrize(
    ("name", "n"), [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b/0", 1), ("b/1", 1), ("c", 2)]
)
def test_task_2_an_id_in_use_is_refused(name: str, n: int) -> None:
    """Oracle: the docstring: "a" is in use, "b", whose completions are "b/0" and "b/1", and "c/1".

    Two completions of a request "c" would be "c/0" and "c/1".
    """
    manager = DenseBatchManager(2, 16)
    manager.add_request([1, 2], "a", limits())
    manager.add_request([3, 4], "b", limits(n=2))
    manager.add_request([7], "c/1", limits())
    with pytest.raises(DuplicateRequestError):
        manager.add_request([5, 6], name, limits(n=n))
    assert ids(manager.waiting) == ["a", "b/0", "c/1"]
    assert [manager.sequence(name).prompt for name in ("a", "b/1", "c/1")] == [(1, 2), (3, 4), (7,)]


# Task 3: DenseBatchManager.process_batch


def test_task_3_a_prompt_is_computed_and_is_ready() -> None:
    """Oracle: by hand: it has a slot now, and all its 3 tokens are computed."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits())
    ready = manager.process_batch()
    assert list(ready) == ["a"]
    assert (ids(manager.waiting), ids(manager.running)) == ([], ["a"])
    assert manager.capacity.num_free == 1
    assert manager.sequence("a").num_computed == 3


def test_task_3_where_there_is_nothing_to_do_nobody_is_ready() -> None:
    """Oracle: by hand: without a request, and with one whose token is not chosen yet."""
    manager = DenseBatchManager(2, 16)
    assert len(manager.process_batch()) == 0
    manager.add_request([5, 6, 7], "a", limits())
    manager.process_batch()
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == 3


def test_task_3_a_long_prompt_is_computed_in_chunks() -> None:
    """Oracle: by hand: 10 tokens at 4 a step; nobody is ready before the last one."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    found = [(list(manager.process_batch()), manager.sequence("a").num_computed) for _ in range(3)]
    assert found == [([], 4), ([], 8), (["a"], 10)]


def test_task_3_prompts_share_a_step() -> None:
    """Oracle: by hand: of 8 tokens a step 5 are the first one's, and 3 of 6 the second one's."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=8)
    manager.add_request([1] * 5, "a", limits())
    manager.add_request([2] * 6, "b", limits())
    assert list(manager.process_batch()) == ["a"]
    assert manager.sequence("b").num_computed == 3
    assert list(manager.process_batch()) == ["b"]
    assert manager.sequence("b").num_computed == 6


def test_task_3_a_single_token_is_computed_beside_an_older_long_prompt() -> None:
    """Oracle: `share_budget`: of 4 tokens one goes to who wants one. Serving in order is the mistake."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "long", limits())
    manager.add_request([5], "short", limits())
    assert list(manager.process_batch()) == ["short"]
    assert manager.sequence("long").num_computed == 3


def test_task_3_who_has_waited_longest_starts_first() -> None:
    """Oracle: by hand: there are slots for two of four."""
    manager = DenseBatchManager(2, 16)
    for name in ("d", "c", "b", "a"):
        manager.add_request([1, 2], name, limits())
    assert set(manager.process_batch()) == {"d", "c"}
    assert (ids(manager.running), ids(manager.waiting)) == (["d", "c"], ["b", "a"])
    assert manager.capacity.num_free == 0
    manager.process_batch()
    assert ids(manager.waiting) == ["b", "a"]


def test_task_3_who_comes_later_starts_in_the_next_step() -> None:
    """Oracle: by hand: nobody waits for the others to end."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits())
    manager.process_batch()
    manager.add_request([2], "b", limits())
    assert set(manager.process_batch()) == {"a", "b"}


def test_task_3_who_starts_holds_a_slot_although_there_is_no_budget_for_it_yet() -> None:
    """Oracle: by hand: the first prompt uses up the step, and both run."""
    manager = DenseBatchManager(3, 16, max_batched_tokens=4)
    manager.add_request([1] * 8, "a", limits())
    manager.add_request([2] * 8, "b", limits())
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a", "b"]
    assert [sequence.num_computed for sequence in manager.running] == [4, 0]
    assert manager.capacity.num_free == 1


def test_task_3_completions_are_forked_when_their_prompt_is_computed() -> None:
    """Oracle: by hand: one sequence while the prompt is computed, three afterwards, each with a slot."""
    manager = DenseBatchManager(4, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=3))
    assert len(manager.process_batch()) == 0
    assert ids(manager.running) == ["a/0"]
    assert manager.capacity.num_free == 3
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}
    assert sorted(ids(manager.running)) == ["a/0", "a/1", "a/2"]
    assert manager.capacity.num_free == 1
    assert [manager.sequence(f"a/{i}").num_computed for i in range(3)] == [6, 6, 6]
    assert manager.sequence("a/1") is not manager.sequence("a/0")


def test_task_3_completions_need_a_slot_each_to_start() -> None:
    """Oracle: by hand: one slot is free, and two are needed. Who comes behind does not overtake."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([1], "a", limits())
    manager.add_request([2], "b", limits(n=2))
    manager.add_request([3], "c", limits())
    assert list(manager.process_batch()) == ["a"]
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["b/0", "c"])
    assert manager.capacity.num_free == 1


def test_task_3_slots_of_completions_to_come_are_not_given_away() -> None:
    """Oracle: by hand: the leader holds one slot and needs another when its prompt is computed.

    Counting only the slots that are taken is the mistake that this finds: the fork would have none.
    """
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits(n=2))
    manager.process_batch()
    manager.add_request([2], "b", limits())
    assert len(manager.process_batch()) == 0
    assert (ids(manager.running), ids(manager.waiting)) == (["a/0"], ["b"])
    assert set(manager.process_batch()) == {"a/0", "a/1"}
    assert ids(manager.waiting) == ["b"]


def test_task_3_slots_are_kept_for_all_who_start_in_the_same_step() -> None:
    """Oracle: by hand: two leaders and a fork of each are all four slots; the third request waits."""
    manager = DenseBatchManager(4, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=2))
    manager.add_request([2] * 6, "b", limits(n=2))
    manager.add_request([3], "c", limits())
    ready = [set(manager.process_batch()) for _ in range(3)]
    assert ready == [set(), {"a/0", "a/1"}, {"b/0", "b/1"}]
    assert ids(manager.waiting) == ["c"]
    assert manager.capacity.num_free == 0


def test_task_3_a_prompt_of_which_all_logits_are_wanted_comes_in_smaller_chunks() -> None:
    """Oracle: `batch_manager.wanted`: no more rows of logits in a step than `PROMPT_ROWS_AT_ONCE`."""
    length = 2 * PROMPT_ROWS_AT_ONCE
    manager = DenseBatchManager(2, 2 * length)
    manager.add_request([1] * length, "a", SamplingParams(max_tokens=4, prompt_logprobs=0))
    assert len(manager.process_batch()) == 0
    assert manager.sequence("a").num_computed == PROMPT_ROWS_AT_ONCE
    assert list(manager.process_batch()) == ["a"]


@cache
def tiny_model() -> Model:
    """Two layers of random float32 matrices, strong enough in attention that the past decides what comes.

    Four query heads on two key and value heads of 8, a vocabulary of 50.
    """
    config = ModelConfig(
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    rng, linears, vectors = np.random.default_rng(0), {}, {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            vectors[name.removesuffix(".weight")] = mx.array(1 + 0.1 * noise)
        else:
            gain = 1.0 if "embed" in name else 2.0 * shape[1] ** -0.5
            linears[name.removesuffix(".weight")] = Linear(mx.array(gain * noise))
    return build_model(config, linears, vectors)


@dataclass
class CountingModel:
    """A model that notes how many tokens each pass brings."""

    model: Model
    fed: list[int] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        self.fed.append(tokens.shape[1])
        return self.model(tokens, context)


def with_model(slots: int, budget: int = 512) -> DenseBatchManager:
    """A manager that computes; keys and values in float32, so that storing them rounds nothing."""
    return DenseBatchManager(slots, 64, model=tiny_model(), max_batched_tokens=budget, kv_dtype=mx.float32)


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """The logits of the next token, computed from nothing: no cache, no batch."""
    context = NoCacheContext(len(tokens), tiny_model().config.attention_scale)
    return np.array(tiny_model()(mx.array([list(tokens)], mx.int32), context)[0, -1])


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 50, size=length).tolist()


@pytest.mark.parametrize("budget", [3, 8, 512])
def test_task_3_logits_are_those_of_each_sequence_alone(budget: int) -> None:
    """Oracle: the model without cache and batch. The prompts are packed, whole or in chunks."""
    prompts = {"a": prompt(7, 1), "b": prompt(1, 2), "c": prompt(12, 3)}
    manager, found = with_model(3, budget), {}
    for name, tokens in prompts.items():
        manager.add_request(tokens, name, limits())
    for _ in range(10):
        ready = manager.process_batch()
        found.update({seq_id: np.array(ready[seq_id]) for seq_id in ready})
    assert found.keys() == prompts.keys()
    for name, tokens in prompts.items():
        np.testing.assert_allclose(found[name], logits_after(tokens), rtol=1e-3, atol=1e-3)


def test_task_3_completions_begin_with_the_same_logits() -> None:
    """Oracle: the model without cache and batch."""
    manager = with_model(3)
    manager.add_request(prompt(4, 5), "before", limits())
    manager.add_request(prompt(6, 4), "a", limits(n=2))
    ready = manager.process_batch()
    for name in ("a/0", "a/1"):
        np.testing.assert_allclose(np.array(ready[name]), logits_after(prompt(6, 4)), rtol=1e-3, atol=1e-3)


def test_task_3_a_step_is_one_pass_over_all_its_tokens() -> None:
    """Oracle: by hand: 8 tokens are 4 and 4 of 6, the next step brings 2; for nothing there is no pass."""
    model = CountingModel(tiny_model())
    manager = DenseBatchManager(2, 64, model=model, max_batched_tokens=8)
    manager.add_request(prompt(4, 6), "a", limits())
    manager.add_request(prompt(6, 7), "b", limits())
    for _ in range(3):
        manager.process_batch()
    assert model.fed == [8, 2]


# Task 4: DenseBatchManager.commit


def test_task_4_a_token_is_put_behind_the_others() -> None:
    """Oracle: by hand: it is known now, and will be computed by the next step."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6, 7], "a", limits())
    for token in (8, 9):
        assert list(manager.process_batch()) == ["a"]
        manager.commit({"a": token})
    sequence = manager.sequence("a")
    assert sequence.outputs == [8, 9]
    assert (sequence.num_tokens, sequence.num_computed) == (5, 4)


def test_task_4_each_sequence_gets_its_own_token() -> None:
    """Oracle: by hand, completions of one prompt among them."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=2))
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.commit({"b": 1, "a/1": 2, "a/0": 3})
    assert [manager.sequence(name).outputs for name in ("a/0", "a/1", "b")] == [[3], [2], [1]]


def test_task_4_who_gets_no_token_stays_as_it_is() -> None:
    """Oracle: by hand: a prompt that is still computed gets no token, and no tokens change nothing."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([5], "a", limits())
    manager.add_request([1] * 10, "b", limits())
    manager.process_batch()
    manager.commit({"a": 6})
    manager.commit({})
    assert manager.sequence("a").outputs == [6]
    assert manager.sequence("b").outputs == []


def test_task_4_a_decode_is_not_held_up_by_a_long_prompt() -> None:
    """Oracle: by hand: of 4 tokens a step one is the decode's, and 3 are the older prompt's."""
    manager = DenseBatchManager(2, 32, max_batched_tokens=4)
    manager.add_request([1] * 10, "long", limits())
    manager.add_request([5], "short", limits(8))
    computed = []
    for _ in range(4):
        ready = manager.process_batch()
        assert "short" in list(ready)
        computed.append(manager.sequence("long").num_computed)
        manager.commit(dict.fromkeys(ready, 7))
    assert computed == [3, 6, 9, 10]
    assert manager.sequence("short").outputs == [7, 7, 7, 7]
    assert manager.sequence("long").outputs == [7]


def test_task_4_the_next_step_continues_with_the_token() -> None:
    """Oracle: the model without cache and batch, on prompt and outputs."""
    manager, tokens = with_model(2), prompt(5, 8)
    manager.add_request(tokens, "a", limits())
    for token in (11, 3, 42):
        np.testing.assert_allclose(
            np.array(manager.process_batch()["a"]), logits_after(tokens), rtol=1e-3, atol=1e-3
        )
        manager.commit({"a": token})
        tokens = [*tokens, token]


def test_task_4_completions_go_different_ways() -> None:
    """Oracle: the model without cache and batch, on each one's own tokens: a copy of the cache for each."""
    manager, tokens = with_model(3), prompt(6, 9)
    known = {f"a/{i}": list(tokens) for i in range(3)}
    manager.add_request(tokens, "a", limits(n=3))
    for step in range(4):
        ready = manager.process_batch()
        assert set(ready) == set(known)
        for i, (name, mine) in enumerate(known.items()):
            np.testing.assert_allclose(np.array(ready[name]), logits_after(mine), rtol=1e-3, atol=1e-3)
            mine.append(10 * step + 3 * i)
        manager.commit({name: mine[-1] for name, mine in known.items()})


# Task 5: DenseBatchManager.finish


def test_task_5_a_sequence_ends_and_its_slot_is_free() -> None:
    """Oracle: by hand."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.add_request([7], "b", limits())
    manager.process_batch()
    manager.finish("a")
    assert ids(manager.running) == ["b"]
    assert manager.capacity.num_free == 1
    assert manager.has_work
    manager.finish("b")
    assert manager.capacity.num_free == 2
    assert not manager.has_work


def test_task_5_who_has_ended_is_unknown() -> None:
    """Oracle: the docstring. Giving the slot back a second time is the mistake: two would share it."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.process_batch()
    manager.finish("a")
    for name in ("a", "nobody"):
        with pytest.raises(KeyError):
            manager.finish(name)
    with pytest.raises(KeyError):
        manager.sequence("a")
    assert manager.capacity.num_free == 2


def test_task_5_a_sequence_that_waits_has_no_slot_to_give_back() -> None:
    """Oracle: by hand."""
    manager = DenseBatchManager(1, 16)
    manager.add_request([5], "a", limits())
    manager.add_request([6], "b", limits())
    manager.process_batch()
    manager.finish("b")
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], [])
    assert manager.capacity.num_free == 0


def test_task_5_a_sequence_may_end_while_its_prompt_is_computed() -> None:
    """Oracle: by hand."""
    manager = DenseBatchManager(1, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    manager.process_batch()
    manager.finish("a")
    assert manager.capacity.num_free == 1
    assert len(manager.process_batch()) == 0
    assert not manager.has_work


def test_task_5_the_next_one_starts_in_the_place_of_the_last_one() -> None:
    """Oracle: by hand: first come, first served, one at a time."""
    manager, order = DenseBatchManager(1, 16), []
    for name in ("c", "a", "b"):
        manager.add_request([1, 2], name, limits())
    while manager.has_work:
        (name,) = manager.process_batch()
        order.append(name)
        manager.finish(name)
    assert order == ["c", "a", "b"]


def test_task_5_completions_end_one_by_one() -> None:
    """Oracle: by hand: each gives back its own slot, and the others go on."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=3))
    manager.commit(dict.fromkeys(manager.process_batch(), 7))
    manager.finish("a/0")
    assert manager.capacity.num_free == 1
    assert set(manager.process_batch()) == {"a/1", "a/2"}
    manager.finish("a/2")
    manager.finish("a/1")
    assert manager.capacity.num_free == 3


def test_task_5_the_id_of_an_ended_request_may_be_used_again() -> None:
    """Oracle: the docstring of `add_request`: only an id in use is refused, and one that runs is in use."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.process_batch()
    with pytest.raises(DuplicateRequestError):
        manager.add_request([7], "a", limits())
    manager.finish("a")
    assert manager.add_request([7], "a", limits())
    assert manager.sequence("a").prompt == (7,)


def test_task_5_a_slot_comes_back_once_though_its_owner_s_id_is_used_again() -> None:
    """Oracle: by hand: the new owner of the id waits, and has no slot.

    A slot that is still noted under the id is the mistake: it would be free twice, and two would get it.
    """
    manager = DenseBatchManager(2, 16)
    manager.add_request([5, 6], "a", limits())
    manager.process_batch()
    manager.finish("a")
    manager.add_request([7], "a", limits())
    manager.finish("a")
    assert manager.capacity.num_free == 2


def recompute_everything(tokens: Sequence[int], max_tokens: int) -> list[int]:
    """The likeliest tokens behind these, every one from nothing: no cache, no batch."""
    known = list(tokens)
    for _ in range(max_tokens):
        known.append(int(logits_after(known).argmax()))
    return known[len(tokens) :]


def answers(
    manager: DenseBatchManager, requests: dict[str, tuple[list[int], SamplingParams]], every: int = 0
) -> dict[str, list[int]]:
    """The tokens of each sequence; a request joins every so many steps, with 0 all of them at once."""
    core, to_come, step = EngineCore(manager, eos_token_ids=()), list(requests.items()), 0
    found: dict[str, list[int]] = {}
    while to_come or core.has_work:
        assert step < 500, "it never ends"
        while to_come and (every == 0 or step % every == 0):
            name, (tokens, params) = to_come.pop(0)
            core.add_request(name, tokens, params)
            if every:
                break
        for output in core.step():
            found.setdefault(output.seq_id, []).append(output.token)
        step += 1
    return found


REQUESTS = {
    f"r{i}": (prompt(length, seed=40 + i), limits(max_tokens))
    for i, (length, max_tokens) in enumerate([(5, 9), (17, 4), (1, 12), (30, 6), (8, 1)])
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_task_5_a_request_alone_gets_the_likeliest_tokens(name: str) -> None:
    """Oracle: a plain loop that recomputes everything. The last place of the cache is used too."""
    tokens, params = REQUESTS[name]
    assert params.max_tokens is not None
    found = answers(with_model(1), {name: (tokens, params)})
    assert found == {name: recompute_everything(tokens, params.max_tokens)}


@pytest.mark.parametrize(
    ("slots", "budget", "every"), [(5, 512, 0), (5, 8, 0), (5, 8, 2), (2, 6, 0), (3, 16, 5)]
)
def test_task_5_a_request_gets_beside_others_what_it_gets_alone(slots: int, budget: int, every: int) -> None:
    """Oracle: each request alone. They begin together or join in the middle; slots and budget are short."""
    alone: dict[str, list[int]] = {}
    for name, request in REQUESTS.items():
        alone |= answers(with_model(1), {name: request})
    assert answers(with_model(slots, budget), REQUESTS, every) == alone


def test_task_5_a_cache_is_filled_to_its_last_place() -> None:
    """Oracle: by hand: 64 tokens are the prompt's 3 and 61 outputs; nothing is left over when they end."""
    manager = with_model(1)
    found = answers(manager, {"a": (prompt(3, 50), limits(None))})
    assert len(found["a"]) == 61
    assert manager.capacity.num_free == 1


def test_task_5_a_slot_shows_nothing_of_its_last_owner() -> None:
    """Oracle: a manager whose slots are new. A cache that is not reset goes on behind the old tokens."""
    manager = with_model(2)
    answers(manager, {"old": (prompt(40, 51), limits(20)), "older": (prompt(30, 52), limits(9))})
    assert answers(manager, REQUESTS) == answers(with_model(2), REQUESTS)


def test_task_5_completions_leave_their_slots_as_they_found_them() -> None:
    """Oracle: each request alone; the likeliest tokens are the same for all completions of a prompt."""
    tokens, _ = REQUESTS["r0"]
    found = answers(with_model(3, 8), {"a": (tokens, limits(9, n=3)), **REQUESTS})
    want = recompute_everything(tokens, 9)
    assert [found[f"a/{i}"] for i in range(3)] == [want, want, want]
    assert {name: found[name] for name in REQUESTS} == answers(with_model(5), REQUESTS)


# Task 6: DenseBatchManager.cancel


def test_task_6_a_request_that_waits_is_gone() -> None:
    """Oracle: by hand: it had no slot, so none comes back."""
    manager = DenseBatchManager(1, 16)
    for name in "abc":
        manager.add_request([5, 6], name, limits())
    manager.process_batch()
    manager.cancel("b")
    assert (ids(manager.running), ids(manager.waiting)) == (["a"], ["c"])
    assert manager.capacity.num_free == 0


def test_task_6_a_request_that_runs_gives_back_its_slot() -> None:
    """Oracle: by hand: the next one starts, and is not disturbed by the tokens of the one that is gone."""
    manager = DenseBatchManager(1, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits())
    manager.add_request([2], "b", limits())
    manager.process_batch()
    manager.cancel("a")
    assert manager.capacity.num_free == 1
    assert list(manager.process_batch()) == ["b"]


def test_task_6_unknown_and_ended_requests_are_ignored() -> None:
    """Oracle: the docstring: cancelling twice, or too late, is nobody's fault."""
    manager = DenseBatchManager(2, 16)
    manager.add_request([5], "a", limits())
    manager.add_request([6], "b", limits())
    manager.process_batch()
    manager.finish("b")
    for name in ("nobody", "b", "b", "a/0"):
        manager.cancel(name)
    assert ids(manager.running) == ["a"]
    assert manager.capacity.num_free == 1
    manager.cancel("a")
    manager.cancel("a")
    assert manager.capacity.num_free == 2
    assert not manager.has_work


def test_task_6_requests_of_similar_names_go_on() -> None:
    """Oracle: by hand: "r1" is not "r10", nor a request that is itself called "r1/0"."""
    manager = DenseBatchManager(3, 16)
    for name in ("r10", "r1", "r1/0"):
        manager.add_request([5], name, limits())
    manager.process_batch()
    manager.cancel("r1")
    assert ids(manager.running) == ["r10", "r1/0"]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_task_6_all_completions_end_whenever_it_comes(steps: int) -> None:
    """Oracle: by hand: they wait, have a part of their prompt, are forked, and go on.

    All slots come back, and no id is left in use.
    """
    manager = DenseBatchManager(3, 16, max_batched_tokens=4)
    manager.add_request([1] * 6, "a", limits(n=3))
    for _ in range(steps):
        manager.commit(dict.fromkeys(manager.process_batch(), 7))
    manager.cancel("a")
    assert manager.capacity.num_free == 3
    assert not manager.has_work
    assert (ids(manager.running), ids(manager.waiting)) == ([], [])
    for i in range(3):
        with pytest.raises(KeyError):
            manager.sequence(f"a/{i}")
    manager.add_request([1, 2], "a", limits(n=3))
    assert set(manager.process_batch()) == {"a/0", "a/1", "a/2"}


def test_task_6_slots_that_were_kept_for_completions_to_come_are_free_too() -> None:
    """Oracle: by hand: who waited for them starts."""
    manager = DenseBatchManager(2, 16, max_batched_tokens=4)
    manager.add_request([1] * 10, "a", limits(n=2))
    manager.add_request([2], "b", limits(n=2))
    manager.process_batch()
    manager.cancel("a")
    assert set(manager.process_batch()) == {"b/0", "b/1"}


def test_task_6_completions_that_are_left_end_when_one_has_ended_already() -> None:
    """Oracle: by hand: three slots, none of them given back twice."""
    manager = DenseBatchManager(3, 16)
    manager.add_request([5, 6], "a", limits(n=3))
    manager.process_batch()
    manager.finish("a/1")
    manager.cancel("a")
    assert manager.capacity.num_free == 3
    assert not manager.has_work


def test_task_6_the_answers_of_the_others_stay_the_same() -> None:
    """Oracle: each alone; beside them one is cancelled in the middle of its prompt, one of its answer."""
    manager = with_model(4, 12)
    core, found = EngineCore(manager, eos_token_ids=()), {}
    for name in ("r0", "r2"):
        core.add_request(name, *REQUESTS[name])
    core.add_request("long", prompt(40, 60), limits(5))
    core.add_request("short", prompt(2, 61), limits(30))
    for step in range(100):
        if step in (2, 6):
            core.cancel("long" if step == 2 else "short")
        for output in core.step():
            found.setdefault(output.seq_id, []).append(output.token)
    assert not core.has_work
    for name in ("r0", "r2"):
        tokens, params = REQUESTS[name]
        assert found[name] == recompute_everything(tokens, params.max_tokens)


@pytest.mark.parametrize("seed", range(8))
def test_task_6_in_a_long_random_mix_slots_are_conserved_and_nobody_is_overtaken(seed: int) -> None:
    """Oracle: the invariant: a slot is free or one running sequence's; who came earlier starts earlier."""
    rng = np.random.default_rng(seed)
    slots, budget = int(rng.integers(1, 5)), int(rng.integers(5, 30))
    manager, arrivals = DenseBatchManager(slots, 32, max_batched_tokens=budget), []
    for step in range(150):
        if rng.random() < 0.4:
            arrivals.append(f"r{step}")
            params = limits(int(rng.integers(1, 9)), n=int(rng.integers(1, slots + 1)))
            manager.add_request([1] * int(rng.integers(1, 20)), arrivals[-1], params)
        if arrivals and rng.random() < 0.2:
            manager.cancel(arrivals[int(rng.integers(len(arrivals)))])
        ready = manager.process_batch()
        assert manager.capacity.num_free + len(manager.running) == slots
        assert len(set(ids(manager.running))) == len(manager.running)
        manager.commit(dict.fromkeys(ready, 5))
        for seq_id in list(ready):
            sequence = manager.sequence(seq_id)
            if sequence.num_tokens == sequence.max_len:
                manager.finish(seq_id)
        order = [arrivals.index(sequence.request_id) for sequence in [*manager.running, *manager.waiting]]
        assert order == sorted(order), "somebody was overtaken"
    for _ in range(2000):
        ready = manager.process_batch()
        manager.commit(dict.fromkeys(ready, 5))
        for seq_id in list(ready):
            sequence = manager.sequence(seq_id)
            if sequence.num_tokens == sequence.max_len:
                manager.finish(seq_id)
        if not manager.has_work:
            break
    assert not manager.has_work, "everybody's turn comes"
    assert manager.capacity.num_free == slots
