"""Checks every command of the chapters: the program, the name, the day or exercise, and the options exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tiny_llm_course.app import command as course_app
from tiny_llm_course.errors import CourseError
from tiny_llm_course.repo import Repo
from tiny_llm_course.syllabus import Syllabus, read_syllabus

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(pdm run|tiny-llm)(?= |$)")
DAY_COMMANDS = {"start", "test", "try", "diff", "compare", "skip", "reset", "restore"}


class Found(NamedTuple):
    """A command of a chapter, with its line."""

    chapter: str
    line: int
    command: str


def command_problems(sources: Path) -> list[str]:
    """A line for each command that could not run."""
    checker = Checker.of_the_project()
    found = (one for chapter in sorted(sources.rglob("*.md")) for one in commands_of(chapter, sources))
    return [
        f"{one.chapter}:{one.line}: `{one.command}`: {problem}"
        for one in found
        for problem in checker.problems(one.command)
    ]


def commands_of(chapter: Path, sources: Path) -> Iterator[Found]:
    """The commands in a chapter's console blocks, after `$ `, and in its code spans."""
    text, name = chapter.read_text(encoding="utf-8"), str(chapter.relative_to(sources))
    for block in _FENCE.finditer(text):
        if block[1] not in ("console", "sh"):
            continue
        line = text.count("\n", 0, block.start()) + 2
        for place, shown in enumerate(block[2].splitlines()):
            command = shown.removeprefix("$ ")
            if _COMMAND.match(command):
                yield Found(name, line + place, re.sub(r"\s+# .*$", "", command).rstrip(" \\"))
    without = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in _SPAN.finditer(without):
        if _COMMAND.match(span[1]):
            yield Found(name, without.count("\n", 0, span.start()) + 1, span[1])


class Checker:
    """Knows the project's commands. scripts: of `pdm run`. labs, benches: their names."""

    def __init__(self, syllabus: Syllabus, scripts: set[str], labs: set[str], benches: set[str]) -> None:
        self._syllabus, self._scripts = syllabus, scripts
        self._names = {"lab": labs, "bench": benches}
        self._course = course_app()

    @classmethod
    def of_the_project(cls) -> "Checker":
        """For this checkout."""
        repo = Repo.here()
        project = tomllib.loads((repo.root / "pyproject.toml").read_text(encoding="utf-8"))
        labs = {file.stem.removeprefix("lab_") for file in repo.labs.glob("lab_*.py")}
        benches = {file.stem for file in (repo.root / "benches").glob("*.py")}
        benches |= {"latency", "throughput", "serve"}
        return cls(read_syllabus(repo.syllabus), set(project["tool"]["pdm"]["scripts"]), labs, benches)

    def problems(self, command: str) -> list[str]:
        """What is wrong with a command; empty if nothing is. Placeholders in capitals are accepted."""
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        if words[0] == "tiny-llm":
            return _tiny_llm_problems(words[1:])
        if len(words) < 3:
            return []
        name, arguments = words[2], words[3:]
        if name not in self._scripts:
            return [f"`pdm run` has no {name!r}"]
        if name in self._course.commands:
            return self._course_problems(name, arguments)
        if name in self._names and arguments and not arguments[0].isupper():
            known = self._names[name]
            return [] if arguments[0] in known else [f"there is no {name} {arguments[0]!r}"]
        return _tiny_llm_problems([name, *arguments]) if name in ("chat", "generate", "serve") else []

    def _course_problems(self, name: str, arguments: list[str]) -> list[str]:
        problems = _option_problems(self._course.commands[name], arguments)
        what = next((one for one in arguments if not one.startswith("-")), None)
        if what is None or what.isupper():
            return problems
        try:
            if name == "hint" and what.count(".") == 2:
                self._syllabus.exercise(what)
            elif name == "hint" and not what[-1].isalpha():
                problems.append(f"{what} is not an exercise such as 1.1.2, or a part such as 3.2b")
            elif name in DAY_COMMANDS or name == "hint":
                self._syllabus.unit(what)
        except CourseError as error:
            problems.append(str(error))
        return problems


def _tiny_llm_problems(words: list[str]) -> list[str]:
    from tiny_llm_cli.app import command

    app = command()
    if not words or words[0].isupper():
        return []
    if words[0].startswith("-"):
        return _option_problems(app, words)
    if words[0] not in app.commands:
        return [f"`tiny-llm` has no {words[0]!r}"]
    return _option_problems(app.commands[words[0]], words[1:])


def _option_problems(command: object, arguments: list[str]) -> list[str]:
    """The options that a command does not have. Those of pytest (`test -k`) pass through."""
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}  # type: ignore[attr-defined]
    known |= {"--help", "-h"}
    if getattr(command, "context_settings", {}).get("ignore_unknown_options"):
        return []
    if hasattr(command, "commands"):
        return []
    options = (one.partition("=")[0] for one in arguments if one.startswith("-") and one != "-")
    return [f"unknown option {one}" for one in options if one not in known]
