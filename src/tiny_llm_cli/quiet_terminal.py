"""A terminal without echo: text typed during an answer is not shown in it, and is read afterwards."""

import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOCAL_FLAGS = 3  # the index in what tcgetattr returns


@contextmanager
def quiet_terminal(fd: int) -> Iterator[None]:
    """Turn echo and line buffering off in this block. Ctrl-C and Ctrl-Z work as before.

    Restores the terminal however the block ends, SIGTERM included. Does nothing if `fd` is not a terminal.
    """
    try:
        before = termios.tcgetattr(fd)
    except termios.error:
        yield
        return
    quiet = list(before)
    quiet[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
    with _exit_on_sigterm():
        termios.tcsetattr(fd, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(fd, termios.TCSANOW, before)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, which runs all `finally` blocks; by default it runs none."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
