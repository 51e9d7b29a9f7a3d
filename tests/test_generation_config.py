"""A model's recommended sampling parameters and end-of-sequence ids, from generation_config.json and GGUF.

Oracle: vLLM's documented behavior. A recommended value applies if the caller omits the parameter, in Python,
over HTTP and on the command line. A value that the caller gives always wins, even if it is the default.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from tiny_llm.loader import load_model

from served import serving
from tiny_checkpoints import CONFIGS, EOS, random_weights, write_folder, write_gguf
from tiny_llm import LLM, SamplingParams
from tiny_llm_checkpoints.errors import ConfigError, ModelFileError
from tiny_llm_cli.engine import AskedSampling, asked_sampling
from tiny_llm_cli.lines import read_lines
from tiny_llm_cli.main import run
from tiny_llm_cli.options import SamplingOptions
from tiny_llm_cli.prompts import from_lines
from tiny_llm_server import service

CONFIG = {**CONFIGS["llama"], "head_dim": 32, "num_hidden_layers": 1}
WEIGHTS = random_weights(CONFIG)
FILE_FIELDS = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 7,
}
RECOMMENDED = {**FILE_FIELDS, "max_tokens": 7}
del RECOMMENDED["max_new_tokens"]


def write_model(path: Path, **fields: Any) -> Path:
    """Write a model whose generation_config.json has these fields; return its folder."""
    folder = write_folder(path, CONFIG, WEIGHTS)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def defaults(path: Path, generation_config: str = "auto") -> dict[str, Any]:
    return load_model(path, 16, generation_config).sampling_defaults


def refusal(path: Path, generation_config: str = "auto") -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path, 16, generation_config)
    return str(caught.value)


# Sampling parameters in the files.


def test_only_the_fields_that_vllm_reads_are_read(tmp_path: Path) -> None:
    others = {
        "do_sample": False,
        "num_beams": 4,
        "max_length": 20,
        "typical_p": 0.2,
        "transformers_version": "5",
    }
    assert defaults(write_model(tmp_path, **FILE_FIELDS, **others)) == RECOMMENDED


def test_null_fields_and_a_missing_file_recommend_nothing(tmp_path: Path) -> None:
    assert defaults(write_model(tmp_path / "a", temperature=None, top_p=0.5)) == {"top_p": 0.5}
    assert defaults(write_folder(tmp_path / "b", CONFIG, WEIGHTS)) == {}


def test_a_gguf_file_recommends_parameters_in_its_metadata(tmp_path: Path) -> None:
    """The keys are llama.cpp's. 0.95 is read exactly although it is stored as float32. Others are ignored."""
    known = {"temp": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "penalty_repeat": 1.1}
    ignored = {"mirostat": 2, "xtc_probability": 0.5, "penalty_last_n": 64, "sequence": "kpt"}
    keys = {f"general.sampling.{name}": value for name, value in {**known, **ignored}.items()}
    found = defaults(write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, other=keys))
    assert found == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


BAD = [
    *(("temperature", -0.5), ("temperature", "0.6"), ("temperature", float("inf")), ("temperature", [1.0])),
    *(("top_p", 1.5), ("top_p", 0), ("top_k", 0.5), ("top_k", -2), ("min_p", 2), ("min_p", True)),
    *(("repetition_penalty", 0), ("max_new_tokens", 0), ("max_new_tokens", 1.5)),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_an_invalid_recommended_value_is_rejected_with_file_and_field(
    field: str, value: Any, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, **{field: value})
    assert refusal(folder).startswith(f"{folder / 'generation_config.json'}: {field} is ")
    assert defaults(folder, "vllm") == {}, (
        "with generation_config='vllm' the file's sampling parameters are not read"
    )


def test_an_invalid_value_in_a_gguf_file_is_rejected_with_its_key(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, other={"general.sampling.top_p": 1.5})
    assert refusal(path).startswith(f"{path}: general.sampling.top_p is 1.5")


def test_generation_config_may_name_another_folder(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", temperature=0.1, eos_token_id=5)
    other = write_model(tmp_path / "other", top_k=3, eos_token_id=[6])
    assert defaults(model, str(other)) == {"top_k": 3}
    assert load_model(model, 16, str(other)).model.config.eos_token_ids == (5, 6, EOS)
    for name in (str(tmp_path / "nowhere"), "~nobody/x", "a" * 5000, "a\0b"):
        assert "must be 'auto', 'vllm' or a folder" in refusal(model, name)


@pytest.mark.parametrize("value", [None, 3, "", ["auto"]])
def test_an_invalid_generation_config_option_is_rejected(value: Any) -> None:
    with pytest.raises(ConfigError, match="generation_config must be 'auto', 'vllm' or a folder"):
        LLM(generation_config=value)


# End-of-sequence ids.


@pytest.mark.parametrize("mode", ["auto", "vllm"])
@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, {}, {EOS}),
        ({"eos_token_id": 5}, {"eos_token_id": 6}, {5, 6, EOS}),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": [6, 5]}, {5, 6, 7, EOS}),
        ({"eos_token_id": None}, {"eos_token_id": 6}, {6, EOS}),
    ],
)
def test_end_of_sequence_ids_of_both_files_and_of_the_tokenizer_are_combined(
    config: dict[str, Any], generation: dict[str, Any], ends: set[int], mode: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, {**CONFIG, **config}, WEIGHTS)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert set(load_model(folder, 16, mode).model.config.eos_token_ids) == ends


@pytest.mark.parametrize("value", [-1, 288, "2", 2.0, [[2]], True, 10**400])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_invalid_end_of_sequence_id_is_rejected_with_file_and_field(
    file: str, value: Any, tmp_path: Path
) -> None:
    folder = write_model(tmp_path)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "eos_token_id": value}))
    message = refusal(folder)
    assert message.startswith(f"{folder / file}: eos_token_id")


# Python.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", **FILE_FIELDS)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_blocks=64)


@pytest.fixture
def engine_params(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The parameters of every request that reaches the engine."""
    found: list[SamplingParams] = []
    request = llm.engine._maker.request

    def watched(*arguments: Any) -> Any:
        made = request(*arguments)
        found.append(made.params)
        return made

    monkeypatch.setattr(llm.engine._maker, "request", watched)
    return found


MESSAGES = [{"role": "user", "content": "ab"}]


def test_calls_without_parameters_use_the_recommended_ones(
    llm: LLM, engine_params: list[SamplingParams]
) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(**RECOMMENDED)
    llm.generate(["ab", "b"], use_tqdm=False)
    llm.chat(MESSAGES, use_tqdm=False)
    list(llm.stream("ab"))
    list(llm.stream_chat(MESSAGES))
    assert engine_params == [SamplingParams(**RECOMMENDED)] * 5


def test_a_callers_sampling_params_are_used_unchanged(llm: LLM, engine_params: list[SamplingParams]) -> None:
    llm.generate("ab", SamplingParams(), use_tqdm=False)
    list(llm.stream("ab", SamplingParams(top_k=3)))
    assert engine_params == [SamplingParams(), SamplingParams(top_k=3)]


def test_generation_config_vllm_selects_the_engines_own_defaults(folder: Path) -> None:
    assert (
        LLM(folder, num_blocks=8, generation_config="vllm").get_default_sampling_params() == SamplingParams()
    )


# HTTP.


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[httpx.Client]:
    with serving(lambda: llm) as here, here.client() as client:
        yield client


ENDPOINTS = {
    "/v1/completions": {"prompt": "ab"},
    "/v1/chat/completions": {"messages": MESSAGES},
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("sent", "changed"),
    [
        ({}, {}),
        ({"temperature": None, "top_p": None}, {}),
        ({"temperature": 1.0}, {"temperature": 1.0}),  # the engine's own default, but given
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}),
        ({"repetition_penalty": 1.0, "max_tokens": 16}, {"repetition_penalty": 1.0, "max_tokens": 16}),
        ({"seed": 5, "n": 2}, {"seed": 5, "n": 2}),
    ],
)
def test_a_request_gets_recommended_values_for_the_fields_that_it_omits(
    endpoint: str,
    sent: dict[str, Any],
    changed: dict[str, Any],
    client: httpx.Client,
    engine_params: list[SamplingParams],
) -> None:
    answer = client.post(endpoint, json={**ENDPOINTS[endpoint], **sent})
    assert answer.status_code == 200, answer.text
    assert engine_params == [SamplingParams(**{**RECOMMENDED, **changed})]


def test_max_completion_tokens_counts_as_a_given_max_tokens(
    client: httpx.Client, engine_params: list[SamplingParams]
) -> None:
    body = {"messages": MESSAGES, "max_completion_tokens": 3}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert engine_params == [SamplingParams(**{**RECOMMENDED, "max_tokens": 3})]


def test_echo_with_max_tokens_zero_generates_nothing(client: httpx.Client) -> None:
    body = {"prompt": "ab", "max_tokens": 0, "echo": True}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "ab"


def test_the_server_logs_the_recommended_parameters_at_startup(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(service.LOG, "info", lambda text, *values, **_: lines.append(text % values))
    with serving(lambda: llm):
        pass
    assert "temperature 0.6, top_p 0.9" in "".join(lines)


# A recommended max_tokens that does not fit into the context.


@pytest.fixture(scope="module")
def llm_with_large_limit(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model that recommends more tokens than its context of 128 holds."""
    path = write_model(tmp_path_factory.mktemp("models") / "tiny", max_new_tokens=1000, temperature=0.0)
    return LLM(path, num_blocks=64)


def test_a_recommended_max_tokens_is_reduced_to_the_context(llm_with_large_limit: LLM) -> None:
    """As in vLLM, it is reduced to what the context has left. A caller's own limit must fit."""
    [output] = llm_with_large_limit.generate("ab", use_tqdm=False)
    assert output.finished
    assert len(list(llm_with_large_limit.stream("ab"))) <= 127
    with pytest.raises(ValueError, match="exceed the context of 128"):
        llm_with_large_limit.generate("ab", SamplingParams(max_tokens=1000), use_tqdm=False)
    with serving(lambda: llm_with_large_limit) as here, here.client() as client:
        for endpoint, body in ENDPOINTS.items():
            usage = client.post(endpoint, json={**body, "ignore_eos": True}).json()["usage"]
            assert usage["total_tokens"] == 128
            assert client.post(endpoint, json={**body, "max_tokens": 1000}).status_code == 400


@pytest.mark.parametrize("options", [[], ["--chat"]])
def test_the_command_line_also_reduces_a_recommended_max_tokens_to_the_context(
    options: list[str], llm_with_large_limit: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "ab", "--json", "--no-progress", "--ignore-eos", *options]
    assert run([*command, "--model", str(llm_with_large_limit.model_path), "--num-blocks", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["prompt_token_ids"]) + len(found["outputs"][0]["token_ids"]) == 128


# The command line.


def asked(**options: Any) -> AskedSampling:
    return asked_sampling(SamplingOptions(**options), max_tokens=128)


def test_given_options_override_the_models_values_which_override_the_commands_own_defaults() -> None:
    assert asked().params() == SamplingParams(temperature=0.0, max_tokens=128)
    assert asked().params(RECOMMENDED) == SamplingParams(**RECOMMENDED)
    packaged = {"frequency_penalty": 0.2, "presence_penalty": 0.1}
    assert asked().params(packaged) == SamplingParams(temperature=0.0, max_tokens=128, **packaged)
    assert asked(frequency_penalty=0.0).params(packaged).frequency_penalty == 0.0
    given = asked(temperature=0.0, top_p=1.0, max_tokens=128, repetition_penalty=1.0)
    kept = {"top_k": 20, "min_p": 0.05}
    assert given.params(RECOMMENDED) == SamplingParams(temperature=0.0, max_tokens=128, **kept)


def test_parameters_in_a_line_of_a_file_count_as_given(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "temperature": 0.0}\n{"prompt": "b"}\n')
    first, second = from_lines(read_lines([file]), asked(top_k=3))
    assert first.asked.params(RECOMMENDED) == SamplingParams(
        **{**RECOMMENDED, "top_k": 3, "temperature": 0.0}
    )
    assert second.asked.params(RECOMMENDED) == SamplingParams(**{**RECOMMENDED, "top_k": 3})


def test_commands_show_and_use_the_recommended_parameters(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "ab", "--json", "--no-progress", "--model", str(folder), "--num-blocks", "8"]
    assert run(generate) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) <= 7
    assert run([*generate, "--generation-config", "vllm", "--ignore-eos", "--max-tokens", "9"]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) == 9
    assert run(["info", "--json", "--model", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["sampling_defaults"] == RECOMMENDED
    assert run(["info", "--model", str(folder)]) == 0
    assert "temperature 0.6, top_p 0.9, top_k 20" in capsys.readouterr().out
