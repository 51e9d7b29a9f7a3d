"""The Python class `LLM` with the embedded model: kinds of input, errors, streams."""

import gc
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.errors import RequestTooLargeError
from tiny_llm.kernels import kernel_info
from tiny_llm.linear import PackedLinear
from tiny_llm.output_processor import RequestState
from tiny_llm.search_state import SearchState

from promises import check_all_returned
from tiny_checkpoints import CONFIGS, random_weights, write_folder
from tiny_llm import (
    LLM,
    EngineStoppingError,
    QueueFullError,
    RequestFailedError,
    SamplingParams,
    WrongThreadError,
)
from tiny_llm_checkpoints.errors import ConfigError, ModelFileError
from tiny_llm_checkpoints.tokenizer import Detokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def loaded() -> LLM:
    return LLM(block_size=8, num_blocks=60, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=200)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    """The engine shared by this module; after each test it must have no requests and no used pages."""
    yield loaded
    check_all_returned(loaded.core.manager)


@pytest.mark.parametrize("bits", [8, 16])
def test_every_packed_matrix_uses_the_engines_activation_bits(bits: int) -> None:
    layer = LLM(num_blocks=8, activation_bits=bits).model.layers[0]
    matrices = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedLinear)]
    assert packed or not kernel_info().available
    assert all(matrix.activation_bits == bits for matrix in packed)


def test_chat_answers_a_question(llm: LLM) -> None:
    [output] = llm.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris."
    assert (output.outputs[0].finish_reason, output.finished) == ("stop", True)


def test_prompts_may_be_strings_or_token_ids_single_or_in_a_list(llm: LLM) -> None:
    text = "Once upon a time"
    ids = llm.tokenizer.encode(text)
    [alone] = llm.generate(text, GREEDY, use_tqdm=False)
    [by_ids] = llm.generate(ids, GREEDY, use_tqdm=False)
    first, second = llm.generate([ids, text], GREEDY, use_tqdm=False)
    expected = alone.outputs
    assert len(expected[0].token_ids) == 6
    assert by_ids.outputs == first.outputs == second.outputs == expected
    assert (alone.prompt, by_ids.prompt, second.prompt) == (text, None, text)
    assert alone.prompt_token_ids == tuple(ids)


def test_an_empty_list_of_prompts_gives_an_empty_list_of_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_each_prompt_may_have_its_own_parameters_and_outputs_are_in_order(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=m, temperature=0.0, n=n) for m, n in ((7, 1), (2, 2), (4, 1))]
    outputs = llm.generate(["A", "B", "C"], params, use_tqdm=False)
    assert [[len(c.token_ids) for c in output.outputs] for output in outputs] == [[7], [2, 2], [4]]
    assert [output.prompt for output in outputs] == ["A", "B", "C"]


def test_there_must_be_one_set_of_sampling_params_or_one_for_each_prompt(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        llm.generate(["A", "B", "C"], [GREEDY, GREEDY], use_tqdm=False)


def test_completions_of_a_prompt_differ_and_are_reproducible_with_a_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=8)
    [once], [again] = (llm.generate("The", params, use_tqdm=False) for _ in range(2))
    assert once.outputs == again.outputs
    assert len({c.token_ids for c in once.outputs}) == 3
    [single] = llm.generate("The", SamplingParams(seed=6, max_tokens=8), use_tqdm=False)
    assert single.outputs[0].token_ids == once.outputs[2].token_ids, "completion i is sampled with seed + i"


def test_unseeded_requests_differ_from_each_other(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    outputs = llm.generate(["The"] * 4, params, use_tqdm=False)
    assert len({output.outputs[0].token_ids for output in outputs}) > 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([5, 10**6], "token id 1000000 is outside the vocabulary"),
        ([-1], "token id -1 is outside the vocabulary"),
        ("", "no tokens"),
        ([7] * 500, "500 prompt tokens"),
    ],
)
def test_one_invalid_prompt_rejects_the_whole_call_and_leaks_nothing(
    llm: LLM, bad: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["fine", bad, "fine too"], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    check_all_returned(llm.core.manager)


def test_an_interrupted_call_leaks_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread, which waits, during the third step of the engine's thread."""
    steps, step = count(1), llm.core.step

    def interrupted() -> object:
        if next(steps) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one", "two"], SamplingParams(max_tokens=30, n=2), use_tqdm=False)
    monkeypatch.undo()
    check_all_returned(llm.core.manager)
    assert llm.generate("three", GREEDY, use_tqdm=False)[0].finished


def test_the_deltas_of_a_stream_join_to_the_answer(llm: LLM) -> None:
    [whole] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    deltas = list(llm.stream_chat(QUESTION, GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.outputs[0].token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["length"]


def test_closing_a_stream_cancels_its_request(llm: LLM) -> None:
    stream = llm.stream("Tell me", SamplingParams(max_tokens=50, n=2))
    next(stream)
    assert llm.core.stats.num_running == 2
    stream.close()
    check_all_returned(llm.core.manager)


def test_streams_and_calls_may_run_at_the_same_time(llm: LLM) -> None:
    """One engine, several readers: a step may produce tokens for any of them."""
    [paris], [story] = (llm.generate(p, GREEDY, use_tqdm=False) for p in ("Paris is", "Once"))
    first, second = llm.stream("Paris is", GREEDY), llm.stream("Once", GREEDY)
    texts = ["", ""]
    for _ in range(2):
        texts[0] += next(first).text
        texts[1] += next(second).text
    [between] = llm.generate("Paris is", GREEDY, use_tqdm=False)
    texts[1] += "".join(delta.text for delta in second)
    texts[0] += "".join(delta.text for delta in first)
    assert texts == [paris.outputs[0].text, story.outputs[0].text]
    assert between.outputs == paris.outputs


def test_a_stop_string_finishes_its_completion_and_frees_its_pages(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, stop=" of")
    [output] = llm.chat(QUESTION, params, use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("The capital", " of")
    assert output.outputs[0].finish_reason == "stop"


def test_log_probabilities_agree_with_the_models_logits(llm: LLM) -> None:
    [output] = llm.generate(
        "Paris is", SamplingParams(temperature=0.0, max_tokens=4, logprobs=3), use_tqdm=False
    )
    [completion] = output.outputs
    ids = [*output.prompt_token_ids, *completion.token_ids]
    logits = np.array(llm.logits(ids)).astype(np.float64)[len(output.prompt_token_ids) - 1 :]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 4
    for row, token, entry in zip(logits, completion.token_ids, completion.logprobs, strict=False):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert list(entry) == np.argsort(-row)[:3].tolist()
        assert entry[token].rank == 1
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[other], abs=5e-4)
    chosen = [
        entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))


def test_logits_are_computed_in_chunks_and_their_pages_are_freed(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 5)
    assert len(ids) > llm.engine_config.max_num_batched_tokens
    assert llm.logits(ids).shape == (len(ids), llm.model_config.vocab_size)
    check_all_returned(llm.core.manager)


@pytest.mark.parametrize(("ids", "message"), [([], "token_ids is empty"), ([1, 10**7], "token id 10000000")])
def test_logits_of_invalid_token_ids_are_rejected(llm: LLM, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.logits(ids)


def test_an_unknown_option_and_a_missing_file_are_errors() -> None:
    with pytest.raises(ConfigError, match="num_block'"):
        LLM(num_block=3)
    with pytest.raises(ModelFileError, match=r"nowhere\.gguf: no such file"):
        LLM("nowhere.gguf")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(n=9), "n = 9 exceeds the 8 sequences"),
        (SamplingParams(max_tokens=300), "context of 200"),
    ],
)
def test_a_request_that_can_never_run_is_rejected_and_the_next_call_works(
    llm: LLM, params: SamplingParams, message: str
) -> None:
    with pytest.raises(RequestTooLargeError, match=message):
        llm.generate(["x", "y"], [GREEDY, params], use_tqdm=False)
    check_all_returned(llm.core.manager)
    assert llm.generate("x", GREEDY, use_tqdm=False)[0].finished


def test_calls_from_several_threads_give_the_same_results_as_from_one(llm: LLM) -> None:
    prompts = ["Paris is", "Once upon a time", [504] * 20, "A"]
    expected = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0] for prompt in prompts]
    logits = np.array(llm.logits([504] * 20))

    def ask(number: int) -> object:
        prompt = prompts[number % 4]
        match number // 4:
            case 0:
                return llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0] == expected[number % 4]
            case 1:
                return "".join(d.text for d in llm.stream(prompt, GREEDY)) == expected[number % 4].text
            case _:
                return np.array_equal(np.array(llm.logits([504] * 20)), logits)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(12)))


class Fatal(BaseException):
    """Like a panic in a Rust library: not an `Exception`."""


def break_detokenizers(monkeypatch: pytest.MonkeyPatch, error: BaseException, *prompts: str) -> None:
    """Make detokenization raise at the third token of each completion of these prompts."""
    push, init, broken = Detokenizer.push, RequestState.__init__, list[Detokenizer]()

    def init_and_break(self: RequestState, request_id: str, text: str | None, *rest: Any) -> None:
        init(self, request_id, text, *rest)
        if text in prompts:
            broken.extend(one._detokenizer for one in self._completions.values())

    def raising(self: Detokenizer, token_id: int) -> str:
        if self in broken:
            pushed[id(self)] += 1
            if pushed[id(self)] == 3:
                raise error
        return push(self, token_id)

    pushed: Counter[int] = Counter()
    monkeypatch.setattr(RequestState, "__init__", init_and_break)
    monkeypatch.setattr(Detokenizer, "push", raising)


@pytest.mark.parametrize("error", [ArithmeticError("no text"), Fatal("panic")])
def test_a_failing_prompt_does_not_change_the_outputs_of_the_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Oracle: the same prompts without the fault."""
    expected = llm.generate(["one", "two", "three"], GREEDY, use_tqdm=False)
    break_detokenizers(monkeypatch, error, "two")
    first, failed, last = llm.generate(["one", "two", "three"], GREEDY, use_tqdm=False)
    assert (first.outputs, last.outputs) == (expected[0].outputs, expected[2].outputs)
    [output] = failed.outputs
    assert (output.finish_reason, output.error, failed.finished) == ("error", str(error), True)
    assert output.token_ids == expected[1].outputs[0].token_ids[:2]
    assert failed.metrics is not None
    assert failed.metrics.finished is not None
    with pytest.raises(RequestFailedError, match=str(error)):
        list(llm.stream("two", GREEDY))
    check_all_returned(llm.core.manager)


def test_a_failing_beam_search_does_not_change_the_results_of_the_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, prompts = BeamSearchParams(beam_width=2, max_tokens=3), [[504, 600], [504, 700]]
    expected = llm.beam_search(prompts, params)
    with_text = SearchState._with_text

    def raising(self: SearchState, ended: Any, detokenizer: Detokenizer) -> Any:
        if self._prompt[1] == 600:
            raise Fatal("panic")
        return with_text(self, ended, detokenizer)

    monkeypatch.setattr(SearchState, "_with_text", raising)
    failed, found = llm.beam_search(prompts, params)
    assert (failed.sequences, failed.error) == ((), "panic")
    assert found == expected[1]


def test_a_call_raises_and_leaks_nothing_when_all_its_requests_fail(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_detokenizers(monkeypatch, ArithmeticError("no text"), "one", "two")
    with pytest.raises(RequestFailedError, match="no text") as raised:
        llm.generate(["one", "two"], GREEDY, use_tqdm=False)
    assert isinstance(raised.value.__cause__, ArithmeticError)
    monkeypatch.undo()
    check_all_returned(llm.core.manager)
    assert llm.generate("three", GREEDY, use_tqdm=False)[0].finished


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    """A tiny checkpoint, for tests that make their own engine."""
    return write_folder(tmp_path / "llama", CONFIGS["llama"], random_weights(CONFIGS["llama"]))


def test_a_garbage_collected_llm_frees_its_arrays_and_stops_its_thread(tiny_path: Path) -> None:
    LLM(tiny_path, num_blocks=8)
    gc.collect()
    before = mx.get_active_memory()
    llm = LLM(tiny_path, num_blocks=4000, max_num_seqs=8)
    size = llm.core.manager.capacity.nbytes
    llm.generate([[5, 6], [7]], GREEDY, use_tqdm=False)
    llm.logits([5, 6])
    stream = llm.stream([5, 6], GREEDY)
    next(stream)
    stream.close()
    thread, gone = llm.engine._thread, weakref.ref(llm.engine)
    assert mx.get_active_memory() > before + 0.9 * size
    gc.disable()
    try:
        del llm, stream
        assert gone() is None, "something still refers to the engine"
        assert not thread.is_alive()
        assert mx.get_active_memory() < before + size // 100
    finally:
        gc.enable()


def test_a_call_that_does_not_fit_into_the_queue_is_rejected_as_a_whole(tiny_path: Path) -> None:
    llm = LLM(tiny_path, num_blocks=64, max_num_seqs=2, max_num_waiting=3)
    with pytest.raises(QueueFullError, match="6 more do not fit"):
        llm.generate([[5]] * 6, GREEDY, use_tqdm=False)
    assert len(llm.generate([[5]] * 5, GREEDY, use_tqdm=False)) == 5


def test_a_stopped_engine_rejects_new_calls(tiny_path: Path) -> None:
    llm = LLM(tiny_path, num_blocks=64)
    stream = llm.stream([5], SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    llm.engine.stop()
    assert [delta.finish_reason for delta in stream][-1] in ("abort", "length")
    with pytest.raises(EngineStoppingError):
        llm.generate([5], GREEDY, use_tqdm=False)


def test_blocking_calls_in_the_engines_own_thread_raise_at_once(llm: LLM) -> None:
    """Each of them would block the engine for all requests."""
    running_stream = llm.stream("one", SamplingParams(max_tokens=50, ignore_eos=True))
    calls: dict[str, Any] = {
        "LLM.generate": lambda: llm.generate("a", GREEDY, use_tqdm=False),
        "LLM.chat": lambda: llm.chat(QUESTION, GREEDY, use_tqdm=False),
        "LLM.beam_search": lambda: llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2)),
        "LLM.stream": lambda: llm.stream("a", GREEDY),
        "LLM.stream_chat": lambda: llm.stream_chat(QUESTION, GREEDY),
        "the next piece of a stream": lambda: next(running_stream),
    }
    next(running_stream)
    for name, call in calls.items():
        with pytest.raises(WrongThreadError, match=f"{name} in the engine's own thread"):
            llm.engine.call(call)
    assert llm.engine.call(lambda: llm.logits([5])).shape[0] == 1
    llm.engine.call(lambda: None)
    assert llm.generate("three", GREEDY, use_tqdm=False)[0].finished
