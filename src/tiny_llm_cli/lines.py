"""The lines of prompt files and of standard input, each with the place that an error names."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .stdin import read_stdin

STDIN = Path("-")
_KEYS = {"prompt", "messages", "body"}  # every JSON object that is a request has one of them


class Line(NamedTuple):
    """A line that is not empty. place: `prompts.txt:3`; is_json: the line must be read as JSON."""

    place: str
    text: str
    is_json: bool


def read_lines(files: Sequence[Path]) -> list[Line]:
    """The lines of the files in order, without empty ones; `-` is standard input.

    The lines of a file are JSON if its name ends in `.jsonl`, or if its first line is a JSON object with one
    of the keys "prompt", "messages" and "body". Raises ValueError for a file that is not UTF-8.
    """
    return [line for file in files for line in _lines_of(file)]


def name_of(file: Path) -> str:
    """The name of a file in a message."""
    return "standard input" if file == STDIN else str(file)


def parsed(line: Line) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError for anything else."""
    try:
        found = json.loads(line.text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _lines_of(file: Path) -> list[Line]:
    try:
        text = read_stdin() if file == STDIN else file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name_of(file)}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = enumerate(text.replace("\r\n", "\n").split("\n"), start=1)
    lines = [Line(f"{name_of(file)}:{number}", line, False) for number, line in numbered if line.strip()]
    is_json = file.suffix == ".jsonl" or (bool(lines) and _asks_in_json(lines[0]))
    return [line._replace(is_json=is_json) for line in lines]


def _asks_in_json(line: Line) -> bool:
    """Whether a line is a request in JSON, not a plain text prompt."""
    if not line.text.lstrip("\ufeff \t").startswith("{"):
        return False
    try:
        return not _KEYS.isdisjoint(parsed(line))
    except ValueError:
        return False
