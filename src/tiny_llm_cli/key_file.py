"""Read API keys from a file, so that they are not in the list of processes or in the shell's history."""

import os
import stat
from pathlib import Path
from typing import NamedTuple


class KeyFile(NamedTuple):
    """The keys of a file. is_private: False if users other than the owner can access it; True on Windows."""

    keys: tuple[str, ...]
    is_private: bool


def read_keys(file: Path) -> KeyFile:
    """Read the keys of a file, one on each line; blank lines and lines that start with # are ignored.

    Raises OSError if the file cannot be read, and ValueError for a line that cannot be a key, or if there is
    no key. The message names the file and the line, but never has any text of it.
    """
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        lines = opened.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # editors on Windows add a mark
    keys = [
        _key(line.removesuffix(b"\r"), f"{file}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.startswith(b"#")
    ]
    if not keys:
        raise ValueError(f"{file} has no keys: write one on each line")
    is_private = os.name != "posix" or not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o077
    return KeyFile(tuple(keys), is_private)


def _key(line: bytes, place: str) -> str:
    """The key of a line. Raises ValueError, which names the place, for bytes that no key may have."""
    try:
        key = line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{place}: a key must be UTF-8 text") from None  # the cause would show the key
    if key != key.strip():
        raise ValueError(f"{place}: a key must not start or end with white space")
    if any(character < " " or character == "\x7f" for character in key):
        raise ValueError(f"{place}: a key must not have control characters: HTTP headers cannot carry them")
    return key
