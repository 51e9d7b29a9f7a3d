"""Bugs that other engines had: one test for each. The comments cite the project and its issue numbers."""

import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import OutOfBlocksError, RequestTooLargeError
from tiny_llm.kv_pool import KVPool
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.rope import inverse_frequencies, rope
from tiny_llm.sampler import sample_token
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.token_output import TokenOutput

import tiny_llm_kernels
from promises import MIXED_REQUESTS, answer_alone, check_all_returned, check_pages, check_scenario, policies
from tiny_model import EOS, random_prompt, tiny_config, tiny_model

SOURCE = Path(__file__).parents[1] / "src"


def make_engine(
    blocks: int = 100, *, block_size: int = 16, max_seqs: int = 8, preempts: bool = True, prefix: bool = False
) -> EngineCore:
    chosen_policies = policies(preempts, prefix)
    manager = PagedBatchManager(blocks, block_size, max_seqs, model=tiny_model(), policies=chosen_policies)
    return EngineCore(manager, (EOS,), seed=3)


def run(engine: EngineCore, requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenOutput]]:
    """Serve the requests (all with n = 1) together; return the outputs of each, in order."""
    got: dict[str, list[TokenOutput]] = {str(i): [] for i in range(len(requests))}
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    while engine.has_work:
        for output in engine.step():
            got[output.request_id].append(output)
    return list(got.values())


def generated_tokens(outputs: list[TokenOutput]) -> list[int]:
    return [output.token for output in outputs]


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)


# vllm-metal 92
def test_a_request_fails_instead_of_deadlocking_when_the_pool_is_full_and_nothing_can_be_preempted() -> None:
    for preempts in (True, False):
        engine = make_engine(4, block_size=4, preempts=preempts)
        outside_table = BlockTable(engine.manager.allocator, 4)
        outside_table.append_tokens(16)
        engine.add_request("a", [9, 9, 9], SamplingParams(max_tokens=2))
        assert engine.step() == []
        refused = engine.take_failures()
        with pytest.raises(OutOfBlocksError, match=r"'a' needs \d blocks, but only 0 of 4 are available"):
            raise refused[0].error
        assert [failure.request_id for failure in refused] == ["a"]
        assert not engine.has_work
        outside_table.release()
        check_all_returned(engine.manager)


# vllm-metal 92
def test_the_last_request_fails_instead_of_deadlocking_when_the_pool_fills_up_while_it_runs() -> None:
    engine = make_engine(4, block_size=4)
    engine.add_request("a", [9, 9, 9], SamplingParams(max_tokens=12, ignore_eos=True))
    engine.step()
    outside_table = BlockTable(engine.manager.allocator, 4)
    outside_table.append_tokens(12)

    for _ in range(10):
        engine.step()
    (refused,) = engine.take_failures()
    with pytest.raises(OutOfBlocksError, match="'a'"):
        raise refused.error
    outside_table.release()
    check_all_returned(engine.manager)


# vllm-metal 92
def test_a_request_that_can_never_fit_is_rejected_when_it_is_added() -> None:
    engine = make_engine(4, block_size=4)
    with pytest.raises(RequestTooLargeError, match="need 5 blocks of 4; the pool has 4"):
        engine.add_request("a", [9] * 10, SamplingParams(max_tokens=10))
    check_all_returned(engine.manager)


# mlx-lm 1731, vllm-mlx 641
def test_a_thousand_requests_with_cancels_and_errors_leak_no_memory() -> None:
    engine = make_engine(20, block_size=4)
    after = []
    for i in range(1000):
        params = SamplingParams(
            n=1 + i % 2, max_tokens=2 + i % 3, top_p=0.9, seed=i, logprobs=1 if i % 7 == 0 else None
        )
        if i % 11 == 0:
            with pytest.raises(RequestTooLargeError):
                engine.add_request(f"large {i}", [9] * 200, params)
        engine.add_request(str(i), random_prompt(3 + i % 9, 1), params)
        engine.step()
        if i % 5 == 0:
            engine.cancel(str(i))
        if i % 100 == 99:
            while engine.has_work:
                engine.step()
            gc.collect()
            mx.clear_cache()
            after.append(mx.get_active_memory())
            check_all_returned(engine.manager)
    assert max(after[1:]) - after[0] < 4096, f"memory in use grows: {after}"


# ollama 15065
def test_a_snapshot_of_some_blocks_does_not_keep_the_whole_pool_alive() -> None:
    gc.collect()
    before = mx.get_active_memory()
    pool = KVPool.for_model(tiny_config(), 4000, 16, mx.float16)
    nbytes = pool.nbytes
    snapshot = pool.read_blocks(0, [0, 1])
    del pool
    gc.collect()
    assert mx.get_active_memory() - before < nbytes / 100
    assert snapshot[0].shape[0] == 2


# mlx-lm 1906
def test_the_first_tokens_log_probabilities_do_not_depend_on_other_requests() -> None:
    prompts = [random_prompt(length, length) for length in (5, 17, 1, 30, 16)]
    [alone] = run(make_engine(), [(prompts[0], GREEDY)])
    together = run(make_engine(), [(prompt, GREEDY) for prompt in prompts])
    assert together[0][0].logprobs == alone[0].logprobs
    assert together[0][0].logprobs is not None


# vLLM 39146, 51187, omlx 3476
@pytest.mark.parametrize("others", [1, 2, 3, 7])
def test_greedy_output_does_not_depend_on_the_composition_of_the_batch(others: int) -> None:
    prompt = random_prompt(20, 1)
    [alone] = run(make_engine(), [(prompt, GREEDY)])
    neighbours = [
        (random_prompt(3 * i + 1, i), SamplingParams(max_tokens=5 + i, seed=i)) for i in range(1, others + 1)
    ]
    last = run(make_engine(), [*neighbours, (prompt, GREEDY)])[-1]
    assert [without_identity(output) for output in last] == [without_identity(output) for output in alone]


def without_identity(output: TokenOutput) -> tuple[object, ...]:
    """Return all fields of a token output but its ids and the time at which its request was scheduled."""
    return output._replace(request_id="", seq_id="", scheduled=None)


# mini-sglang 51, mlx-lm 1007
@pytest.mark.parametrize(
    "name",
    [
        "response_format",
        "stream",
        "best_of",
        "bad_words",
        "guided_decoding",
        "logits_processors",
        "truncate_prompt_tokens",
    ],
)
def test_an_unsupported_parameter_is_rejected_by_name_and_never_ignored(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})  # type: ignore[arg-type]


# mlx-lm 388
def test_each_rows_top_k_applies_only_to_that_row() -> None:
    prompts = [random_prompt(6, seed) for seed in range(6)]
    ks = [1, 2, 1, 20, 1, 3]
    requests = [
        (prompt, SamplingParams(top_k=k, max_tokens=10, seed=k, logprobs=k, ignore_eos=True))
        for prompt, k in zip(prompts, ks, strict=True)
    ]
    for outputs in run(make_engine(), requests):
        for output in outputs:
            assert output.logprobs is not None
            assert output.token in [token for token, _ in output.logprobs.top]


# tiny-llm's sampler
def test_top_p_after_top_k_uses_renormalized_probabilities() -> None:
    """Top-k 2 of 0.4, 0.3, 0.2, 0.1 gives 0.57 and 0.43, and top-p 0.5 keeps one (of 0.4 and 0.3: two)."""
    row = mx.log(mx.array([0.4, 0.3, 0.2, 0.1]))
    params = SamplingParams(top_k=2, top_p=0.5)
    assert {sample_token(row, params, 1, index).item() for index in range(200)} == {0}


# nano-vllm does not allow it
def test_temperature_zero_is_allowed_and_greedy() -> None:
    [outputs] = run(make_engine(), [(random_prompt(8, 2), GREEDY)])
    assert all(output.logprobs is not None and output.logprobs.rank == 1 for output in outputs)


# nano-vllm 144
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
def test_a_prompt_that_exactly_fills_its_blocks_gets_the_right_tokens(length: int, prefix: bool) -> None:
    prompt = tuple(random_prompt(length, length))
    params = SamplingParams(max_tokens=9, n=1, seed=7, logprobs=0)
    requests = [(list(prompt), params), ([9, 8], params), (list(prompt), params)]
    engine = make_engine(6, block_size=4, prefix=prefix)
    alone = answer_alone(tiny_model(), prompt, params)
    for _ in range(2):  # the second time the whole prompt is cached; its last token is computed even so
        first, _, third = run(engine, requests)
        assert tuple(generated_tokens(first)) == tuple(generated_tokens(third)) == alone.tokens
    cached = third[0].num_cached_tokens
    assert (cached > 0) == (prefix and length > 4)
    assert cached < length


# nano-vllm 211, 233; with the cache also vllm-metal 184, mini-sglang 52
@pytest.mark.parametrize("prefix", [False, True])
def test_all_of_512_requests_finish_with_a_pool_that_is_too_small_for_them(prefix: bool) -> None:
    chosen_policies = policies(True, prefix)
    manager = PagedBatchManager(
        64, 4, 512, max_batched_tokens=512, max_model_len=64, policies=chosen_policies
    )
    for i in range(512):
        manager.add_request([1] * (1 + i % 11), str(i), SamplingParams(max_tokens=20 + i % 30))
    for _ in range(20_000):
        ready = list(manager.process_batch())
        manager.commit(dict.fromkeys(ready, 2))
        for seq_id in ready:
            if manager.sequence(seq_id).num_tokens == manager.sequence(seq_id).max_len:
                manager.finish(seq_id)
        check_pages(manager)
        if not manager.has_work:
            break
    check_all_returned(manager)
    assert manager.num_preemptions > 100


# mini-sglang 142
def test_a_shared_block_that_one_completion_released_is_not_reused_while_another_reads_it() -> None:
    prompt = tuple(random_prompt(10, 4))
    engine = make_engine(12, block_size=4, prefix=True)
    params = SamplingParams(n=2, seed=1, max_tokens=12, ignore_eos=True)
    engine.add_request("a", list(prompt), params)
    got: dict[str, list[int]] = {"a/0": [], "a/1": [], "b": []}
    for output in engine.step():
        got[output.seq_id].append(output.token)
    engine.finish("a/0")
    engine.add_request("b", random_prompt(14, 5), SamplingParams(max_tokens=8, seed=2))
    while engine.has_work:
        for output in engine.step():
            got[output.seq_id].append(output.token)
    alone = answer_alone(tiny_model(), prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=2))
    assert tuple(got["a/1"]) == alone.tokens


# tiny-llm 63, 137, 297
def test_the_order_in_which_blocks_are_allocated_does_not_change_any_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So no test may depend on the id of an allocated block."""
    allocate = BlockAllocator.allocate

    def last_first(allocator: BlockAllocator) -> int:
        allocator._free.rotate(1)
        return allocate(allocator)

    monkeypatch.setattr(BlockAllocator, "allocate", last_first)
    assert check_scenario(tiny_model(), MIXED_REQUESTS)["preemptions"] > 0


# mlx 3430
def test_nothing_is_compiled_at_run_time() -> None:
    files = [
        path
        for folder in ("tiny_llm_ref", "tiny_llm_kernels", "tiny_llm_cli")
        for path in (SOURCE / folder).glob("*.py")
    ]
    assert len(files) > 30
    assert [path.name for path in files if "mx.compile" in path.read_text(encoding="utf-8")] == []


# mlx-lm 1896
def test_rotating_a_non_contiguous_view_gives_the_same_as_rotating_its_copy() -> None:
    heads = mx.random.normal((1, 6, 4, 64), key=mx.random.key(1))
    positions, inv_freq = mx.array([3, 9, 1, 0, 77, 4]), inverse_frequencies(32, 10_000.0)
    view = heads.swapaxes(1, 2)[..., ::2]
    copy = mx.array(np.ascontiguousarray(np.array(view)))
    positions = positions.astype(mx.int32)
    assert np.array_equal(
        np.array(rope(view, positions, inv_freq)), np.array(rope(copy, positions, inv_freq))
    )


# tiny-llm 15, 50, 51, 66
def test_the_reason_why_kernels_are_missing_fits_in_one_line() -> None:
    why = tiny_llm_kernels.why_unavailable()
    assert (why is None) == tiny_llm_kernels.available()
    assert why is None or "\n" not in why
