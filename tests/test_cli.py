"""The `tiny-llm` command: what it prints, what it refuses and how it ends.

Most tests run a command line in this process with one engine for all; what needs a process of its own
(imports, signals, pipes, a terminal) gets one.
"""

import builtins
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_llm.output_processor import CompletionText
from tiny_llm.outputs import TextDelta
from tiny_llm.token_output import TokenOutput

import tiny_llm
from tiny_checkpoints import CONFIGS, random_weights, write_folder, write_tokenizer
from tiny_llm import LLM, EngineConfig, SamplingParams
from tiny_llm_cli import conversation
from tiny_llm_cli.bench_latency import LatencyRun, measure_latency
from tiny_llm_cli.bench_throughput import ThroughputRun, measure_throughput
from tiny_llm_cli.conversation import Conversation, converse
from tiny_llm_cli.engine import control_token_ids
from tiny_llm_cli.main import run
from tiny_llm_cli.options import EngineOptions, SamplingOptions, parse_bytes
from tiny_llm_cli.serve import ServerOptions, server_config
from tiny_llm_cli.statistics_of import statistics_of
from tiny_llm_server import ServerConfig

COMMAND = [sys.executable, "-m", "tiny_llm_cli"]
PROCESS_SECONDS = 120  # a guard against hanging, not a speed that is asked for


class Ended(NamedTuple):
    """How a command line ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_num_seqs=4, num_blocks=64)


@pytest.fixture
def cli(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, on the shared engine where it would load one of its own."""

    def run_cli(*arguments: str, stdin: str | None = "") -> Ended:
        for module in map(import_module, ("tiny_llm_cli.chat", "tiny_llm_cli.generate")):
            monkeypatch.setattr(module, "load", lambda options: llm)
        for module in map(import_module, ("tiny_llm_cli.bench", "tiny_llm_cli.info")):
            monkeypatch.setattr(module, "load", lambda options: llm)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(arguments)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run_cli


@pytest.fixture
def plain_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that ends before a model is loaded, or that loads its own."""

    def run_cli(*arguments: str, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(arguments)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run_cli


@pytest.fixture(autouse=True)
def every_page_comes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        stats = request.getfixturevalue("llm").core.stats
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


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
    assert differing == {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}


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
        (["chat", "hi", "--num-blocks", "100000000"], 2, ["100000000 blocks", "bytes", "this machine has"]),
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


# ---- chat, one question ----


def expected_answer(llm: LLM, text: str, **params: Any) -> str:
    params = {"temperature": 0.0, "max_tokens": 8, **params}
    messages = [{"role": "user", "content": text}]
    return llm.chat(messages, SamplingParams(**params), use_tqdm=False)[0].outputs[0].text


def test_chat_prints_only_the_answer(cli: Run, llm: LLM) -> None:
    ended = cli("chat", "Name a colour.", "--max-tokens", "8")
    assert ended == Ended(0, expected_answer(llm, "Name a colour.") + "\n", "")


def test_chat_takes_its_question_from_a_pipe(cli: Run, llm: LLM) -> None:
    ended = cli("chat", "--max-tokens", "8", stdin="Name a\ncolour.\n")
    assert ended.out == expected_answer(llm, "Name a\ncolour.") + "\n"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A true pipe as standard input; what is written to it comes at once."""
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as stdin, os.fdopen(write, "w", encoding="utf-8") as other:
        monkeypatch.setattr(sys, "stdin", stdin)

        def send(text: str) -> None:
            other.write(text)
            other.close()

        yield send


def test_chat_puts_the_argument_before_the_pipe(cli: Run, llm: LLM, piped: Callable[[str], None]) -> None:
    piped("red, green\n")
    ended = cli("chat", "Pick one:", "--max-tokens", "8", stdin=None)
    assert ended.out == expected_answer(llm, "Pick one:\n\nred, green") + "\n"


@pytest.mark.usefixtures("piped")
def test_chat_does_not_wait_for_a_pipe_in_which_nothing_comes(
    cli: Run, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["tiny_llm_cli.chat"], "_WAIT_FOR_PIPE", 0.01)
    ended = cli("chat", "Name a colour.", "--max-tokens", "8", stdin=None)
    assert ended.out == expected_answer(llm, "Name a colour.") + "\n"
    assert "nothing came through the pipe" in ended.err


def test_chat_is_reproducible_by_seed(cli: Run) -> None:
    arguments = ["chat", "Name a colour.", "--max-tokens", "6", "--temperature", "2", "--seed"]
    assert cli(*arguments, "7").out == cli(*arguments, "7").out


def test_chat_without_a_seed_varies(cli: Run) -> None:
    arguments = ["chat", "Name a colour.", "--max-tokens", "6", "--temperature", "3"]
    assert len({cli(*arguments).out for _ in range(4)}) > 1


def test_a_question_longer_than_the_context_is_refused_with_the_figures(
    cli: Run, monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 40)
    ended = cli("chat", "word " * 100)
    assert ended.code == 1
    assert ended.out == ""
    assert "40 fit" in ended.err
    assert ended.err.count("\n") == 1


# ---- chat, a conversation ----


def talk(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, *lines: str | BaseException, **params: Any
) -> Conversation:
    """Hold a conversation in which the user types `lines`, an exception standing for its key."""
    params = {"temperature": 0.0, "max_tokens": 6, **params}
    talked = Conversation(llm, SamplingParams(**params), system="Be brief.")
    typed = iter([*lines, EOFError()])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    converse(talked, "a model")
    return talked


def test_a_conversation_keeps_its_messages(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    talked = talk(monkeypatch, llm, "Name a colour.", "", "Another.")
    assert [message["role"] for message in talked.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert talked.messages[3]["content"] == "Another."
    params = SamplingParams(temperature=0.0, max_tokens=6)
    again = llm.chat(talked.messages[:4], params, use_tqdm=False)[0].outputs[0].text
    assert talked.messages[4]["content"] == again


def test_reset_keeps_the_system_message_only(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    talked = talk(monkeypatch, llm, "Name a colour.", "/reset")
    assert talked.messages == [{"role": "system", "content": "Be brief."}]


def test_commands_are_explained_and_unknown_ones_told(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    talked = talk(monkeypatch, llm, "/help", "/sing a song", "/exit", AssertionError("read on after /exit"))
    out = capsys.readouterr().out
    assert "/reset" in out
    assert "/sing is no command" in out
    assert len(talked.messages) == 1


def test_ctrl_c_at_the_prompt_says_how_to_leave(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    talked = talk(monkeypatch, llm, KeyboardInterrupt(), "Name a colour.")
    assert "Ctrl-D" in capsys.readouterr().out
    assert len(talked.messages) == 3


def test_ctrl_c_between_a_question_and_its_answer_ends_neither_conversation_nor_program(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    reply, interruptions = conversation._reply, [KeyboardInterrupt()]

    def interrupted(*arguments: Any) -> None:
        if interruptions:
            raise interruptions.pop()
        reply(*arguments)

    monkeypatch.setattr(conversation, "_reply", interrupted)
    talked = talk(monkeypatch, llm, "Name a number.", "Name a colour.")
    assert "Ctrl-D" in capsys.readouterr().out
    assert [message["content"] for message in talked.messages if message["role"] == "user"] == [
        "Name a colour."
    ]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    stream = llm.stream

    def interrupted(*args: Any) -> Iterator[Any]:
        with closing(stream(*args)) as deltas:
            for number, delta in enumerate(deltas):
                if number == 2:
                    signal.raise_signal(signal.SIGINT)
                yield delta

    monkeypatch.setattr(llm, "stream", interrupted)
    talked = talk(monkeypatch, llm, "Count to one hundred.", max_tokens=50)
    said = talked.messages[-1]
    assert said["role"] == "assistant"
    assert 1 <= len(llm.tokenizer.encode(said["content"])) <= 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_token_drops_the_turn(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    """The signal comes to the main thread, which waits, while the engine's takes a step."""
    step = llm.core.step

    def interrupted() -> Any:
        monkeypatch.setattr(llm.core, "step", step)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return []

    monkeypatch.setattr(llm.core, "step", interrupted)
    talked = talk(monkeypatch, llm, "Name a colour.", "Name another.")
    assert [message["content"] for message in talked.messages[:2]] == ["Be brief.", "Name another."]


def test_an_outgrown_conversation_is_told_with_the_figures_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 60)
    talked = talk(monkeypatch, llm, "word " * 80, "/reset", "Name a colour.")
    captured = capsys.readouterr()
    assert "60 fit" in captured.err
    assert "/reset" in captured.err
    assert talked.messages[1]["content"] == "Name a colour."


def test_an_answer_that_fills_the_context_says_so(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 25)
    talk(monkeypatch, llm, "Write a long story.", max_tokens=100)
    assert "context of 25 tokens is full" in capsys.readouterr().out


# ---- generate ----


def test_one_prompt_gives_its_text_alone(cli: Run, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6)
    text = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].text
    assert cli("generate", "Once upon a time", "--max-tokens", "6") == Ended(0, text + "\n", "")


def test_several_completions_have_headings(cli: Run) -> None:
    out = cli("generate", "Once upon", "The sky", "--n", "2", "--max-tokens", "3").out
    headings = [line for line in out.splitlines() if line.startswith("==>")]
    assert headings == [f"==> {prompt} ({i} of 2) <==" for prompt in ("Once upon", "The sky") for i in (1, 2)]


def test_a_completion_that_fails_is_said_after_the_others_are_written(
    cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, num_pushed = CompletionText.push, Counter[int]()

    def raising(self: CompletionText, output: TokenOutput) -> TextDelta:
        num_pushed[self.index] += 1
        if (self.index, num_pushed[self.index]) == (1, 2):
            raise ArithmeticError("no text")
        return push(self, output)

    monkeypatch.setattr(CompletionText, "push", raising)
    ended = cli("generate", "--json", "Once", "--n", "2", "--max-tokens", "3", "--ignore-eos")
    assert ended.code == 1
    assert ended.err.endswith("1 of 2 completions failed; the first: no text\n")
    [line] = [json.loads(line) for line in ended.out.splitlines()]
    assert [found["finish_reason"] for found in line["outputs"]] == ["length", "error"]


def test_prompts_come_from_standard_input_line_by_line(cli: Run) -> None:
    ended = cli("generate", "--json", "--max-tokens", "1", stdin="one\n\ntwo\r\nthree")
    assert [json.loads(line)["prompt"] for line in ended.out.splitlines()] == ["one", "two", "three"]


def test_json_lines_have_everything(cli: Run, llm: LLM) -> None:
    arguments = ["Once upon a time", "--n", "2", "--seed", "3", "--max-tokens", "4", "--logprobs", "2"]
    ended = cli("generate", "--json", *arguments)
    [line] = [json.loads(line) for line in ended.out.splitlines()]
    params = SamplingParams(n=2, seed=3, max_tokens=4, logprobs=2)
    expected = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    assert line["prompt"] == "Once upon a time"
    assert tuple(line["prompt_token_ids"]) == expected.prompt_token_ids
    for found, output in zip(line["outputs"], expected.outputs, strict=True):
        assert set(found) == {field.name for field in fields(output)}
        assert tuple(found["token_ids"]) == output.token_ids
        assert output.logprobs is not None
        for position, logprobs in zip(found["logprobs"], output.logprobs, strict=True):
            assert position == {str(token): logprob._asdict() for token, logprob in logprobs.items()}
        for name in ("index", "text", "finish_reason", "stop_reason", "cumulative_logprob"):
            assert found[name] == getattr(output, name)


def test_jsonl_prompts_bring_their_own_parameters(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Once", "max_tokens": 1}\n\n{"prompt": [19556, 17], "n": 2, "seed": 1}\n')
    output = tmp_path / "answers.jsonl"
    ended = cli("generate", "--file", str(file), "--json", "--max-tokens", "2", "--output", str(output))
    assert ended == Ended(0, "", "")
    first, second = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(completion["token_ids"]) for completion in first["outputs"]] == [1]
    assert (second["prompt"], second["prompt_token_ids"]) == (None, [19556, 17])
    assert len(second["outputs"]) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", 'not an object with a "prompt"'),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": 3}', "not 3"),
        ('{"prompt": "a", "temprature": 1}', "unknown field 'temprature'"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be at least 1, not 0"),
    ],
)
def test_a_bad_jsonl_line_is_named(line: str, words: str, tmp_path: Path, plain_cli: Run) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    ended = plain_cli("generate", "--file", str(file))
    assert ended.code == 1
    assert f"{file}:2: " in ended.err
    assert words in ended.err


def test_chat_flag_asks_through_the_template(cli: Run, llm: LLM) -> None:
    ended = cli("generate", "--chat", "--json", "--max-tokens", "8", "Name a colour.")
    line = json.loads(ended.out)
    assert line["prompt"] == "Name a colour."
    assert line["outputs"][0]["text"] == expected_answer(llm, "Name a colour.")


def test_generate_is_the_same_text_every_time(cli: Run, tmp_path: Path) -> None:
    arguments = ["generate", "Once upon a time", "--n", "2", "--max-tokens", "4", "--seed", "1"]
    assert cli(*arguments).out == cli(*arguments).out


def test_a_prompt_that_never_fits_is_refused_before_any_runs(cli: Run) -> None:
    ended = cli("generate", "short", "word " * 2000, "--json")
    assert (ended.code, ended.out) == (1, "")
    assert "the context of 1024" in ended.err, "what 64 blocks hold"


def test_every_sampling_parameter_reaches_the_engine(cli: Run, llm: LLM) -> None:
    """Oracle: the same parameters through the Python interface."""
    options = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "prompt_logprobs": 1,
        "logit_bias": {338: -100.0, 253: 2.0},
        "stop_token_ids": [30],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    arguments = ["--presence-penalty", "0.5", "--frequency-penalty", "0.25", "--repetition-penalty", "1.2"]
    arguments += ["--min-tokens", "3", "--prompt-logprobs", "1", "--stop-token-id", "30", "--include-stop"]
    arguments += ["--logit-bias", "338=-100", "--logit-bias", "253=2", "--show-special-tokens"]
    params = SamplingParams(temperature=0.0, max_tokens=12, **options)  # type: ignore[arg-type]
    [expected] = llm.generate(["The sky is"], params, use_tqdm=False)
    found = json.loads(cli("generate", "The sky is", "--json", "--max-tokens", "12", *arguments).out)
    assert tuple(found["outputs"][0]["token_ids"]) == expected.outputs[0].token_ids
    assert found["outputs"][0]["text"] == expected.outputs[0].text
    assert len(found["prompt_logprobs"]) == len(expected.prompt_token_ids)
    assert found["prompt_logprobs"][0] is None


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--logit-bias", "a=1", "'a=1' is not ID=BIAS"),
        ("--logit-bias", "5=101", "logit_bias[5] must be from -100 to 100, not 101.0"),
        ("--logit-bias", "99999999=1", "logit_bias must be in the vocabulary (0 to 49151), not 99999999"),
        ("--stop-token-id", "49152", "stop_token_ids must be in the vocabulary (0 to 49151), not 49152"),
        ("--min-tokens", "500", "min_tokens must be from 0 to max_tokens, 128, not 500"),
        ("--presence-penalty", "3", "presence_penalty must be from -2 to 2, not 3"),
        ("--prompt-logprobs", "1", "add --json"),
    ],
)
def test_a_bad_sampling_parameter_is_named(plain_cli: Run, option: str, value: str, message: str) -> None:
    ended = plain_cli("generate", "hello", option, value)
    assert message in " ".join(ended.err.split())


# ---- bench, info ----


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_bench_latency_says_what_was_run(llm: LLM) -> None:
    run = LatencyRun(prefill_tokens=16, prompt_tokens=4, output_tokens=3, repetitions=2, warmups=0, seed=0)
    result = measure_latency(llm, run, quiet)
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms"):
        assert 0 < result[f"{key}_min"] <= result[key] <= result[f"{key}_max"]  # type: ignore[operator]
    assert run._asdict().items() <= result["run"].items()  # type: ignore[attr-defined]
    for key in ("model", "mlx", "device", "kernels", "instruction_set", "threads"):
        assert key in result["run"]  # type: ignore[operator]


def test_bench_throughput_has_vllms_keys_and_keeps_to_the_limit(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, most = llm.core.step, 0

    def watched() -> Any:
        nonlocal most
        most = max(most, llm.core.stats.num_running + llm.core.stats.num_waiting)
        return step()

    monkeypatch.setattr(llm.core, "step", watched)
    run = ThroughputRun(5, 2, 4, 8, output_tokens=3, shared_prefix=16, seed=0)
    result = measure_throughput(llm, run, quiet)
    assert most == 2
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (5, 0, 15)
    assert 5 * (16 + 4) <= result["total_input_tokens"] <= 5 * (16 + 8)  # type: ignore[operator]
    statistics = {
        f"{s}_{what}_ms" for s in ("mean", "median", "std", "p99") for what in ("ttft", "tpot", "itl", "e2el")
    }
    assert statistics < set(result)
    assert {"duration", "request_throughput", "output_throughput", "total_token_throughput"} < set(result)


def test_bench_prompts_hold_no_control_tokens(llm: LLM) -> None:
    assert [llm.tokenizer.token_text(token) for token in sorted(control_token_ids(llm))[:3]] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 100, 101, 250])
def test_p99_is_numpys(count: int) -> None:
    seconds = np.random.default_rng(count).exponential(size=count).tolist()
    result = statistics_of("itl", seconds)
    for kind, expected in (("p99", np.percentile(seconds, 99)), ("median", np.median(seconds))):
        assert result[f"{kind}_itl_ms"] == pytest.approx(1000 * float(expected), rel=1e-12)


def test_bench_prints_json_or_a_table(cli: Run) -> None:
    arguments = ["bench", "latency", "--prefill-tokens", "4", "--output-tokens", "2", "--repetitions", "1"]
    assert json.loads(cli(*arguments, "--json").out)["decode_tokens_per_s"] > 0
    table = cli(*arguments)
    assert table.err == ""
    assert {"decode_tokens_per_s", "ttft_ms", "instruction_set"} & {
        line.split()[0] for line in table.out.splitlines() if line
    }


def test_info_describes_model_and_pool(cli: Run, llm: LLM) -> None:
    found = json.loads(cli("info", "--json").out)
    assert found["model"]["parameters"] == 134_515_008  # SmolLM2-135M's own figure
    assert found["model"]["context"] == 8192
    assert found["pool"]["blocks"] * found["pool"]["block_size"] == found["pool"]["tokens"] == 64 * 16
    assert found["pool"]["bytes"] == found["pool"]["tokens"] * 2 * 30 * 3 * 64 * 2
    assert found["machine"]["mlx"]
    assert found["overlay"]["path"] == tiny_llm.__path__[0]
    assert "tokens" in cli("info").out


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_folder_is_described_and_answers(name: str, tmp_path: Path, plain_cli: Run) -> None:
    """Tiny random checkpoints; qwen2's projections have biases, and its head is tied."""
    path = write_folder(tmp_path / name, CONFIGS[name], random_weights(CONFIGS[name]))
    write_tokenizer(path)
    found = json.loads(plain_cli("info", "--model", str(path), "--num-blocks", "16", "--json").out)["model"]
    assert (found["name"], found["architecture"], found["path"]) == (name, name, str(path))
    assert found["quantization"].startswith("float32 x ")
    assert 0 <= found["bytes"] - 4 * found["parameters"] < 256  # the rotations' frequencies are no parameters
    answered = plain_cli("generate", "ab", "--model", str(path), "--max-tokens", "3", "--json")
    assert len(json.loads(answered.out)["outputs"][0]["token_ids"]) == 3
    too_long = plain_cli("generate", "ab " * 200, "--model", str(path))
    assert too_long.code == 1
    assert "128" in too_long.err


def test_info_without_a_model_still_describes_the_machine(plain_cli: Run) -> None:
    ended = plain_cli("info", "--model", "/nowhere.gguf", "--json")
    assert ended.code == 1
    assert "mlx" in json.loads(ended.out)["machine"]
    assert "/nowhere.gguf" in ended.err


def test_info_names_the_learners_modules(
    tmp_path: Path, plain_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sampler.py").touch()
    (tmp_path / "kvcache.py").touch()
    monkeypatch.setattr(tiny_llm, "__path__", [str(tmp_path), *tiny_llm.__path__[1:]])
    found = json.loads(plain_cli("info", "--model", "/nowhere.gguf", "--json").out)["overlay"]
    assert (found["modules"], found["unknown_modules"]) == (["sampler"], ["kvcache"])


# ---- processes of their own ----


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "chat", "Count to one hundred.", "--max-tokens", "60"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(PROCESS_SECONDS)


def test_ctrl_c_ends_a_single_question_with_130() -> None:
    with subprocess.Popen(
        [*COMMAND, "chat", "Count to one hundred.", "--max-tokens", "2000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(PROCESS_SECONDS) == 130


class Terminal:
    """A command in a terminal of its own: type to it, and wait for what it shows."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            attributes = termios.tcgetattr(0)
            attributes[3] |= termios.NOFLSH  # Ctrl-C leaves what is on its way to the screen alone
            termios.tcsetattr(0, termios.TCSANOW, attributes)
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` has been shown, and forget what came up to there."""
        assert self.shows(text, PROCESS_SECONDS), f"no {text!r} in {self.shown!r}"

    def shows(self, text: str, seconds: float) -> bool:
        """Whether `text` is shown in time; forgets what came up to there."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self._fd], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self.shown += os.read(self._fd, 1024).decode(errors="replace")
        self.shown = self.shown.split(text, 1)[1]
        return True

    def end(self) -> int:
        """Close the terminal; the exit code."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._fd)
        return code


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on() -> None:
    terminal = Terminal("chat", "--max-tokens", "4000")
    terminal.wait_for("> ")  # from here on readline alone echoes what is typed
    terminal.type("Write a very long story.\n")
    terminal.wait_for("story.\r\n")
    terminal.wait_for(" ")  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("(forgotten)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_of_a_terminal() -> None:
    terminal = Terminal("chat")
    terminal.wait_for("> ")
    for _ in range(12):  # readline misses a signal that comes just before it waits
        time.sleep(0.3)
        terminal.type("\x03")
        if terminal.shows("Ctrl-D", seconds=10):
            break
    else:
        pytest.fail(f"Ctrl-C has no effect: {terminal.shown!r}")
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
