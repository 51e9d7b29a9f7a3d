"""What a run of a day's suite came to: which tests failed over a mistake, and which met a blank.

The plugin (`provenance`) writes it in the process of the run; `pdm run test` reads it to say where to begin.
"""

import json
import re
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
    """

    code: int
    failed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    stopped: bool = False
    blank: tuple[str, ...] = ()

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


def read_outcome(file: Path, code: int) -> Outcome:
    """What a run stored that ended with `code`; nothing failed and nothing waits where it stored nothing."""
    if not file.exists():
        return Outcome(code)
    failed, waiting, stopped = json.loads(file.read_text(encoding="utf-8"))
    blank, messages = (tuple(each) for each in zip(*waiting, strict=True)) if waiting else ((), ())
    return Outcome(code, tuple(failed), messages, stopped, blank)


def task_of(test: str) -> int:
    """The number of the task that a test is about; 0 where its name says none."""
    match = _TASK.search(test)
    return int(match[1]) if match else 0


def begin_here(outcome: Outcome, day: Day, at_fault: Exercise | None = None) -> str | None:
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
