"""The outcome of a run of a day's suite: which tests failed, and which reached a blank exercise.

The plugin `provenance` writes it in pytest's process; `pdm run test` reads it to say what to fix first. A
second file always names the test that is running, in case the process crashes.
"""

import json
import re
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .units import Day, Exercise, Kernel

OUTCOME_FILE = "TINY_LLM_COURSE_OUTCOME"  # environment variable with the file that the plugin writes
UNFINISHED = 3  # the code of a run whose process ended with 0 before its tests had
_TASK = re.compile(r"::test_task_(\d+)_")


@dataclass(frozen=True)
class Outcome:
    """One run. code: pytest's exit code. failed: ids of tests, and of files that could not be collected.

    waiting: for each test that reached a blank, the blank's message, such as `1.4.1 rms_norm: book, ...`.
    stopped: whether the run stopped early because a test exceeded its time limit. blank: the ids of the
    waiting tests. running: if a signal ended the process, the id of the test or file that was running.
    seconds: how long the run took, with the start of its process; 0 if it was not measured.
    """

    code: int
    failed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    stopped: bool = False
    blank: tuple[str, ...] = ()
    running: str = ""
    seconds: float = 0.0

    @property
    def ended_by(self) -> str:
        """The name of the signal that ended the process, such as SIGSEGV; empty for a normal exit."""
        return signal.Signals(-self.code).name if self.code < 0 else ""

    @property
    def exit_code(self) -> int:
        """The run's exit code as a shell reports it: 128 plus the signal's number after a signal."""
        return 128 - self.code if self.code < 0 else self.code

    def passes(self, exercises: Iterable[Exercise]) -> bool:
        """Whether no test of these exercises failed or waits, given a run that included all of them."""
        tasks = {exercise.task for exercise in exercises}
        return not tasks & set(map(task_of, (*self.failed, *self.blank)))


def write_outcome(
    file: Path, failed: Sequence[str], waiting: Sequence[tuple[str, str]], *, stopped: bool
) -> None:
    """Store a run's outcome for the process that started it.

    waiting: pairs of a test's id and the message of the blank that it reached.
    """
    file.write_text(json.dumps([failed, waiting, stopped]), encoding="utf-8")


def write_running(file: Path, what: str) -> None:
    """Store which test or file is running, next to the outcome `file`, which is written later."""
    _running(file).write_text(what, encoding="utf-8")


def _running(file: Path) -> Path:
    return file.with_suffix(".running")


def read_outcome(file: Path, code: int) -> Outcome:
    """Read the outcome of a run that ended with `code`; without a stored outcome, both lists are empty.

    A run that stored none has not finished, whatever its code: the learner's code may have ended the process.
    """
    running = _running(file).read_text(encoding="utf-8") if code < 0 and _running(file).exists() else ""
    if not file.exists():
        return Outcome(code or UNFINISHED, running=running)
    failed, waiting, stopped = json.loads(file.read_text(encoding="utf-8"))
    blank, messages = (tuple(each) for each in zip(*waiting, strict=True)) if waiting else ((), ())
    return Outcome(code, tuple(failed), messages, stopped, blank, running)


def task_of(test: str) -> int:
    """The number of the task that a test is about; 0 if its name contains none."""
    match = _TASK.search(test)
    return int(match[1]) if match else 0


def signal_report(outcome: Outcome, day: Day) -> list[str]:
    """The lines about a run that a signal ended: the signal, the test, its exercise and what to do."""
    file, _, test = outcome.running.partition("::")
    where = f"in {test}" if test else f"while importing {file}" if file else "before the first test"
    lines = ["", f"{outcome.ended_by} ended Python {where}"]
    one = next((one for one in day.exercises if one.task == task_of(outcome.running)), None)
    kernel = next((k for k in day.kernels if k.id == f"{day.id}.{task_of(outcome.running)}"), None)
    if kernel is not None:
        return [
            *lines,
            f"the test is about {kernel.id} {kernel.file}. Reading or writing past the end of an array can "
            "crash.",
            f"try again: pdm run test {kernel.id} -x; pdm run hint {kernel.id}",
        ]
    if one is None:
        return lines
    return [
        *lines,
        f"the test is about {one.id} {one.name}. "
        "MLX does not check indices: an index out of range can crash.",
        f"MLX is lazy, so the traceback may point past the mistake: read {one.name} in {one.module}.py",
        f"try again: pdm run test {one.id} -x; pdm run hint {one.id}",
    ]


class FirstToFix(NamedTuple):
    """The exercise to look at first, and the line that says so."""

    exercise_id: str
    line: str

    def __str__(self) -> str:
        return self.line


def first_to_fix(outcome: Outcome, day: Day, at_fault: Exercise | Kernel | None = None) -> FirstToFix | None:
    """The task to look at first: the lowest that fails, or else the lowest that is blank.

    at_fault: the exercise or the kernel that makes that task's tests fail, if it is known. Returns None if no
    task is known, for example because a file cannot be imported.
    """
    names = {one.id: one.name for one in day.exercises} | {one.id: one.name for one in day.kernels}
    names |= {} if at_fault is None else {at_fault.id: at_fault.name}
    found = Counter(f"{day.id}.{match[1]}" for test in outcome.failed if (match := _TASK.search(test)))
    says = "fail"
    if not outcome.failed:
        blanks = [message.partition(":")[0].partition(" ") for message in outcome.waiting]
        names |= {task: name for task, _, name in blanks}
        found, says = Counter(task for task, _, _ in blanks), "wait"
    if not found:
        return None
    first = min(found, key=lambda task: [int(part) for part in task.split(".")])
    hinted = first if at_fault is None else at_fault.id
    what = f"{hinted} {names[hinted]}" if hinted in names else hinted
    tests = _tests(found[first], says, "its" if hinted == first else f"{first}'s")
    return FirstToFix(hinted, f"first: {what} ({tests}): pdm run test {first} -x; pdm run hint {hinted}")


def _tests(number: int, says: str, whose: str) -> str:
    """How many tests fail or wait. Failing tests belong to one task; waiting ones may belong to any."""
    of = f" of {whose}" if says == "fail" else ""
    return f"{number}{of} tests {says}" if number > 1 else f"1{of} test{'s' if of else ''} {says}s"
