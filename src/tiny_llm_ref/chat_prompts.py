"""Prompts from conversations: the model's chat template, with the tokenizer and the context that it needs.

`LLM.chat` and `Engine.chat` both encode conversations here, so they cannot differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .errors import prompt_length_errors

Messages = Sequence[Mapping[str, Any]]


class ChatOptions(NamedTuple):
    """How a conversation becomes a prompt; the names are those of vLLM's `LLM.chat`.

    add_generation_prompt: end the prompt with the start of an answer; None: True unless
        `continue_final_message` is True.
    continue_final_message: end the prompt inside the last message, which the model continues.
    add_special_tokens: add the tokenizer's own special tokens; most templates already write them.
    chat_template_kwargs: variables of the template, such as `{"enable_thinking": False}`.
    tools: functions that the model may call, in OpenAI's format. Its calls are a part of the output's text;
        some models mark them with control tokens, which `skip_special_tokens=False` keeps in the text.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None


class ChatPrompts:
    """Encodes conversations for one model.

    model_name: for error messages. template: None if the model has none. context: the longest prompt + output
    in tokens; None: no limit.
    """

    def __init__(
        self, model_name: str, template: ChatTemplate | None, tokenizer: Tokenizer, context: int | None
    ) -> None:
        self._model_name = model_name
        self._template = template
        self._tokenizer = tokenizer
        self._context = context

    def encode(self, messages: Messages, options: ChatOptions) -> list[int]:
        """The token ids of a conversation's prompt.

        A message is a mapping with "role" and "content": a text, or a list of text parts such as
        `{"type": "text", "text": "hi"}`. The template gets all other fields too.

        Raises ValueError if the model has no chat template; `MessageError`, a ValueError that names the
        message and the field, for anything that is not a conversation and for text that the template drops;
        `RequestTooLargeError` if the prompt leaves no tokens of the context for an answer.
        """
        if self._template is None:
            raise ValueError(f"{self._model_name} has no chat template: use generate instead of chat")
        _check_flags(options)
        with prompt_length_errors():
            return self._template.encode(
                messages, self._tokenizer, **options._asdict(), context=self._context
            )


def _check_flags(options: ChatOptions) -> None:
    """Raise ValueError for a flag that is not a bool."""
    flags = {name: getattr(options, name) for name in ("continue_final_message", "add_special_tokens")}
    if options.add_generation_prompt is not None:
        flags["add_generation_prompt"] = options.add_generation_prompt
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {shown(value)}")
