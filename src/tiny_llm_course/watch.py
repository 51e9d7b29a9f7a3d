"""`pdm run test --watch`: runs the tests of a day or a part again after every save, and reads single keys.

Keys are read only between runs, so that a debugger in a run has the terminal.
"""

import os
import select
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .repo import Repo

POLL_SECONDS = 0.3
FAILED = 1
AGAIN, QUIT = "r", "q"
CLEAR = "\x1b[2J\x1b[H"


class Key(NamedTuple):
    """A key's description, in a word or two, and its action."""

    about: str
    action: Callable[[], None]


class Keyboard:
    """Single keys from a terminal. Without a terminal on standard input there are none."""

    def __init__(self) -> None:
        self._saved: list[Any] | None = None

    def listen(self) -> None:
        """Let keys arrive without Enter and without echo."""
        if self._saved is None and sys.stdin.isatty():
            self._saved = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)

    def stop(self) -> None:
        """Restore the terminal."""
        if self._saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)
            self._saved = None

    def pressed(self) -> str:
        """The key that was pressed, in lower case; empty if there was none."""
        if self._saved is None or not select.select([sys.stdin], [], [], 0)[0]:
            return ""
        return os.read(sys.stdin.fileno(), 1).decode(errors="ignore").lower()


def watch(
    repo: Repo,
    command: Sequence[str],
    polls: Iterable[bool],
    keys: Mapping[str, Key] | None = None,
    keyboard: Keyboard | None = None,
) -> int:
    """Run a command, and again after every save, until `polls` ends or q is pressed.

    A save stops a run that is still going, which may be an endless loop. polls: yields at each poll whether a
    file was saved since the previous one. keys: the actions of other keys. Returns the last
    run's exit code.
    """
    code: int | None = None
    keys, keyboard = keys or {}, keyboard or Keyboard()
    process = _start(command)
    try:
        for saved in polls:
            key = keyboard.pressed()
            if key == QUIT:
                break
            if saved or key == AGAIN:
                if process.poll() is None:
                    print("file saved: this run is stopped, and a new one starts", flush=True)
                _end(process)
                keyboard.stop()
                process, code = _start(command), None
            elif key in keys:
                keys[key].action()
            elif code is None and (code := process.poll()) is not None:
                keyboard.listen()
                print(_what_to_do(repo, keys), flush=True)
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it too, and it prints the line that was running
        raise
    finally:
        keyboard.stop()
        _end(process)
    return FAILED if code is None else code


def _what_to_do(repo: Repo, keys: Mapping[str, Key]) -> str:
    """The line under a finished run: save a file, or press a key."""
    line = f"watching {repo.shown(repo.overlay)}: save a file to test again, Ctrl-C to stop"
    if not sys.stdin.isatty():
        return line
    named = [*(f"{key} {one.about}" for key, one in keys.items()), f"{AGAIN} test again", f"{QUIT} quit"]
    return f"{line}; keys: {', '.join(named)}"


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a run, on a terminal at the top of an empty screen."""
    if sys.stdout.isatty():
        print(CLEAR, end="", flush=True)
    return subprocess.Popen(command)


def saves(repo: Repo) -> Iterator[bool]:
    """Yield at each poll whether a file of the overlay was saved; never ends."""
    before = _times(repo)
    while True:
        time.sleep(POLL_SECONDS)
        now = _times(repo)
        yield now != before
        before = now


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a run, which then stops its pytest process."""
    if process.poll() is None:
        process.terminate()
    process.wait()


def _times(repo: Repo) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in repo.overlay.glob("*.py")}
