"""The output of a SentencePiece model continues the prompt's text, in every interface.

Oracle: the library's `decode` of prompt and output together. `logit_bias` forces the sampled tokens.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from served import serving
from tiny_checkpoints import CONFIGS, random_weights, write_folder
from tiny_llm import LLM, BeamSearchParams, SamplingParams

FOLDER = Path(__file__).parent / "goldens" / "tokenizers" / "llama"
CONFIG = {**CONFIGS["llama"], "vocab_size": 899, "eos_token_id": 2, "max_position_embeddings": 256}
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tiny random model with the SentencePiece tokenizer of the goldens."""
    path = write_folder(tmp_path_factory.mktemp("spm") / "model", CONFIG, random_weights(CONFIG))
    for file in FOLDER.iterdir():
        shutil.copy(file, path)
    return LLM(path, num_blocks=64)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[httpx.Client]:
    with serving(lambda: llm) as served, served.client() as client:
        yield client


def token(llm: LLM, piece: str) -> int:
    found = llm.tokenizer._tokenizer.token_to_id(piece)
    assert found is not None, piece
    return int(found)


def always(llm: LLM, *pieces: str, **params: Any) -> SamplingParams:
    """Greedy parameters that force each sampled token to be one of these pieces."""
    bias = {token(llm, piece): 100.0 for piece in pieces}
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": 2, "logit_bias": bias, "ignore_eos": True, **params}
    )


def added(llm: LLM, prompt: Any, output: Any) -> str:
    """What the output adds to the prompt's text, according to the library."""
    decode = llm.tokenizer._tokenizer.decode
    before, whole = decode(list(prompt)), decode([*prompt, *output])
    assert whole.startswith(before)
    return str(whole[len(before) :])


def test_the_output_starts_with_the_space_before_its_first_word(llm: LLM) -> None:
    [output] = llm.generate("hello", always(llm, "\u2581the", n=2), use_tqdm=False)
    assert [one.text for one in output.outputs] == [" the the"] * 2
    assert output.outputs[0].text == added(llm, output.prompt_token_ids, output.outputs[0].token_ids)
    assert "".join(delta.text for delta in llm.stream("hello", always(llm, "\u2581the"))) == " the the"


def test_the_first_word_of_a_sequence_has_no_leading_space(llm: LLM) -> None:
    """Because decode([BOS, the]) has none."""
    [output] = llm.generate([[BOS]], always(llm, "\u2581the"), use_tqdm=False)
    assert output.outputs[0].text == "the the"


def test_a_stop_string_may_contain_the_leading_space(llm: LLM) -> None:
    [output] = llm.generate("hello", always(llm, "\u2581the", stop=" the", max_tokens=9), use_tqdm=False)
    [one] = output.outputs
    assert (one.text, one.finish_reason, one.stop_reason, len(one.token_ids)) == ("", "stop", " the", 1)


def test_beams_continue_the_prompts_text(llm: LLM) -> None:
    [found] = llm.beam_search("hello", BeamSearchParams(beam_width=3, max_tokens=4))
    prompt = llm.tokenizer.encode("hello", add_special_tokens=True)
    texts = [one.text for one in found.sequences]
    assert texts == [added(llm, prompt, one.tokens[len(prompt) :]) for one in found.sequences]


def test_a_stop_string_matches_the_name_of_a_control_token(llm: LLM) -> None:
    params = always(llm, "</s>", stop="</s>", max_tokens=9)
    [one] = llm.generate("hello", params, use_tqdm=False)[0].outputs
    assert (one.text, one.finish_reason, one.stop_reason, len(one.token_ids)) == ("", "stop", "</s>", 1)


def test_invalid_bytes_become_replacement_characters_and_fail_no_request(llm: LLM) -> None:
    """Oracle: the library's decoding of the byte run and its neighbours."""
    params = always(llm, "<0x9B>", n=2, max_tokens=5)
    [output] = llm.generate("hello", params, use_tqdm=False)
    assert [one.text for one in output.outputs] == ["\ufffd" * 5] * 2


def ask(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_echoed_completion_is_prompt_and_output(client: httpx.Client, llm: LLM) -> None:
    the = token(llm, "\u2581the")
    common = {"max_tokens": 2, "temperature": 0, "logit_bias": {str(the): 100}, "logprobs": 1, "echo": True}
    for prompt in ("hello", llm.tokenizer.encode("hello", add_special_tokens=True)):
        [choice] = ask(client, "/v1/completions", prompt=prompt, **common)["choices"]
        assert choice["text"] == "hello the the"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"][-2:] == [" the", " the"]
        assert logprobs["text_offset"][-2:] == [5, 9]
        for name, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[2:]:
            assert choice["text"][offset:].startswith(name)


def test_without_an_echo_text_offsets_count_from_the_output(client: httpx.Client, llm: LLM) -> None:
    bias = {str(token(llm, "\u2581the")): 100}
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "logit_bias": bias, "logprobs": 0}
    [choice] = ask(client, "/v1/completions", **body)["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (" the the the", [0, 4, 8])
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    assert len(lines) == 3


def test_token_strings_include_their_leading_spaces(client: httpx.Client, llm: LLM) -> None:
    found = ask(client, "/tokenize", prompt="hello the", return_token_strs=True, add_special_tokens=False)
    assert "".join(found["token_strs"]) == " hello the"
    assert found["token_strs"][-1] == " the"
    bias = {str(token(llm, "\u2581the")): 100}
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 1, "temperature": 0, "logit_bias": bias, "logprobs": True}
    [choice] = ask(client, "/v1/chat/completions", **body)["choices"]
    [place] = choice["logprobs"]["content"]
    assert (place["token"], bytes(place["bytes"])) == (" the", b" the")
    assert choice["message"]["content"] == " the"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_prompt_far_beyond_the_context_is_rejected_without_tokenizing(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the prompt was tokenized")

    monkeypatch.setattr("tiny_llm_checkpoints.tokenizer.library.encode", fail)
    text = "no end " * 100_000
    body = (
        {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    )
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "prompt tokens and 1 output token exceed the context of 256" in error["message"]
