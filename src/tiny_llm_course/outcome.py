"""What a run of a day's suite came to: which tests failed over a mistake, and which met a blank.

The plugin (`provenance`) writes it in the process of the run; `pdm run test` reads it to say where to begin.
While tests run, a file beside it names the one that runs now: the process may end without another word.
"""

import json
import re
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .units import Day, Exercise

OUTCOME_FILE = "TINY_LLM_COURSE_OUTCOME"  # the variable that tells the plugin where to write
_TASK = re.compile(r"::test_task_(\d+)_")


@dataclass(frozen=True)
class Outcome:
    """One run. code: pytest's. failed: ids of tests, and of files that could not be collected.

    waiting: for each test that met a blank, the blank's message, such as `1.4.1 rms_norm: book, ...`.
    stopped: whether the run ended early because a test was out of time. blank: ids of the tests that wait.
    running: of a process that a signal has ended, the id of the test that ran, or of the file that was read.
    """

    code: int
    failed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    stopped: bool = False
    blank: tuple[str, ...] = ()
    running: str = ""

    @property
    def ended_by(self) -> str:
        """The name of the signal that ended the process, such as SIGSEGV; empty where it ended by itself."""
        return signal.Signals(-self.code).name if self.code < 0 else ""

    @property
    def exit_code(self) -> int:
        """The run's exit code as a shell has it: 128 and more where a signal has ended it."""
        return 128 - self.code if self.code < 0 else self.code

    def passes(self, exercises: Iterable[Exercise]) -> bool:
        """Whether no test of these exercises failed or waits, in a run that had them all."""
        tasks = {exercise.task for exercise in exercises}
        return not tasks & set(map(task_of, (*self.failed, *self.blank)))


def write_outcome(
    file: Path, failed: Sequence[str], waiting: Sequence[tuple[str, str]], *, stopped: bool
) -> None:
    """Store what a run came to, for the process that started it. waiting: a test's id and its blank's
    message."""
    file.write_text(json.dumps([failed, waiting, stopped]), encoding="utf-8")


def write_running(file: Path, what: str) -> None:
    """Store which test runs, or which file is read, beside the outcome `file` that is still to come."""
    _running(file).write_text(what, encoding="utf-8")


def _running(file: Path) -> Path:
    return file.with_suffix(".running")


def read_outcome(file: Path, code: int) -> Outcome:
    """What a run stored that ended with `code`; nothing failed and nothing waits where it stored nothing."""
    running = _running(file).read_text(encoding="utf-8") if code < 0 and _running(file).exists() else ""
    if not file.exists():
        return Outcome(code, running=running)
    failed, waiting, stopped = json.loads(file.read_text(encoding="utf-8"))
    blank, messages = (tuple(each) for each in zip(*waiting, strict=True)) if waiting else ((), ())
    return Outcome(code, tuple(failed), messages, stopped, blank, running)


def task_of(test: str) -> int:
    """The number of the task that a test is about; 0 where its name says none."""
    match = _TASK.search(test)
    return int(match[1]) if match else 0


def signal_report(outcome: Outcome, day: Day) -> list[str]:
    """What is said of a run that a signal has ended: the signal, the test, its exercise and what to do."""
    file, _, test = outcome.running.partition("::")
    where = f"in {test}" if test else f"while {file} was read" if file else "before the first test"
    lines = ["", f"{outcome.ended_by} ended Python {where}"]
    one = next((one for one in day.exercises if one.task == task_of(outcome.running)), None)
    if one is None:
        return lines
    return [
        *lines,
        f"the test is about {one.id} {one.name}. MLX checks no index: one outside of an array can do this.",
        f"Python's lines are where MLX computed, perhaps behind the fault: read {one.module}.py, {one.name}",
        f"again: pdm run test {one.id} -x; pdm run hint {one.id}",
    ]


def first_to_fix(outcome: Outcome, day: Day, at_fault: Exercise | None = None) -> str | None:
    """The first task to look at, as one line: the lowest with a mistake, or else the lowest blank.

    at_fault: the exercise that was found to make that task's tests fail, if it is known. None where nothing
    says which task it is, such as a file that cannot be imported.
    """
    names = {one.id: one.name for one in day.exercises} | {one.id: one.name for one in day.kernels}
    found = Counter(f"{day.id}.{match[1]}" for test in outcome.failed if (match := _TASK.search(test)))
    says = "fail"
    if not outcome.failed:
        blanks = [message.partition(":")[0].partition(" ") for message in outcome.waiting]
        names |= {task: name for task, _, name in blanks}
        found, says = Counter(task for task, _, _ in blanks), "wait"
    if not found:
        return None
    first = min(found, key=lambda task: [int(part) for part in task.split(".")])
    begin = first if at_fault is None else at_fault.id
    what = f"{begin} {names[begin]}" if begin in names else begin
    tests = _tests(found[first], says, "its" if begin == first else f"{first}'s")
    return f"first: {what} ({tests}): pdm run test {first} -x; pdm run hint {begin}"


def _tests(number: int, says: str, whose: str) -> str:
    """How many tests fail or wait. Those that fail are a task's; those of any task may wait for a blank."""
    of = f" of {whose}" if says == "fail" else ""
    return f"{number}{of} tests {says}" if number > 1 else f"1{of} test{'s' if of else ''} {says}s"
