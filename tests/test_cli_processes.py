"""The `tiny-llm` command in processes of its own: pipes, signals, and a terminal."""

import os
import pty
import select
import signal
import subprocess
import termios
import time

import pytest

from command_line import COMMAND, PROCESS_SECONDS


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
