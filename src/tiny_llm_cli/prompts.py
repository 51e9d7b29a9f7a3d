"""Where prompts come from: arguments, text files, JSON lines, standard input."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import typer

from tiny_llm import SamplingParams

from .engine import AskedSampling
from .stdin import read_stdin, stdin_is_terminal

_STDIN = Path("-")


class PromptRequest(NamedTuple):
    """One prompt, as text or token ids, and the sampling parameters it was given."""

    prompt: str | list[int]
    asked: AskedSampling

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a question. ValueError for token ids: a chat template takes text."""
        if not isinstance(self.prompt, str):
            raise ValueError("--chat needs prompts that are text, not token ids")
        return [{"role": "user", "content": self.prompt}]


def read_prompts(
    arguments: Sequence[str], files: Sequence[Path], asked: AskedSampling
) -> list[PromptRequest]:
    """The prompts of a command line, arguments first, then the files in order. Empty lines are skipped.

    Without arguments and files they are the lines of standard input. Raises ValueError naming file and
    line for a line that is no prompt, and a usage error where there is nothing to read.
    """
    for place, argument in enumerate(arguments, start=1):
        if not argument:
            raise typer.BadParameter(f"prompt {place} is empty", param_hint="PROMPT")
    if not arguments and not files:
        if stdin_is_terminal():
            raise typer.BadParameter(
                "there is none: give prompts as arguments, with --file, or on standard input",
                param_hint="PROMPT",
            )
        files = [_STDIN]
    requests = [PromptRequest(argument, asked) for argument in arguments]
    for file in files:
        requests.extend(_read_file(file, asked))
    if not requests:
        raise ValueError(
            f"no prompts in {', '.join('standard input' if f == _STDIN else str(f) for f in files)}"
        )
    return requests


def _read_file(file: Path, asked: AskedSampling) -> Iterator[PromptRequest]:
    try:
        text = read_stdin() if file == _STDIN else file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            try:
                yield _from_json(line, asked) if file.suffix == ".jsonl" else PromptRequest(line, asked)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file}:{number}: {error}") from error


def _from_json(line: str, asked: AskedSampling) -> PromptRequest:
    """A line of a .jsonl file; fields beside `prompt` replace those of `asked`."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(found, dict) or "prompt" not in found:
        raise ValueError('not an object with a "prompt"')
    prompt = found.pop("prompt")
    if not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
        raise ValueError(f'"prompt" must be a text or a list of token ids and not empty, not {prompt!r}')
    known = [field.name for field in fields(SamplingParams)]
    for name in found:
        if name not in known:
            raise ValueError(f"unknown field {name!r}; known: prompt, {', '.join(known)}")
    own = asked.but(**found)
    own.params()  # raises for parameters that no model could run with
    return PromptRequest(prompt, own)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) for item in value)
