"""Prompts of `generate`: from arguments and from the lines of files, with their sampling parameters."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import typer

from tiny_llm import SamplingParams
from tiny_llm_checkpoints.suggestions import unknown_name

from .engine import AskedSampling
from .lines import Line, parsed

_IDS = ("id", "custom_id")  # fields that come back with the result


@dataclass(frozen=True)
class PromptRequest:
    """A prompt and its sampling parameters.

    prompt: a text or token ids; None for a conversation. messages: the conversation to answer, or None.
    place: the line that the prompt comes from; None for an argument. ids: the fields `id` and `custom_id` of
    its line.
    """

    prompt: str | list[int] | None
    asked: AskedSampling
    messages: list[dict[str, Any]] | None = None
    place: str | None = None
    ids: Mapping[str, Any] = field(default_factory=dict)

    def as_question(self) -> "PromptRequest":
        """The same prompt as the message of a user. Raises ValueError for token ids."""
        if self.messages is not None:
            return self
        if not isinstance(self.prompt, str):
            raise ValueError(f"{self.place}: --chat needs text, not token ids")
        return replace(self, messages=[{"role": "user", "content": self.prompt}])

    @property
    def title(self) -> str:
        """The prompt in one line of text; for a conversation, its last message."""
        if isinstance(self.prompt, list):
            return f"{len(self.prompt)} token ids"
        text = self.prompt if self.messages is None else str(self.messages[-1].get("content"))
        return " ".join((text or "").split())


def from_arguments(arguments: Sequence[str], asked: AskedSampling) -> list[PromptRequest]:
    """The prompts of a command line. Raises a usage error for an empty one."""
    for place, argument in enumerate(arguments, start=1):
        if not argument:
            raise typer.BadParameter(f"prompt {place} is empty", param_hint="PROMPT")
    return [PromptRequest(argument, asked) for argument in arguments]


def from_lines(lines: Sequence[Line], asked: AskedSampling) -> list[PromptRequest]:
    """The prompts of lines. Raises ValueError, which names the line, for a line without a prompt."""
    return [_from_line(line, asked) for line in lines]


def _from_line(line: Line, asked: AskedSampling) -> PromptRequest:
    if not line.is_json:
        return PromptRequest(line.text, asked, place=line.place)
    try:
        return _from_json(line, asked)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{line.place}: {error}") from error


def _from_json(line: Line, asked: AskedSampling) -> PromptRequest:
    """The prompt of a JSON line. Fields other than the prompt and its ids replace parameters of `asked`."""
    found = parsed(line)
    ids = {name: found.pop(name) for name in _IDS if name in found}
    for name, value in ids.items():
        _check_id(name, value)
    if "prompt" in found and "messages" in found:
        raise ValueError('has both "prompt" and "messages", and must have only one of them')
    if "prompt" not in found and "messages" not in found:
        raise ValueError('has neither "prompt" nor "messages"')
    prompt, messages = found.pop("prompt", None), found.pop("messages", None)
    if messages is not None:
        _check_messages(messages)
    elif not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
        raise ValueError(
            f'"prompt" must be a non-empty string or a non-empty list of token ids, not {prompt!r}'
        )
    known = ["prompt", "messages", "id", *(field.name for field in fields(SamplingParams))]
    for name in found:
        if name not in known:
            raise ValueError(unknown_name("field", name, known))
    own = asked.but(**found)
    own.params()  # raises for parameters that cannot work with any model
    return PromptRequest(prompt, own, messages, line.place, ids)


def _check_messages(messages: Any) -> None:
    """Raise ValueError unless this is a list of objects; the chat template checks each message."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ValueError(
            '"messages" must be a non-empty list of objects such as {"role": "user", "content": "Hello"}, '
            f"not {repr(messages)[:100]}"
        )


def _check_id(name: str, value: Any) -> None:
    """Raise ValueError for numbers such as NaN and 1e400, which a line of JSON cannot have."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f'"{name}" has a number that JSON cannot express: {value!r}') from error


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
