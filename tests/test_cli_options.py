"""The options of the `tiny-llm` command: help, defaults, and errors in one line."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import tiny_llm_kernels
from command_line import COMMAND, Run, plain_cli
from tiny_llm import EngineConfig, SamplingParams
from tiny_llm_cli.main import run
from tiny_llm_cli.options import EngineOptions, SamplingOptions, parse_bytes
from tiny_llm_cli.serve import ServerOptions, server_config
from tiny_llm_cli.threads import MAX_THREADS
from tiny_llm_kernels import _loading
from tiny_llm_server import ServerConfig

__all__ = ["plain_cli"]

# ---- help, version ----


@pytest.mark.parametrize(
    "command",
    [
        *([], ["chat"], ["generate"], ["models"], ["info"]),
        *(["bench"], ["bench", "latency"], ["bench", "throughput"]),
    ],
)
def test_help_shows_an_example(command: list[str], plain_cli: Run) -> None:
    done = plain_cli(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"tiny-llm {' '.join(command)}".strip() in done.out.split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize("command", [["chat"], ["generate"], ["info"], ["serve"], ["bench", "latency"]])
def test_help_lists_the_engine_options_last_and_tuning_after_all_others(
    command: list[str], plain_cli: Run
) -> None:
    engine, tuning = plain_cli(*command, "--help").out.split("\nEngine:\n")[1].split("\nEngine tuning:\n")
    for field in fields(EngineOptions):
        assert f"--{field.name.replace('_', '-')} " in engine + tuning
    assert "--model " in engine
    assert "--block-size " in tuning


def test_help_shows_a_commands_own_default(plain_cli: Run) -> None:
    """The engine's default is no limit."""
    shown = " ".join(plain_cli("serve", "--help").out.split())
    assert re.search(r"--max-num-waiting N [^-]*\[default: 256\]", shown), shown


@pytest.mark.parametrize("command", ["chat", "generate", "serve", "info"])
def test_help_has_plain_placeholders_ranges_and_defaults(command: str, plain_cli: Run) -> None:
    shown = plain_cli(command, "--help").out
    for internal in ("<int", "<float", "<str", "x>=", "<=x", "default: (", "default: enable"):
        assert internal not in shown


def test_help_describes_the_default_seed_of_each_command(plain_cli: Run) -> None:
    chat, generate = (" ".join(plain_cli(name, "--help").out.split()) for name in ("chat", "generate"))
    assert "[default: a new seed each time]" in chat
    assert re.search(r"--seed N [^-]*\[default: the position of each prompt", generate), generate


def test_help_imports_neither_mlx_nor_the_engine() -> None:
    code = """if True:
        import sys
        from tiny_llm_cli.main import run
        for command in "", "chat", "generate", "info", "models", "serve", "bench", "bench latency":
            assert run([*command.split(), "--help"]) == 0
        heavy = {"mlx", "tiny_llm", "tiny_llm_ref", "tiny_llm_kernels", "tokenizers", "jinja2", "rich"}
        heavy |= {"fastapi", "tiny_llm_server"}
        print("imported:", sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("option", ["--version", "-v"])
def test_the_version_option_prints_the_version(option: str, plain_cli: Run) -> None:
    done = plain_cli(option)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("tiny-llm ")


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_no_command_shows_the_help(arguments: list[str], plain_cli: Run) -> None:
    done = plain_cli(*arguments)
    assert (done.code, done.err) == (0, "")
    assert "Commands:" in done.out


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("tiny-llm gen", ["generate"]), ("tiny-llm chat --temp", ["--temperature"])],
)
def test_a_shell_completes_commands_and_options(typed: str, completed: list[str]) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    environment = {**os.environ, **asked, "_TINY_LLM_COMPLETE": "complete_bash"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed


# ---- options ----


def test_engine_options_match_the_engine_configuration() -> None:
    engine = {field.name: field.default for field in fields(EngineConfig)}
    others = ("model", "chat_template_content_format")
    options = {field.name: field.default for field in fields(EngineOptions) if field.name not in others}
    assert options == {name: default for name, default in engine.items() if name in options}
    assert set(engine) - set(options) == {"seed"}  # --seed is the request's


def test_server_options_match_the_server_configuration() -> None:
    assert server_config(ServerOptions()) == ServerConfig()
    loopback = server_config(ServerOptions(), "localhost").allowed_hosts
    assert loopback == ("127.0.0.1", "localhost", "::1")
    assert server_config(ServerOptions(api_keys=["k"]), "localhost").allowed_hosts == ()
    assert [field.name for field in fields(ServerOptions)] == [field.name for field in fields(ServerConfig)]


def test_keys_of_a_file_are_added_to_those_of_the_options_or_else_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TINY_LLM_API_KEY", raising=False)
    assert server_config(ServerOptions(), keys_of_file=["c", "d"]).api_keys == ("c", "d")
    monkeypatch.setenv("TINY_LLM_API_KEY", "b")
    assert server_config(ServerOptions(), keys_of_file=["c"]).api_keys == ("b", "c")
    assert server_config(ServerOptions(api_keys=["a"]), keys_of_file=["c"]).api_keys == ("a", "c")
    assert server_config(ServerOptions(), "localhost", ["c"]).allowed_hosts == ()


def test_sampling_options_are_fields_of_sampling_params() -> None:
    """Parameters that a model may recommend default to None, because omitting one differs from giving it."""
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
        ("1TB", 10**12),
        ("1 TiB", 2**40),
        ("64 kb", 64_000),
        ("100 B", 100),
    ],
)
def test_sizes_are_parsed_with_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("size", ["9" * 400, "9" * 320 + "GiB"])
def test_a_size_beyond_any_number_is_refused(size: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"'9{20}'\.\.\. is too large"):
        parse_bytes(size)


# ---- errors: one line, the value and the limit, the exit code ----


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["chat", "--nonsense"], 2, ["--nonsense", "tiny-llm chat --help"]),
        (["-m", "x", "chat"], 2, ["-m goes after the command: `tiny-llm chat -m ...`"]),
        (["chatt"], 2, ["chatt", "Did you mean 'chat'?"]),
        (["chat", "hi", "--temperature", "hot"], 2, ["--temperature must be a number, not 'hot'"]),
        (["chat", "hi", "--temperature", "-1"], 2, ["--temperature must be", "-1.0", "from 0 to 1e+30"]),
        (["chat", "hi", "--top-p", "1.5"], 2, ["--top-p must be", "1.5", "above 0 and at most 1"]),
        (["chat", "hi", "--block-size", "0"], 2, ["--block-size must be at least 1", "not 0"]),
        (["chat", "hi", "--kv-cache-dtype", "int3"], 2, ["--kv-cache-dtype", "float16", "int3"]),
        (["chat", "hi", "--dtype", "float16"], 2, ["--dtype must be one of auto, float32", "float16"]),
        (["chat", "hi", "--kv-cache-memory", "12XB"], 2, ["12XB", "512MiB", "TiB"]),
        (["chat", "hi", "--model", "/nowhere.gguf"], 1, ["/nowhere.gguf", "no such file"]),
        (
            ["chat", "hi", "--num-blocks", "100000000"],
            2,
            ["100000000 blocks takes", "TiB; this machine has", "GiB"],
        ),
        (["chat", "hi", "--max-model-len", "9000"], 2, ["--max-model-len", "9000", "8192"]),
        (["chat", "hi", "--num-blocks", "2", "-c", "400"], 2, ["raise --num-blocks or --kv-cache-memory"]),
        (["chat", "hi", "--swap-space", "1G"], 2, ["--swap-space (1 GiB) needs --preemption-mode swap"]),
        (["chat", "hi", "--threads", "0"], 2, ["--threads must be a whole number from 1 to 1024, not 0"]),
        (["serve", "--port", "abc"], 2, ["--port must be a whole number from 0 to 65535, not 'abc'"]),
        (["chat", "hi", "--temperature"], 2, ["--temperature needs a value"]),
        (["chat", "two", "words"], 2, ["unexpected argument 'words'", "quote"]),
        (["chat", "-5 and 3"], 2, ["there is no option -5", "put -- in front"]),
        (["chat", ""], 2, ["prompt is empty"]),
        (["chat"], 2, ["standard input is empty"]),
        (["generate", ""], 2, ["prompt 1 is empty"]),
        (["generate"], 1, ["no prompts in standard input"]),
        (["generate", "--file", "/nowhere.txt"], 1, ["/nowhere.txt", "No such file"]),
        (["generate", "hi", "--logprobs", "2"], 2, ["--logprobs", "add --json"]),
        (["generate", "hi", "--n", "0"], 2, ["--n must be at least 1", "0"]),
        (["generate", "hi", "--stop", ""], 2, ["--stop", "non-empty"]),
        (["generate", "hi", "--output", "/nowhere/out.txt"], 1, ["/nowhere/out.txt", "No such file"]),
        (
            ["bench", "latency", "--output-tokens", "1"],
            2,
            ["--output-tokens must be", "at least 2, not 1"],
        ),
        (["bench", "throughput", "--min-input-tokens", "999"], 2, ["999", "160"]),
    ],
)
def test_an_error_is_reported_in_one_line_with_an_exit_code(
    arguments: list[str], code: int, words: list[str], plain_cli: Run
) -> None:
    done = plain_cli(*arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("tiny-llm: error: ")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--temp", "did you mean --temperature?"),
        ("--max_tokens", "did you mean --max-tokens?"),
        ("--topp", "did you mean --top-p?"),
        ("--seeed", "did you mean --seed?"),
        ("--max-new-tokens", "did you mean --max-tokens?"),
        ("--ctx-size", "did you mean --max-model-len?"),
        ("--repeat-penalty", "did you mean --repetition-penalty?"),
        ("--top", "did you mean --top-p or --top-k?"),
        ("--prompt", "give the prompt as an argument"),
    ],
)
def test_the_error_for_an_unknown_option_suggests_a_similar_one(
    option: str, meant: str, plain_cli: Run
) -> None:
    done = plain_cli("chat", "hi", option, "1")
    assert (done.code, done.out) == (2, "")
    assert f"there is no option {option}" in done.err
    assert meant in done.err


@pytest.mark.parametrize("option", ["--n-gpu-layers", "--tensor-parallel-size", "--lora"])
def test_an_option_that_resembles_no_known_option_gets_no_suggestion(option: str, plain_cli: Run) -> None:
    assert "did you mean" not in plain_cli("chat", "hi", option, "1").err


def test_short_options_have_the_meaning_that_other_programs_give_them(plain_cli: Run) -> None:
    done = plain_cli("generate", "hi", "-m", "/nowhere.gguf", "-t", "1", "-c", "64")
    assert "/nowhere.gguf: no such file" in done.err


def test_the_threads_option_sets_the_kernels_number_of_threads(plain_cli: Run) -> None:
    assert MAX_THREADS == _loading.MAX_THREADS
    before = tiny_llm_kernels.num_threads()
    try:
        done = plain_cli("info", "--threads", "1", "--num-blocks", "8", "--json")
        assert json.loads(done.out)["machine"]["threads"] == 1
    finally:
        tiny_llm_kernels.set_num_threads(before)


def test_the_threads_option_without_kernels_gives_a_warning() -> None:
    command = [*COMMAND, "info", "--threads", "2", "--model", "/nowhere.gguf"]
    environment = {**os.environ, "TINY_LLM_KERNELS": "off"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "warning: --threads has no effect" in done.stderr
    assert "TINY_LLM_KERNELS=off" in done.stderr


def test_an_error_names_a_file_that_is_not_a_model(tmp_path: Path, plain_cli: Run) -> None:
    file = tmp_path / "notes.gguf"
    file.write_text("not a model")
    done = plain_cli("chat", "hi", "--model", str(file))
    assert done.code == 1
    assert str(file) in done.err
    assert "Traceback" not in done.err


def test_closed_standard_input_counts_as_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["chat"]) == 2
    assert run(["generate"]) == 1


def test_debug_shows_the_traceback(plain_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LLM_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        plain_cli("chat", "hi", "--model", "/nowhere.gguf")
