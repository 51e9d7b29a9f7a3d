"""Standard input: a terminal, a pipe, a file, or closed (Python then sets `sys.stdin` to None)."""

import os
import select
import stat
import sys


def stdin_is_terminal() -> bool:
    """Whether standard input is a terminal, where a user can type."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_stdin() -> str:
    """Read all of standard input as UTF-8 text; empty if it is closed.

    A byte order mark is dropped and "\\r\\n" becomes "\\n". Raises ValueError with the offset of the first
    byte that is not UTF-8.
    """
    if sys.stdin is None:
        return ""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # a StringIO, which already holds text
        return sys.stdin.read()
    data: bytes = binary.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def stdin_has_data(timeout: float) -> bool:
    """Whether a pipe or a file is attached to standard input and has data, or ends, within `timeout` seconds.

    False for a terminal, for /dev/null and for closed standard input. Raises TimeoutError for a pipe in which
    nothing arrives: the program at its other end may never write or close it.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or not a file
        return False
    if stat.S_ISCHR(mode):  # a terminal or /dev/null
        return False
    if not stat.S_ISREG(mode) and not select.select([sys.stdin], [], [], timeout)[0]:
        raise TimeoutError(f"no data in the pipe for {timeout:g} s")
    return True
