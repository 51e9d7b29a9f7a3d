"""The rules that `course-check` applies to the book's chapters.

A chapter has its sections in order, names its day's exercises, parts, interfaces and commands, and shows no
solution before its last section. Reads the chapter's source; the book's build checks the rest.
"""

import re
from collections.abc import Iterator, Sequence

from .labs import labs_of
from .problem import Problem
from .repo import Repo
from .source import body_lines
from .units import Day, Exercise, Part, Unit

RULE = "chapter"
BEFORE_TASKS = ("Where we are", "The problem", "The idea", "Invariants")
AFTER_TASKS = (
    "The tempting wrong version",
    "Run it",
    "How others do it",
    "Questions",
    "Readings",
    "Solutions",
)
SHORT = 12  # characters of a line that says nothing about a solution, such as `return out`
ENOUGH = 2  # lines of a solution in a row that give it away

_HEADING = re.compile(r"^## +(.+?)\s*$", re.MULTILINE)
_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TASK = re.compile(r"\{\{task (\S+)\}\}")


def chapter_problems(repo: Repo, day: Day) -> Iterator[Problem]:
    """Find what is wrong with a day's chapter; nothing if the syllabus names none."""
    if day.chapter is None:
        return
    file = repo.chapters / day.chapter
    if not file.exists():
        yield Problem(RULE, day.id, f"book/src/{day.chapter} does not exist")
        return
    text = file.read_text(encoding="utf-8")
    where = f"book/src/{day.chapter}"
    summary = (repo.chapters / "SUMMARY.md").read_text(encoding="utf-8")
    found = [] if f"]({day.chapter})" in summary else ["SUMMARY.md does not list it"]
    found += _title_problems(day, text)
    found += _section_problems(day, text)
    found += _task_problems(day, text)
    for unit in day.parts or (day,):
        found += _unit_problems(unit, _section_of(unit, text))
    found += [f"does not name `{command}`" for command in _commands(repo, day) if command not in text]
    found += _early_solutions(repo, day, text)
    yield from (Problem(RULE, where, what) for what in found)


def _title_problems(day: Day, text: str) -> list[str]:
    title = f"# {day.id} {day.title}"
    first = text.partition("\n")[0]
    return [] if first == title else [f"starts with {first!r}, expected {title!r}"]


def _section_problems(day: Day, text: str) -> list[str]:
    """The sections are those of every chapter, in order; others may stand between them."""
    tasks = [_part_heading(part) for part in day.parts] or ["Tasks"]
    idea = {"The idea"} if day.parts else set()  # each part may have its own
    wanted = [*(name for name in BEFORE_TASKS if name not in idea), *tasks, *AFTER_TASKS]
    headings = _HEADING.findall(text)
    missing = [f"has no section {name!r}" for name in wanted if name not in headings]
    if missing:
        return missing
    order = [name for name in headings if name in wanted]
    if order != wanted:
        return [f"has the sections {order}, expected {wanted}"]
    return (
        []
        if headings[-1] == "Solutions"
        else [f"ends with the section {headings[-1]!r}, expected 'Solutions'"]
    )


def _part_heading(part: Part) -> str:
    letter = part.entry.letter
    return f"Part {letter}: {part.title} {{#part-{letter}}}"


def _task_problems(day: Day, text: str) -> list[str]:
    """Every exercise is shown once, in order, and the solutions are in the last section."""
    shown, wanted = _TASK.findall(text), [exercise.id for exercise in day.exercises]
    found = [] if shown == wanted else [f"shows the tasks {', '.join(shown)}, expected {', '.join(wanted)}"]
    last = text.rpartition("## Solutions")[2]
    if f"{{{{solutions {day.id}}}}}" not in last or text.count("{{solutions ") != 1:
        found.append(f"{{{{solutions {day.id}}}}} must be in the section 'Solutions', and nowhere else")
    return found


def _section_of(unit: Unit, text: str) -> str:
    """The text of a part's section, or the section with a day's tasks."""
    heading = _part_heading(unit) if isinstance(unit, Part) else "Tasks"
    return text.partition(f"## {heading}")[2].partition("\n## ")[0]


def _unit_problems(unit: Unit, section: str) -> list[str]:
    """A section names its commands, the interfaces, and all its tasks."""
    wanted = [
        f"pdm run start {unit.id}",
        f"pdm run test {unit.id}",
        f"{{{{may_use {unit.id}}}}}",
        *(f"{{{{task {exercise.id}}}}}" for exercise in unit.exercises),
    ]
    return [f"the section of {unit.named} has no {text}" for text in wanted if text not in section]


def _commands(repo: Repo, day: Day) -> list[str]:
    return [f"pdm run try {day.id}", *(f"pdm run lab {name}" for name in labs_of(repo, day))]


def _early_solutions(repo: Repo, day: Day, text: str) -> list[str]:
    """Code blocks before the solutions that contain lines of the reference's code for an exercise."""
    before = text.rpartition("## Solutions")[0]
    blocks = [[line.strip() for line in block.splitlines()] for block in _FENCE.findall(before)]
    return [
        f"shows code of {exercise.name} before the solutions: {line}"
        for exercise in day.exercises
        for block in blocks
        if (line := _given_away(_telling_lines(repo, exercise), block)) is not None
    ]


def _telling_lines(repo: Repo, exercise: Exercise) -> list[str]:
    """The lines of a solution that say something, without indentation."""
    source = (repo.reference / f"{exercise.module}.py").read_text(encoding="utf-8")
    lines = map(str.strip, body_lines(source, exercise.name))
    return [line for line in lines if len(line) >= SHORT and not line.startswith(("#", "raise "))]


def _given_away(solution: Sequence[str], block: Sequence[str]) -> str | None:
    """The first line of a run of solution lines in a block that is long enough, or None."""
    length = min(ENOUGH, len(solution))
    if length == 0:
        return None
    runs = {tuple(solution[place : place + length]) for place in range(len(solution) - length + 1)}
    block = [line for line in block if len(line) >= SHORT]
    for place in range(len(block) - length + 1):
        if tuple(block[place : place + length]) in runs:
            return block[place]
    return None
