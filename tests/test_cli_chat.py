"""`tiny-llm chat`: one question, and a conversation with its commands and Ctrl-C.

Oracle: the engine's own `chat`.
"""

import builtins
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from command_line import Ended, Run, cli, every_page_comes_back, expected_answer, llm
from tiny_llm import LLM, SamplingParams
from tiny_llm_cli import conversation
from tiny_llm_cli.conversation import Conversation, converse

__all__ = ["cli", "every_page_comes_back", "llm"]

# ---- chat, one question ----


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
