"""What a chat request says about tools: which of them the model may call, and whether it must call one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiny_llm_checkpoints.chat_tools import Tool, read_tools
from tiny_llm_checkpoints.plain_json import MessageError

from .errors import ApiError, refused
from .schema import ChatCompletionRequest


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    offered: those that the prompt describes. callable: those that an answer may call: all of them, or the
    one that the request names. is_forced: the answer must consist of calls. is_named: the request names the
    tool, so the answer is one call of it. parallel: an answer may have several calls.
    """

    offered: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    is_forced: bool = False
    is_named: bool = False
    parallel: bool = True

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar must enforce the arguments."""
        return self.is_forced or any(tool.is_strict for tool in self.callable)


def tool_use(body: ChatCompletionRequest) -> ToolUse:
    """Check the tools of a request and its `tool_choice`. With the choice "none", no tools are offered.

    Raises `ApiError`, which names the field at fault.
    """
    try:
        tools = read_tools(body.tools)
    except MessageError as error:
        raise refused_message(error) from error
    choice = body.tool_choice
    if choice == "none" or not tools:
        if choice not in ("none", "auto", None):
            what = "a function" if isinstance(choice, dict) else repr(choice)
            raise refused(f"tool_choice: tools is required with {what}", "tool_choice")
        return ToolUse()
    if not isinstance(choice, dict):
        return ToolUse(tools, tools, choice == "required", parallel=body.parallel_tool_calls)
    name = choice["function"]["name"]
    named = tuple(tool for tool in tools if tool.name == name)
    if not named:
        known = ", ".join(tool.name for tool in tools)
        raise refused(f"tool_choice: {name[:80]!r} is not the name of a tool: {known}", "tool_choice")
    return ToolUse(tools, named, is_forced=True, is_named=True, parallel=False)


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message that has been checked, its parts joined by line breaks."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(one if isinstance(one, str) else str(one.get("text", "")) for one in content)


def refused_message(error: MessageError) -> ApiError:
    """Return the `ApiError` for a bad message or tool."""
    return refused(str(error), error.field, "unsupported_field" if error.unsupported else None)
