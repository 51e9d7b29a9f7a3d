"""Renders messages into one prompt with the model's own chat template.

The template is jinja2 source from a model file and therefore untrusted: it runs in `TemplateSandbox`. The
result equals that of transformers. `chat_messages` defines what a message may contain. Only `encode` uses a
tokenizer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes

from .chat_messages import ChatMessage, read_messages
from .chat_pieces import split_pieces
from .chat_presence import check_presence
from .chat_tools import Tool, read_tools
from .plain_json import MessageError, check_json
from .reasoning_parser import reasoning_of
from .template_budget import MAX_STEPS, TemplateLimitError
from .template_content import iterates_content
from .template_sandbox import TemplateSandbox, rendering
from .template_text import Disguise
from .template_tools import CallStyle, find_tool_support
from .tokenizer import Tokenizer
from .tool_formats import FALLBACK, ToolFormat, format_of
from .tool_prompt import describe_tools, spell_calls

Message = Mapping[str, Any]
CONTENT_FORMATS = ("auto", "string", "openai")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # never disguised: see `Disguise`
MAX_KWARGS = 100_000  # characters in all template variables of a caller
_MAX_REASON = 300  # characters quoted from a template's own error message
_OWN = {"messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template", "tokenize"}
_OWN |= {"bos_token", "eos_token", "conversation", "tokenizer"}
_PROBE_TEXT = "tiny probe"  # a text that no template contains
_PROBE_STEPS = 50_000  # limit for a rendering that only detects the content format


class ChatTemplate:
    """One compiled chat template. Rendering keeps no state, so threads may share it.

    source: its text. tool_format: the form in which its model writes calls of tools, None if it is unknown.
    reasoning: the form of the model's reasoning, None if it has none. for_tools: the template that renders
    chats with tools: this one, unless the model has one of its own for them.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        content_format: str = "auto",
        tool_source: str | None = None,
    ) -> None:
        """Compile `source`. `bos_token` and `eos_token` are variables in it.

        tool_source: the model's template for chats with tools, if it has one.
        content_format: the form in which the template receives a message's content: "string" for one string,
        "openai" for a list of text parts. "auto" detects it for each role and prefers a string if both work.

        Raises ValueError if the template does not compile, or exceeds the sandbox's limits.
        """
        if content_format not in CONTENT_FORMATS:
            known = ", ".join(CONTENT_FORMATS)
            raise ValueError(f"chat_template_content_format must be one of {known}, not {content_format!r}")
        sandbox = TemplateSandbox()
        try:
            self._template = sandbox.from_string(source)
            tree = sandbox.parse_bounded(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"bad chat template, line {error.lineno}: {str(error.message)[:_MAX_REASON]}"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise ValueError("bad chat template: it is nested too deeply") from error
        except Exception as error:  # Python's compiler may raise anything for the generated source
            raise ValueError(f"bad chat template: {str(error)[:_MAX_REASON]}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._variables = meta.find_undeclared_variables(tree) - set(sandbox.globals)
        self._globals = set(sandbox.globals)
        self._knows_developers = "developer" in source
        given = content_format == "openai"
        self._takes_parts = dict.fromkeys(ROLES, given)
        if content_format == "auto":
            self._detect_formats(tree)
        self._tool_support = find_tool_support(
            self._probe, lambda role, text: self._content(role, (text,)), self.uses_variable("tools")
        )
        self.source = source
        self.tool_format = format_of(source) if self._tool_support.writes_tools else FALLBACK
        self.reasoning = reasoning_of(source)
        self.for_tools = self
        if tool_source is not None:
            self.for_tools = ChatTemplate(
                tool_source, bos_token=bos_token, eos_token=eos_token, content_format=content_format
            )
            self.tool_format = self.for_tools.tool_format

    def uses_variable(self, name: str) -> bool:
        """Whether the template reads a variable of this name."""
        return name in self._variables

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the prompt for `messages`: mappings with "role" and "content"; other keys are passed on.

        The content is a string or a list of text parts; the parts are joined by line breaks if the template
        takes strings. With `add_generation_prompt` the prompt ends where the assistant's answer starts.
        tools: functions that the model may call, in OpenAI's format. Further keyword arguments are variables
        of the template.

        Raises `MessageError` for a bad message, and ValueError if the template raises an error (which is
        quoted), uses what the sandbox forbids, or exceeds its limits.
        """
        offered = read_tools(tools)
        own = self.for_tools if offered else self
        spelled = own._spelled(read_messages(messages), offered, None)
        turns = [own._as_template(message) for message in spelled]
        return own._render(turns, own._with_tools(own._checked(kwargs), offered), add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_format: ToolFormat | None = None,
        roles: Collection[str] | None = None,
        context: int | None = None,
    ) -> list[int]:
        """Token ids of the rendered prompt. Only the template writes control tokens; messages cannot.

        Equal to `tokenizer.encode(render(...))` unless a message or an argument spells a control token. Such
        text is encoded as plain text, and no other token of the prompt changes: a user who types "<|im_end|>"
        does not end the message.

        add_generation_prompt: end the prompt where the assistant's answer starts. None means True unless
        `continue_final_message` is set.
        continue_final_message: end the prompt with the last message's text, which the model continues.
        add_special_tokens: add the tokenizer's own prefix and suffix, such as a beginning-of-sequence token;
        most templates write it themselves.
        chat_template_kwargs: variables of the template.
        tools: functions that the model may call, in OpenAI's format. A template that does not write tools, or
        calls, gets them as text: `tool_prompt`.
        tool_format: the form of calls in that text; None: the usual one.
        roles: the accepted roles; None accepts any.
        context: as in `Tokenizer.encode`.

        Raises ValueError as `render` and `Tokenizer.encode` do, and `MessageError` if the template drops a
        text that `check_presence` requires, if a text contains a control token and the template changes that
        text, or if `add_generation_prompt` and `continue_final_message` are both true.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise MessageError("continue_final_message", "cannot be true together with add_generation_prompt")
        conversation, offered = read_messages(messages, roles=roles), read_tools(tools)
        if continue_final_message and conversation[-1].calls:
            raise MessageError(
                "continue_final_message", "the last message has calls of tools, so it is complete"
            )
        own = self.for_tools if offered else self
        variables = own._with_tools(own._checked(chat_template_kwargs or {}), offered)
        spelled = own._spelled(conversation, offered, tool_format)
        turns = [own._as_template(message) for message in spelled]
        plain = own._render(turns, variables, add_generation_prompt)
        given = _texts([turns, variables])
        disguise = Disguise(tokenizer.control_tokens, [*given, plain])
        hidden = own._render_hidden(turns, variables, add_generation_prompt, disguise)
        # They differ if the template inspects a text in a way that the disguise does not survive.
        same = disguise.show(hidden) == plain
        check_presence(conversation, plain)
        end = own._end_of_last(turns, variables, plain, disguise) if continue_final_message else len(plain)
        if not _is_typed(plain, hidden, tokenizer.control_tokens):
            return tokenizer.encode(plain[:end], add_special_tokens=add_special_tokens, context=context)
        if not same:
            raise MessageError(
                "messages", "the template changes a text that contains a control token: remove the token"
            )
        hidden = hidden[:end]
        pieces = [disguise.show(piece) for piece in split_pieces(hidden, tokenizer.control_tokens)]
        return tokenizer.encode_pieces(pieces, add_special_tokens=add_special_tokens, context=context)

    def _as_template(self, message: ChatMessage) -> dict[str, Any]:
        """A message in the form that this template takes. Templates without a developer role get "system"."""
        role = message.role
        if role == "developer" and not self._knows_developers:
            role = "system"
        content = self._content(role, message.parts)
        if not message.calls:
            return {**message.fields, "content": content, "role": role}
        style = self._tool_support.calls or CallStyle(takes_objects=True, takes_null=False)
        calls = [call.as_template(takes_objects=style.takes_objects) for call in message.calls]
        content = None if style.takes_null and not message.parts else content
        return {**message.fields, "content": content, "tool_calls": calls, "role": role}

    def _content(self, role: str, texts: Sequence[str]) -> Any:
        """The content of a message: a string, or parts if the template takes parts for this role."""
        if self._takes_parts.get(role, self._takes_parts["user"]):
            return [{"type": "text", "text": text} for text in texts]
        return "\n".join(texts)

    def _spelled(
        self, messages: list[ChatMessage], tools: Sequence[Tool], form: ToolFormat | None
    ) -> list[ChatMessage]:
        """The messages with what the template does not write itself as text: tools, calls and results."""
        form = form or self.tool_format or FALLBACK
        if self._tool_support.calls is None and any(message.calls for message in messages):
            messages = spell_calls(messages, form)
        if tools and not self._tool_support.writes_tools:
            messages = describe_tools(messages, tools, form)
        return messages

    def _with_tools(self, variables: Mapping[str, Any], tools: Sequence[Tool]) -> Mapping[str, Any]:
        """The variables with the tools, if the template writes them itself."""
        if not tools or not self._tool_support.writes_tools:
            return variables
        return {**variables, "tools": [tool.fields for tool in tools]}

    def _probe(self, turns: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """Render messages that only show what the template does. Raises as `_render` does."""
        return self._render(turns, variables, add_generation_prompt=True, max_steps=_PROBE_STEPS)

    def _checked(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Check the caller's variables: plain JSON, and none of the template's own names."""
        if not isinstance(kwargs, Mapping):
            raise MessageError("chat_template_kwargs", f"must be an object, not {type(kwargs).__name__}")
        for name in kwargs:
            if name in _OWN or name in self._globals:
                raise MessageError(f"chat_template_kwargs.{name[:40]}", "cannot be set here")
        check_json(kwargs, "chat_template_kwargs")
        size = sum(map(len, _texts([kwargs])))
        if size > MAX_KWARGS:
            raise MessageError(
                "chat_template_kwargs", f"has {size} characters, expected at most {MAX_KWARGS}"
            )
        return kwargs

    def _render(
        self,
        turns: list[dict[str, Any]],
        variables: Mapping[str, Any],
        add_generation_prompt: bool,
        disguise: Disguise | None = None,
        max_steps: int = MAX_STEPS,
    ) -> str:
        given = {**self._tokens, "tools": None, "documents": None, **variables}
        given |= {"messages": turns, "add_generation_prompt": add_generation_prompt}
        try:
            with rendering(disguise, max_steps) as bounded:
                return bounded("".join(self._template.generate(given)))
        except TemplateLimitError as error:
            raise ValueError(f"the chat template was stopped: {error}") from error
        except Exception as error:  # a template's code can raise anything
            reason = " ".join(str(error)[:_MAX_REASON].split()) or type(error).__name__
            raise ValueError(f"the chat template rejects these messages: {reason}") from error

    def _render_hidden(
        self,
        turns: list[dict[str, Any]],
        variables: Mapping[str, Any],
        add_generation_prompt: bool,
        disguise: Disguise,
    ) -> str:
        """Render with every text in disguise, apart from the well-known role names.

        Returns "" if the template fails on the disguised texts.
        """
        hidden = [
            {**disguise.hide_all(turn), **({"role": turn["role"]} if turn["role"] in ROLES else {})}
            for turn in turns
        ]
        try:
            return self._render(hidden, disguise.hide_all(variables), add_generation_prompt, disguise)
        except ValueError:
            return ""

    def _end_of_last(
        self, turns: list[dict[str, Any]], variables: Mapping[str, Any], plain: str, disguise: Disguise
    ) -> int:
        """The position in the prompt where the last message's text ends, found by appending a mark to it."""
        last, mark = turns[-1], disguise.mark
        content = last["content"]
        if isinstance(content, str):
            marked: Any = content + mark
        else:
            *others, final = content or [{"type": "text", "text": ""}]
            marked = [*others, {**final, "text": final["text"] + mark}]
        before, found, _ = self._render(
            [*turns[:-1], {**last, "content": marked}], variables, False
        ).rpartition(mark)
        for start in (before, before.rstrip()):  # a template may strip the text
            if found and plain.startswith(start):
                return len(start)
        raise MessageError(
            "continue_final_message", "the template drops or changes the end of the last message's text"
        )

    def _detect_formats(self, tree: nodes.Template) -> None:
        """Detect each role's content format by rendering; if nothing renders, from the syntax tree."""
        by_reading = iterates_content(tree)
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}
        around: dict[str, tuple[list[Message], list[Message]]] = {
            "user": ([], []),
            "system": ([], [user]),
            "developer": ([], [user]),
            "assistant": ([user], [user]),
            "tool": ([user, answer], []),
        }
        for role, (before, after) in around.items():
            probe: list[Message] = [*before, {"role": role, "content": _PROBE_TEXT}, *after]
            default = self._takes_parts["user"] if role != "user" else by_reading
            self._takes_parts[role] = self._needs_parts(probe, role, default)

    def _needs_parts(self, probe: list[Message], role: str, default: bool) -> bool:
        """Whether the template renders the probe's text only if the content is a list of parts."""
        for takes_parts in (False, True):
            self._takes_parts[role] = takes_parts
            turns = [self._as_template(message) for message in read_messages(probe)]
            try:
                if _PROBE_TEXT in self._probe(turns, {}):
                    return takes_parts
            except ValueError:
                continue
        return default


def _is_typed(plain: str, hidden: str, control_tokens: Sequence[str]) -> bool:
    """Whether a message, not the template, spells a control token of the prompt."""
    return any(plain.count(token) != hidden.count(token) for token in control_tokens)


def _texts(values: list[Any]) -> list[str]:
    """All strings nested in values of plain JSON, keys included."""
    found: list[str] = []
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            left += value
    return found
