"""The line that commands print on a terminal while the model loads."""

import sys
from time import sleep

import pytest

from command_line import Run, plain_cli
from tiny_llm_cli import loading_notice as module
from tiny_llm_cli.loading_notice import loading_notice

__all__ = ["plain_cli"]
LINE = "Loading the model ...\n"


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard error, as pytest has replaced it for this test, look like a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_loading_that_takes_long_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    with loading_notice():
        sleep(0.2)
    assert capsys.readouterr() == ("", LINE)


def test_fast_or_failed_loading_is_not_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with loading_notice():
        pass
    with pytest.raises(ValueError, match="broken"), loading_notice():
        raise ValueError("broken")
    sleep(0.4)
    assert capsys.readouterr().err == ""


def test_nothing_is_announced_in_a_file_or_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with loading_notice():
        sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "hi", "--max-tokens", "1"],
        ["generate", "hi", "--max-tokens", "1", "--no-progress"],
        ["info"],
        ["bench", "latency", "--prefill-tokens", "2", "--output-tokens", "2", "--repetitions", "1"],
    ],
)
def test_commands_that_load_a_model_announce_it(
    arguments: list[str], plain_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert plain_cli(*arguments, "--num-blocks", "64").err.startswith(LINE)
