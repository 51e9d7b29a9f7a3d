"""What a run of a day's suite came to: which tests failed over a mistake, and which met a blank.

The plugin (`provenance`) writes it in the process of the run; `pdm run test` reads it to say where to begin.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .syllabus import Day

OUTCOME_FILE = "TINY_LLM_COURSE_OUTCOME"  # the variable that tells the plugin where to write
_TASK = re.compile(r"::test_task_(\d+)_")


@dataclass(frozen=True)
class Outcome:
    """One run. code: pytest's. failed: ids of tests, and of files that could not be collected.

    waiting: for each test that met a blank, the blank's message, such as `1.4.1 rms_norm: book, ...`.
    """

    code: int
    failed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


def write_outcome(file: Path, failed: Sequence[str], waiting: Sequence[str]) -> None:
    """Store what a run came to, for the process that started it."""
    file.write_text(json.dumps([failed, waiting]), encoding="utf-8")


def read_outcome(file: Path, code: int) -> Outcome:
    """What a run stored that ended with `code`; nothing failed and nothing waits where it stored nothing."""
    if not file.exists():
        return Outcome(code)
    failed, waiting = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(code, tuple(failed), tuple(waiting))


def begin_here(outcome: Outcome, day: Day) -> str | None:
    """The first task to look at, as one line: the lowest with a mistake, or else the lowest blank.

    None where neither says which task it is, such as a file that cannot be imported.
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
    tests = f"{found[first]} tests {says}" if found[first] > 1 else f"1 test {says}s"
    what = f"{first} {names[first]}" if first in names else first
    return f"first: {what} ({tests}): pdm run test {first} -x; pdm run hint {first}"
