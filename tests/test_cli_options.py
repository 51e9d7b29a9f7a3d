"""The options of the `tiny-llm` command: its help, its defaults, and the one line that names a mistake."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from command_line import Run, plain_cli
from tiny_llm import EngineConfig, SamplingParams
from tiny_llm_cli.main import run
from tiny_llm_cli.options import EngineOptions, SamplingOptions, parse_bytes
from tiny_llm_cli.serve import ServerOptions, server_config
from tiny_llm_server import ServerConfig

__all__ = ["plain_cli"]

# ---- help, version ----


@pytest.mark.parametrize(
    "command",
    [[], ["chat"], ["generate"], ["info"], ["bench"], ["bench", "latency"], ["bench", "throughput"]],
)
def test_help_gives_an_example(command: list[str], plain_cli: Run) -> None:
    ended = plain_cli(*command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"tiny-llm {' '.join(command)}".strip() in ended.out.split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize("command", [["chat"], ["generate"], ["info"], ["serve"], ["bench", "latency"]])
def test_help_lists_the_engine_options_under_one_heading(command: list[str], plain_cli: Run) -> None:
    engine = plain_cli(*command, "--help").out.split("\nEngine:\n")[1]
    for field in fields(EngineOptions):
        assert f"--{field.name.replace('_', '-')} " in engine


def test_help_says_what_a_command_takes_where_it_is_told_nothing(plain_cli: Run) -> None:
    """The engine's own default is any number."""
    said = " ".join(plain_cli("serve", "--help").out.split())
    assert re.search(r"--max-num-waiting <int> [^-]*\[default: 256\]", said), said


def test_help_imports_neither_mlx_nor_the_engine() -> None:
    code = """if True:
        import sys
        from tiny_llm_cli.main import run
        for command in ([], ["chat"], ["generate"], ["info"], ["serve"], ["bench"], ["bench", "latency"]):
            assert run([*command, "--help"]) == 0
        heavy = {"mlx", "tiny_llm", "tiny_llm_ref", "tiny_llm_kernels", "tokenizers", "jinja2", "rich"}
        heavy |= {"fastapi", "tiny_llm_server"}
        print("imported:", sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_version(plain_cli: Run) -> None:
    ended = plain_cli("--version")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("tiny-llm ")


def test_no_command_shows_the_help(plain_cli: Run) -> None:
    assert "Commands:" in plain_cli().out


# ---- options ----


def test_engine_options_are_the_engines_with_its_defaults() -> None:
    engine = {field.name: field.default for field in fields(EngineConfig)}
    of_the_file = ("model", "chat_template_content_format")
    options = {field.name: field.default for field in fields(EngineOptions) if field.name not in of_the_file}
    assert options == {name: default for name, default in engine.items() if name in options}
    assert set(engine) - set(options) == {"seed"}  # --seed is the request's


def test_server_options_are_the_servers_with_its_defaults() -> None:
    assert server_config(ServerOptions()) == ServerConfig()
    loopback = server_config(ServerOptions(), "localhost").allowed_hosts
    assert loopback == ("127.0.0.1", "localhost", "::1")
    assert server_config(ServerOptions(api_keys=["k"]), "localhost").allowed_hosts == ()
    assert [field.name for field in fields(ServerOptions)] == [field.name for field in fields(ServerConfig)]


def test_sampling_options_are_fields_of_sampling_params() -> None:
    """Those that a model may recommend have no default of their own: left out is not the same as given."""
    known = {field.name: field.default for field in fields(SamplingParams)}
    differing = {field.name for field in fields(SamplingOptions) if field.default != known[field.name]}
    penalties = {"presence_penalty", "frequency_penalty", "repetition_penalty"}
    assert differing == {"temperature", "top_p", "top_k", "min_p", "max_tokens", *penalties}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("536870912", 2**29),
        ("512MiB", 2**29),
        ("512 mib", 2**29),
        ("1GiB", 2**30),
        ("1.5G", 3 * 2**29),
        ("2GB", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


# ---- errors: one line, the value and the limit, the exit code ----


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["chat", "--nonsense"], 2, ["--nonsense", "tiny-llm chat --help"]),
        (["chatt"], 2, ["chatt", "Did you mean 'chat'?"]),
        (["chat", "hi", "--temperature", "hot"], 2, ["hot", "--temperature"]),
        (["chat", "hi", "--temperature", "-1"], 2, ["temperature", "-1.0", "from 0 to 1e+30"]),
        (["chat", "hi", "--top-p", "1.5"], 2, ["top_p", "1.5", "above 0 and at most 1"]),
        (["chat", "hi", "--block-size", "0"], 2, ["block_size", "at least 1", "not 0"]),
        (["chat", "hi", "--kv-cache-dtype", "int3"], 2, ["kv_cache_dtype", "float16", "int3"]),
        (["chat", "hi", "--dtype", "float16"], 2, ["dtype must be one of auto, float32", "float16"]),
        (["chat", "hi", "--kv-cache-memory", "12XB"], 2, ["12XB", "512MiB"]),
        (["chat", "hi", "--model", "/nowhere.gguf"], 1, ["/nowhere.gguf", "no such file"]),
        (["chat", "hi", "--num-blocks", "100000000"], 2, ["100000000 blocks", "GiB", "this machine has"]),
        (["chat", "hi", "--max-model-len", "9000"], 2, ["max_model_len", "9000", "8192"]),
        (["chat", ""], 2, ["prompt is empty"]),
        (["chat"], 2, ["standard input is empty"]),
        (["generate", ""], 2, ["prompt 1 is empty"]),
        (["generate"], 1, ["no prompts in standard input"]),
        (["generate", "--file", "/nowhere.txt"], 1, ["/nowhere.txt", "No such file"]),
        (["generate", "hi", "--logprobs", "2"], 2, ["--logprobs", "add --json"]),
        (["generate", "hi", "--n", "0"], 2, ["n must be at least 1", "0"]),
        (["generate", "hi", "--stop", ""], 2, ["stop", "non-empty"]),
        (["generate", "hi", "--output", "/nowhere/out.txt"], 1, ["/nowhere/out.txt", "No such file"]),
        (["bench", "latency", "--output-tokens", "1"], 2, ["--output-tokens", "1", "x>=2"]),
        (["bench", "throughput", "--min-input-tokens", "999"], 2, ["999", "160"]),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, words: list[str], plain_cli: Run
) -> None:
    ended = plain_cli(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("tiny-llm: error: ")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


def test_a_file_that_is_no_model_is_named(tmp_path: Path, plain_cli: Run) -> None:
    file = tmp_path / "notes.gguf"
    file.write_text("not a model")
    ended = plain_cli("chat", "hi", "--model", str(file))
    assert ended.code == 1
    assert str(file) in ended.err
    assert "Traceback" not in ended.err


def test_a_closed_standard_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["chat"]) == 2
    assert run(["generate"]) == 1


def test_debug_shows_the_traceback(plain_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LLM_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        plain_cli("chat", "hi", "--model", "/nowhere.gguf")
