"""How the served model writes calls of tools and reasoning, and the parsers for its answers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from tiny_llm import StructuredOutputsParams
from tiny_llm_checkpoints.answer_parser import AnswerParser
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.reasoning_parser import ReasoningFormat, ReasoningParser, reasoning_named
from tiny_llm_checkpoints.tokenizer import Tokenizer
from tiny_llm_checkpoints.tool_formats import ToolFormat, format_named
from tiny_llm_checkpoints.tool_grammar import Reasoning, content_grammar, tool_grammar
from tiny_llm_checkpoints.tool_parser import ToolParser

from .answer_form import AnswerForm, composed_form, in_lark, plain_form
from .config import ServerConfig
from .schema import ChatCompletionRequest
from .tool_use import ToolUse

_TAIL = 16  # tokens at the end of a prompt in which a template may begin the reasoning


class ChatFormat(NamedTuple):
    """How one model writes calls and reasoning. None: it does not, or the form is unknown or switched off."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None

    @classmethod
    def of(cls, template: ChatTemplate, config: ServerConfig) -> Self:
        """Return the forms that the operator has chosen, or else those that the template shows."""
        tools, reasoning = template.tool_format, template.reasoning
        if config.tool_call_parser != "auto":
            named = config.tool_call_parser
            tools = None if named == "none" else format_named(named, template.source)
        if config.reasoning_parser != "auto":
            named = config.reasoning_parser
            reasoning = None if named == "none" else reasoning_named(named)
        return cls(tools, reasoning)

    def visible_tokens(self, use: ToolUse) -> tuple[str, ...]:
        """Return the markers that the text must show to the parsers, even if they are control tokens."""
        of_tools = self.tools.markers if self.tools is not None and use.callable else ()
        of_reasoning = () if self.reasoning is None else (self.reasoning.begin, self.reasoning.end)
        return (*of_tools, *of_reasoning)

    def after(
        self, prompt: Sequence[int], tokenizer: Tokenizer, continued: str | None
    ) -> tuple["ChatFormat", bool]:
        """Return the format of an answer to this prompt, and whether the prompt ends within reasoning.

        Without reasoning if the prompt has ended it, or is in the middle of an answer that has none. prompt:
        its tokens. continued: the last message's text if the answer continues it; otherwise None.
        """
        if self.reasoning is None:
            return self, False
        begin, end = self.reasoning.begin, self.reasoning.end
        if continued is None:
            tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
            is_open, is_past = tail.endswith(begin), tail.endswith(end)
        else:
            text = continued.strip()
            starts = text.startswith(begin) or (self.reasoning.is_implied and bool(text))
            is_open = starts and end not in text
            is_past = bool(text) and not is_open
        return (self._replace(reasoning=None) if is_past else self), is_open

    def answer_form(
        self, body: ChatCompletionRequest, use: ToolUse, tokenizer: Tokenizer, *, in_reasoning: bool
    ) -> AnswerForm | None:
        """Return the form that an answer must have; None if any answer is allowed.

        in_reasoning: the prompt ends within reasoning. Raises `ApiError` for tools that are too large to be
        enforced.
        """
        form = body.form
        has_calls = bool(use.callable) and (use.is_constrained or form is not None)
        if not has_calls and (form is None or self.reasoning is None):
            return plain_form(form, body.form_field)
        reasoning = None if self.reasoning is None else Reasoning(self.reasoning, in_reasoning)
        grammar = self._grammar(use, form, reasoning, tokenizer.control_token_ids())
        return composed_form(grammar, None if use.is_forced else form, body.form_field, use)

    def _grammar(
        self,
        use: ToolUse,
        form: StructuredOutputsParams | None,
        reasoning: Reasoning | None,
        control_tokens: Mapping[str, int],
    ) -> str:
        content = None if form is None else in_lark(form)
        if self.tools is None or not use.callable:
            assert content is not None
            assert reasoning is not None
            return content_grammar(content, reasoning, control_tokens)
        return tool_grammar(
            self.tools,
            use.callable,
            is_forced=use.is_forced,
            parallel=use.parallel,
            control_tokens=control_tokens,
            reasoning=reasoning,
            content=content,
        )

    def parser(self, use: ToolUse, *, in_reasoning: bool, is_certain: bool) -> AnswerParser | None:
        """Make the parser of one answer; None if the answer is only content.

        in_reasoning: the prompt ends within reasoning. is_certain: a grammar enforces the form of the calls.
        """
        reasoning = None if self.reasoning is None else ReasoningParser(self.reasoning, is_open=in_reasoning)
        tools = None
        if self.tools is not None and use.callable:
            tools = ToolParser(
                self.tools,
                [tool.name for tool in use.callable],
                as_generated=is_certain,
                only_calls=use.is_forced,
                max_calls=None if use.parallel else 1,
            )
        return None if reasoning is None and tools is None else AnswerParser(reasoning, tools)
