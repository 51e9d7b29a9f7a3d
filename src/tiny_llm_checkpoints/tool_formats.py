"""The forms in which models write calls of tools, under vLLM's names for their parsers.

Knows nothing of how text is parsed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .errors import ConfigError
from .suggestions import unknown_name

NAME = "\0"  # stands for a function's name in `ToolFormat.head`


class Call(NamedTuple):
    """A call to write: a function's name, and the JSON text of its arguments."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls: opening, calls with a separator between them, closing.

    A call is head, arguments, tail; `NAME` in the head stands for the function's name. begin: the marker that
    starts calls; "" if they start the answer. optional: a marker that may precede such calls. end: the marker
    that ends calls. Opening, separator and closing contain begin and end.

    >>> SMOLLM2.written([Call("f", '{"a": 1}'), Call("g", "{}")])
    '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]</tool_call>'
    """

    name: str
    opening: str
    separator: str
    closing: str
    head: str
    tail: str
    begin: str = ""
    optional: str = ""
    end: str = ""

    def written(self, calls: Iterable[Call]) -> str:
        """Return the text of calls, at least one, as the model writes it."""
        texts = [self.head_of(call.name) + call.arguments + self.tail for call in calls]
        return self.opening + self.separator.join(texts) + self.closing

    def head_of(self, name: str) -> str:
        """Return what precedes the arguments of a call of this function."""
        return self.head.replace(NAME, name)

    @property
    def names_first(self) -> bool:
        """Whether the name stands before the arguments, not in a JSON object with them."""
        return not self.head.startswith("{")

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers, without empty ones; some vocabularies have control tokens for them."""
        found = (self.begin, self.optional, self.end, "[ARGS]" if self.names_first else "")
        return tuple(marker for marker in found if marker)


_ARGUMENTS = '{"name": "' + NAME + '", "arguments": '
HERMES = ToolFormat(
    "hermes",
    opening="<tool_call>\n",
    separator="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
    head=_ARGUMENTS,
    tail="}",
    begin="<tool_call>",
    end="</tool_call>",
)
SMOLLM2 = ToolFormat(
    "smollm2",
    opening="<tool_call>[",
    separator=", ",
    closing="]</tool_call>",
    head=_ARGUMENTS,
    tail="}",
    begin="<tool_call>",
    end="</tool_call>",
)
LLAMA3 = ToolFormat(
    "llama3_json",
    opening="",
    separator="; ",
    closing="",
    head='{"name": "' + NAME + '", "parameters": ',
    tail="}",
    optional="<|python_tag|>",
)
MISTRAL = ToolFormat(
    "mistral",
    opening="[TOOL_CALLS][",
    separator=", ",
    closing="]",
    head=_ARGUMENTS,
    tail="}",
    begin="[TOOL_CALLS]",
)
MISTRAL_ARGS = ToolFormat(  # of newer Mistral models
    "mistral",
    opening="[TOOL_CALLS]",
    separator="[TOOL_CALLS]",
    closing="",
    head=NAME + "[ARGS]",
    tail="",
    begin="[TOOL_CALLS]",
)
FORMATS = {one.name: one for one in (HERMES, LLAMA3, MISTRAL, SMOLLM2)}
FALLBACK = SMOLLM2  # for templates that do not write tools: `tool_prompt` describes them in this form
# They show that a template with a known marker writes calls that are not JSON.
_NOT_JSON = ("<function=", "<arg_key>", "<parameter=")


def format_of(template: str) -> ToolFormat | None:
    """Return the form of the calls that a chat template writes, found by its markers; None: not a known one.

    >>> format_of("... <tool_call> ... </tool_call> ...").name
    'hermes'
    """
    if "[TOOL_CALLS]" in template:
        return _mistral_of(template)
    if "<tool_call>" in template:
        if any(sign in template for sign in _NOT_JSON):
            return None
        return SMOLLM2 if "<tool_call>[" in template else HERMES
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template
    return LLAMA3 if is_llama or "<|python_tag|>" in template else None


def format_named(name: str, template: str = "") -> ToolFormat:
    """Return the form with vLLM's name for its parser. Raises `ConfigError` for an unknown name.

    template: the model's, which chooses between the two forms of Mistral.
    """
    if name not in FORMATS:
        raise ConfigError(unknown_name("tool-call parser", name, FORMATS))
    found = FORMATS[name]
    return _mistral_of(template) if found is MISTRAL else found


def _mistral_of(template: str) -> ToolFormat:
    return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
