"""Command lines for tests: run in this process with one shared engine, or as separate processes."""

import io
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm_cli.main import run

COMMAND = [sys.executable, "-m", "tiny_llm_cli"]
PROCESS_SECONDS = 120  # a timeout against hanging, not a requirement on speed


class CommandResult(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_num_seqs=4, num_blocks=64, generation_config="vllm")


@pytest.fixture
def cli(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, with the shared engine instead of one that it loads."""

    def run_cli(*arguments: str, stdin: str | None = "") -> CommandResult:
        for module in map(import_module, ("tiny_llm_cli.chat", "tiny_llm_cli.generate", "tiny_llm_cli.info")):
            monkeypatch.setattr(module, "load", lambda options: llm)
        bench_checks = import_module("tiny_llm_cli.bench_checks")
        monkeypatch.setattr(bench_checks, "load_silently", lambda options: llm)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(arguments)
        captured = capsys.readouterr()
        return CommandResult(code, captured.out, captured.err)

    return run_cli


@pytest.fixture
def plain_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that finishes before it loads a model, or that loads its own model."""

    def run_cli(*arguments: str, stdin: str = "") -> CommandResult:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(arguments)
        captured = capsys.readouterr()
        return CommandResult(code, captured.out, captured.err)

    return run_cli


@pytest.fixture(autouse=True)
def check_blocks_are_freed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        stats = request.getfixturevalue("llm").core.stats
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def expected_answer(llm: LLM, text: str, **params: Any) -> str:
    params = {"temperature": 0.0, "max_tokens": 8, **params}
    messages = [{"role": "user", "content": text}]
    return llm.chat(messages, SamplingParams(**params), use_tqdm=False)[0].outputs[0].text
