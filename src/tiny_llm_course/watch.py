"""`pdm run test --watch`: the tests of a day or a part, run again after every save."""

import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence

from .repo import Repo

POLL_SECONDS = 0.3
FAILED = 1


def watch(repo: Repo, command: Sequence[str], polls: Iterable[bool]) -> int:
    """Run a command, and again after every save, until `polls` ends; the exit code of the last run.

    A run that is under way when a file is saved is ended first: it may be an endless loop. polls: at each
    look, whether a file was saved since the look before.
    """
    code: int | None = None
    process = subprocess.Popen(command)
    try:
        for saved in polls:
            if saved:
                if process.poll() is None:
                    print("saved: this run is ended, and another begins", flush=True)
                _end(process)
                process, code = subprocess.Popen(command), None
            elif code is None and (code := process.poll()) is not None:
                print(
                    f"watching {repo.shown(repo.overlay)}: save a file to test again, Ctrl-C to stop",
                    flush=True,
                )
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it too: it says where it stood
        raise
    finally:
        _end(process)
    return FAILED if code is None else code


def saves(repo: Repo) -> Iterator[bool]:
    """At each look whether a file of the overlay was saved; never ends (Ctrl-C ends it)."""
    before = _times(repo)
    while True:
        time.sleep(POLL_SECONDS)
        now = _times(repo)
        yield now != before
        before = now


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run, which ends the pytest that it has begun."""
    if process.poll() is None:
        process.terminate()
    process.wait()


def _times(repo: Repo) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in repo.overlay.glob("*.py")}
