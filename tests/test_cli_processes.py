"""The `tiny-llm` command in separate processes: pipes, signals, and a pseudo-terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

from command_line import COMMAND, PROCESS_SECONDS


def test_closing_the_reading_end_of_the_output_pipe_is_not_an_error() -> None:
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


def test_ctrl_c_during_a_single_question_exits_with_code_130() -> None:
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


READING = "\x1b[?2004h"  # the line editor turns marked pastes on: it reads keys from here on


class Terminal:
    """A command in a new pseudo-terminal: type to it, and wait for what it shows."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            attributes = termios.tcgetattr(0)
            attributes[3] |= termios.NOFLSH  # Ctrl-C discards neither pending input nor pending output
            termios.tcsetattr(0, termios.TCSANOW, attributes)
            os.environ["TERM"] = "xterm"
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str) -> str:
        """Read until `text` is shown. Return what was shown before it, and drop both."""
        deadline = time.monotonic() + PROCESS_SECONDS
        while text not in self.shown:
            ready = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._fd, 1024).decode(errors="replace")
        before, self.shown = self.shown.split(text, 1)
        return before

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def rest(self) -> str:
        """Return all that is shown until the command exits."""
        with suppress(OSError):  # Linux raises it when no process has the terminal open
            while more := os.read(self._fd, 1024):
                self.shown += more.decode(errors="replace")
        return self.shown

    def end(self) -> int:
        """Wait for the command to exit, close the terminal, and return the exit code."""
        self.rest()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._fd)
        return code


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which commands keep their state, in place of the user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_ctrl_c_stops_an_answer_and_the_conversation_continues() -> None:
    terminal = Terminal("chat", "--max-tokens", "4000")
    terminal.wait_for(READING)
    terminal.type("Write a very long story.\r")
    terminal.wait_for("story.")
    terminal.wait_for("\n")
    terminal.wait_for(" ")  # the answer has started
    terminal.type("\x03")
    terminal.wait_for(READING)
    terminal.type("/reset\r")
    terminal.wait_for("(conversation reset)")
    terminal.wait_for(READING)
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_discards_the_line_and_shows_how_to_exit_once() -> None:
    terminal = Terminal("chat")
    terminal.wait_for(READING)
    terminal.type("half a question\x03")
    terminal.wait_for("(Ctrl-D or /exit leaves)")
    terminal.wait_for(READING)
    terminal.type("\x03")
    assert "Ctrl-D" not in terminal.wait_for(READING)
    terminal.type("/exit\r")
    assert terminal.end() == 0


def test_text_typed_during_an_answer_is_not_echoed_and_is_sent_only_after_enter(state: Path) -> None:
    terminal = Terminal("chat", "--max-tokens", "4000")
    assert terminal.echoes
    terminal.wait_for(READING)
    terminal.type("Write a very long story.\r")
    terminal.wait_for("story.")
    terminal.wait_for("\n")
    terminal.wait_for(" ")  # the answer has started
    assert not terminal.echoes
    terminal.type("/save q\x7f")
    terminal.type(f"{state}/chat.json\r\x03")
    assert "/save" not in terminal.wait_for(READING)
    terminal.wait_for("/save")
    assert not (state / "chat.json").exists()
    terminal.type("\r")
    terminal.wait_for("(saved 2 messages")
    assert (state / "chat.json").exists()
    terminal.wait_for(READING)
    terminal.type("/exit\r")
    terminal.rest()
    assert terminal.echoes
    assert terminal.end() == 0


def test_a_pasted_text_of_several_lines_is_one_question(state: Path) -> None:
    terminal = Terminal("chat", "--max-tokens", "4")
    terminal.wait_for(READING)
    terminal.type("\x1b[200~Explain:\rx = 1\r\ry = 2\x1b[201~\r")
    terminal.wait_for(READING)
    terminal.type(f"/save {state}/chat.json\r")
    terminal.wait_for("(saved 2 messages")
    terminal.wait_for(READING)
    terminal.type("/exit\r")
    assert terminal.end() == 0
    question = json.loads((state / "chat.json").read_text(encoding="utf-8"))["messages"][0]["content"]
    assert question == "Explain:\nx = 1\n\ny = 2"


def test_the_history_is_available_in_the_next_conversation() -> None:
    for keys in ("/stats\r", "\x1b[A\r"):
        terminal = Terminal("chat")
        terminal.wait_for(READING)
        terminal.type(keys)
        terminal.wait_for("(no answer yet)")
        terminal.wait_for(READING)
        terminal.type("\x04")
        assert terminal.end() == 0


def test_sigterm_during_an_answer_restores_the_terminal() -> None:
    terminal = Terminal("chat", "--max-tokens", "4000")
    terminal.wait_for(READING)
    terminal.type("Write a very long story.\r")
    terminal.wait_for("story.")
    terminal.wait_for("\n")
    terminal.wait_for(" ")  # the answer has started
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.rest()
    assert terminal.echoes
    assert terminal.end() == 128 + signal.SIGTERM


def test_sigterm_at_the_prompt_restores_the_terminal() -> None:
    terminal = Terminal("chat")
    terminal.wait_for(READING)
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.rest()
    assert terminal.echoes
    assert terminal.end() == 128 + signal.SIGTERM


def test_after_ctrl_c_in_a_single_question_the_shell_gets_a_new_line() -> None:
    terminal = Terminal("chat", "Count to one hundred.", "--max-tokens", "2000")
    if terminal.wait_for(" ").endswith("Loading"):  # on a slow machine
        terminal.wait_for("...\r\n")
        terminal.wait_for(" ")  # the answer has started
    terminal.type("\x03")
    assert terminal.rest().endswith("\r\n")
    assert terminal.end() == 130


@pytest.mark.parametrize("arguments", [["models"], ["--help"], ["generate", "Once", "--max-tokens", "2"]])
def test_closed_standard_output_is_an_error(arguments: list[str]) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *COMMAND, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "tiny-llm: error: standard output is closed: nothing receives the results\n"


def test_closed_standard_output_is_no_error_if_a_file_receives_the_results(tmp_path: Path) -> None:
    arguments = ["generate", "Once", "--max-tokens", "2", "-o", str(tmp_path / "results")]
    command = ["sh", "-c", '"$@" >&-', "sh", *COMMAND, *arguments]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0
    assert (tmp_path / "results").stat().st_size
