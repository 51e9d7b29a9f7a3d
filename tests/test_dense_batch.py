"""The dense batch manager: slots are conserved, and scheduling changes no answer. It agrees with the paged
one.
"""

import random

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.dense_batch import DenseBatchManager
from tiny_llm.engine_core import EngineCore
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams

import tiny_llm_kernels
from tiny_llm import LLM
from tiny_llm_checkpoints.errors import ConfigError
from tiny_model import CONTEXT, VOCAB, examples, random_prompt, tiny_model

TOLERANCE = 1e-3  # of log-probabilities: another attention, whose outputs are then rounded to 16 bits


def check_slots(manager: DenseBatchManager) -> None:
    """Check that every slot is free or belongs to exactly one running sequence."""
    capacity = manager.capacity
    assert capacity.num_free + len(manager.running) == capacity.num_blocks
    assert not {id(sequence) for sequence in manager.running} & {id(sequence) for sequence in manager.waiting}


@settings(max_examples=examples(60))
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(4, 40))
def test_slots_are_conserved_after_any_arrivals_forks_finishes_and_cancels(
    draw: random.Random, slots: int, budget: int
) -> None:
    manager = DenseBatchManager(slots, 32, max_batched_tokens=max(budget, slots))
    arrivals: list[str] = []
    for step in range(60):
        if draw.random() < 0.5:
            request_id = f"r{step}"
            params = SamplingParams(n=draw.randint(1, slots), max_tokens=draw.randint(1, 8))
            manager.add_request([1] * draw.randint(1, 20), request_id, params)
            arrivals.append(request_id)
        if draw.random() < 0.15 and arrivals:
            manager.cancel(draw.choice(arrivals))
        ready = manager.process_batch()
        check_slots(manager)
        manager.commit(dict.fromkeys(ready, 5))
        for seq_id in list(ready):
            sequence = manager.sequence(seq_id)
            if sequence.num_tokens >= sequence.max_len:
                manager.finish(seq_id)
        order = [arrivals.index(sequence.request_id) for sequence in [*manager.running, *manager.waiting]]
        assert order == sorted(order), "a request was overtaken"
    for request_id in arrivals:
        manager.cancel(request_id)
    assert manager.capacity.num_free == slots
    assert not manager.has_work


def answers(
    manager: DenseBatchManager | PagedBatchManager,
    requests: dict[str, tuple[list[int], SamplingParams]],
    joins: int,
) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log-probabilities by sequence; a request arrives every `joins` steps."""
    core = EngineCore(manager, ())
    found: dict[str, list[tuple[int, float]]] = {}
    waiting = list(requests.items())
    step = 0
    while waiting or core.has_work:
        if waiting and step % joins == 0:
            request_id, (tokens, params) = waiting.pop(0)
            core.add_request(request_id, tokens, params)
        for output in core.step():
            assert output.logprobs is not None
            found.setdefault(output.seq_id, []).append((output.token, output.logprobs.logprob))
        step += 1
    return found


def assert_same_bits(
    one: dict[str, list[tuple[int, float]]], other: dict[str, list[tuple[int, float]]]
) -> None:
    """Check promise 1 if the compiled kernels run; without them MLX's operators may round differently."""
    if tiny_llm_kernels.available():
        assert one == other
    else:
        assert_same(one, other)


def assert_same(one: dict[str, list[tuple[int, float]]], other: dict[str, list[tuple[int, float]]]) -> None:
    assert one.keys() == other.keys()
    for seq_id, found in one.items():
        assert [token for token, _ in found] == [token for token, _ in other[seq_id]]
        for (_, mine), (_, theirs) in zip(found, other[seq_id], strict=True):
            assert mine == pytest.approx(theirs, abs=TOLERANCE)


REQUESTS = {
    f"r{i}": (
        random_prompt(3 + 7 * i, seed=i),
        SamplingParams(
            temperature=0.7 * (i % 2), n=1 + i % 3, seed=i, max_tokens=6 + i, logprobs=0, ignore_eos=True
        ),
    )
    for i in range(5)
}


def dense(slots: int, budget: int) -> DenseBatchManager:
    return DenseBatchManager(
        slots, CONTEXT, model=tiny_model(), max_batched_tokens=budget, kv_dtype=mx.float32
    )


@pytest.mark.parametrize(("slots", "budget", "joins"), [(3, 8, 1), (8, 16, 2), (5, 64, 5)])
def test_a_request_gets_the_same_answer_in_a_batch_as_alone(slots: int, budget: int, joins: int) -> None:
    """Oracle: the same manager, one request at a time."""
    alone: dict[str, list[tuple[int, float]]] = {}
    for request_id, request in REQUESTS.items():
        alone |= answers(dense(3, 64), {request_id: request}, 1)
    assert_same_bits(answers(dense(slots, budget), REQUESTS, joins), alone)


def test_the_paged_manager_gives_the_same_answers() -> None:
    paged = PagedBatchManager(200, 4, 8, model=tiny_model(), kv_dtype=mx.float32)
    assert_same(answers(dense(8, 16), REQUESTS, 2), answers(paged, REQUESTS, 2))


def test_both_managers_give_prompt_log_probabilities() -> None:
    requests = {
        "r": (random_prompt(90, seed=3), SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    }

    def prompt_logprobs(manager: DenseBatchManager | PagedBatchManager) -> list[float]:
        core = EngineCore(manager, ())
        core.add_request("r", *requests["r"])
        while core.has_work:
            for output in core.step():
                assert output.prompt_logprobs is not None
                return [entry.logprob for entry in output.prompt_logprobs]
        return []

    paged = PagedBatchManager(40, 4, 2, model=tiny_model(), kv_dtype=mx.float32)
    assert prompt_logprobs(dense(1, 32)) == pytest.approx(prompt_logprobs(paged), abs=TOLERANCE)


def test_a_reused_slot_shows_nothing_of_its_previous_sequence() -> None:
    request = {"x": REQUESTS["r2"]}
    used = dense(3, 64)
    answers(used, {"before": (random_prompt(100, seed=9), REQUESTS["r2"][1])}, 1)
    assert_same_bits(answers(used, request, 1), answers(dense(3, 64), request, 1))


def test_the_embedded_model_gives_the_same_answers_with_both_managers(embedded_llm: LLM) -> None:
    prompts = ["The sky is", "Once upon a time", "def fib(n):", "The capital of France is"]
    params = SamplingParams(temperature=0, max_tokens=16, n=1)
    llm = LLM(batching="dense", max_model_len=64, max_num_seqs=3)
    assert llm.core.manager.capacity.block_size == 64
    found = llm.generate(prompts, params, use_tqdm=False)
    expected = embedded_llm.generate(prompts, params, use_tqdm=False)
    assert [one.outputs[0].text for one in found] == [one.outputs[0].text for one in expected]


def test_the_bytes_of_the_pool_determine_the_number_of_slots() -> None:
    llm = LLM(batching="dense", num_blocks=40, block_size=16, max_model_len=256)
    assert (llm.core.manager.capacity.num_blocks, llm.core.stats.num_blocks) == (2, 2)
    assert LLM(batching="dense", num_blocks=40).max_model_len == 640
    with pytest.raises(ConfigError, match="needs 41 blocks of 16; the pool has 40, for 640 tokens"):
        LLM(batching="dense", num_blocks=40, max_model_len=641)
    with pytest.raises(ConfigError, match="batching must be one of paged, dense, not 'sparse'"):
        LLM(batching="sparse")


def test_the_prompts_of_these_tests_are_in_the_vocabulary() -> None:
    assert all(max(tokens) < VOCAB for tokens, _ in REQUESTS.values())
