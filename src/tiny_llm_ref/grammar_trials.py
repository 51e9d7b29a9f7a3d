"""Tries grammars in another process (`grammar_trial_program`): a hostile one can only end that process."""

import json
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from select import select
from subprocess import DEVNULL, PIPE, Popen
from threading import Lock
from weakref import finalize

from .resources import requiring

PROGRAM = Path(__file__).with_name("grammar_trial_program.py")
PATIENCE = 30.0  # seconds until an answer; on an idle machine a trial takes at most half a second
TOO_COSTLY = "it is too large or too deep: it takes more than 0.5 s, 48 MiB or the stack to compile"


class GrammarTrials:
    """A process that tries grammars, started on first use and again after it has ended.

    num_tokens: the size of the vocabulary. control: its control tokens, which grammars may name: id to name.
    ends: its end-of-sequence tokens. Any number of threads may use it; trials run one after the other.
    """

    def __init__(self, num_tokens: int, control: Mapping[int, str], ends: Seq[int]) -> None:
        self._vocabulary = {"num_tokens": num_tokens, "control": dict(control), "ends": list(ends)}
        self._lock = Lock()
        self._process: Popen[str] | None = None
        self._owner = 0  # the id of the process that started it: a fork must not use its pipes
        self._ender: finalize[..., GrammarTrials] | None = None  # ends it, at the latest at exit

    def reason_to_refuse(self, source: str, limits: Mapping[str, object]) -> str:
        """Return "" if a grammar can be compiled, else the library's reason to refuse it or `TOO_COSTLY`.

        source: the grammar as the library takes it. limits: the arguments of its `LLParserLimits`. Raises
        `OutOfResourcesError` if the process cannot be started.
        """
        with self._lock:
            process = self._running()
            answer = _ask(process, {"source": source, "limits": dict(limits)})
            if answer is None:
                self._end()
                return TOO_COSTLY
            return answer

    def close(self) -> None:
        """End the process. A later trial starts a new one."""
        with self._lock:
            self._end()

    def _running(self) -> "Popen[str]":
        """The process, started if there is none, if it has ended, or if this process is a fork."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        with requiring("the process that tries grammars"):
            self._process = _start()
            _write_line(self._process, self._vocabulary)
        self._owner = os.getpid()
        self._ender = finalize(self, _end_process, self._process, self._owner)
        return self._process

    def _end(self) -> None:
        self._process = None
        if self._ender is not None:
            self._ender()  # forgets the process too


def _start() -> "Popen[str]":
    """Start the process, in its own session, so that Ctrl-C in a terminal does not reach it."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return Popen(
        [sys.executable, str(PROGRAM)],
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def _write_line(process: "Popen[str]", line: Mapping[str, object]) -> bool:
    """Write a line to the process; False if it has ended."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(line) + "\n")
        process.stdin.flush()
    except OSError:
        return False
    return True


def _ask(process: "Popen[str]", line: Mapping[str, object]) -> str | None:
    """Write a line and return the answer; None if the process has ended, or takes longer than `PATIENCE`."""
    assert process.stdout is not None
    if not _write_line(process, line):
        return None
    is_ready = select([process.stdout], [], [], PATIENCE)[0]
    answer = process.stdout.readline() if is_ready else ""
    return str(json.loads(answer)) if answer.endswith("\n") else None


def _end_process(process: "Popen[str]", owner: int) -> None:
    """End a process that this process started; a second call does nothing."""
    if owner == os.getpid():
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
