"""The file that keeps what a user typed, for the arrow keys of the next conversation.

Only its owner can read it, and it keeps the latest entries only. A file that cannot be read or written is
not an error: the history then lasts for one conversation.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

MAX_ENTRIES = 1000
MAX_CHARACTERS = 1 << 20
MAX_ENTRY = MAX_CHARACTERS // 8  # characters of one entry, such as a pasted log


def history_path() -> Path | None:
    """`chat_history` in $XDG_STATE_HOME/tiny-llm or ~/.local/state/tiny-llm; None without a home folder."""
    state = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state"))
    return state / "tiny-llm" / "chat_history" if state.is_absolute() else None


def open_history(path: Path | None) -> History:
    """The history in a file; creates it with mode 0600, and drops its oldest entries beyond the limits.

    path: None for a history without a file.
    """
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_private(path)
        history = _LastingHistory(str(path))
        entries = list(history.load_history_strings())
        kept = list(_latest(entries))
        if len(kept) < len(entries):
            _rewrite(path, kept)
    except OSError:
        return InMemoryHistory()
    return history


class _LastingHistory(FileHistory):
    """A `FileHistory` that goes on without its file if that fails, for example on a full disk."""

    def load_history_strings(self) -> Iterable[str]:
        """The stored entries, latest first; none if the file cannot be read."""
        try:
            return super().load_history_strings()
        except OSError:
            return ()

    def store_string(self, string: str) -> None:
        """Append an entry to the file, if it can be written."""
        with suppress(OSError):
            super().store_string(string)


def _latest(latest_first: Sequence[str]) -> Iterator[str]:
    """The latest entries that are within the limits, latest first. An entry that is too long is left out."""
    num_characters = 0
    for entry in latest_first[:MAX_ENTRIES]:
        if len(entry) > MAX_ENTRY:
            continue
        num_characters += len(entry)
        if num_characters > MAX_CHARACTERS:
            return
        yield entry


def _rewrite(path: Path, latest_first: Sequence[str]) -> None:
    """Replace the file in one step, so that another conversation never reads half of it."""
    other = path.with_name(f"{path.name}.{os.getpid()}")
    _make_private(other)
    try:
        written = FileHistory(str(other))
        for entry in reversed(latest_first):
            written.store_string(entry)
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


def _make_private(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.chmod(0o600)
