"""`pdm run test --watch`: runs the tests of a day or a part again after every save."""

import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence

from .repo import Repo

POLL_SECONDS = 0.3
FAILED = 1


def watch(repo: Repo, command: Sequence[str], polls: Iterable[bool]) -> int:
    """Run a command, and again after every save, until `polls` ends; returns the last run's exit code.

    A save stops a run that is still going, which may be an endless loop. polls: yields at each poll whether a
    file was saved since the previous one.
    """
    code: int | None = None
    process = subprocess.Popen(command)
    try:
        for saved in polls:
            if saved:
                if process.poll() is None:
                    print("file saved: this run is stopped, and a new one starts", flush=True)
                _end(process)
                process, code = subprocess.Popen(command), None
            elif code is None and (code := process.poll()) is not None:
                print(
                    f"watching {repo.shown(repo.overlay)}: save a file to test again, Ctrl-C to stop",
                    flush=True,
                )
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it too, and it prints the line that was running
        raise
    finally:
        _end(process)
    return FAILED if code is None else code


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
