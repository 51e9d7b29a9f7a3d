"""Messages to one prompt, through the chat template that came with the model.

The template is jinja2 source from a model file, so it is untrusted: it runs in `TemplateSandbox`, and renders
the same as in transformers. Only `encode` knows the tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from .template_sandbox import TemplateLimitError, TemplateSandbox, rendering
from .tokenizer import Tokenizer

Message = Mapping[str, str]


class ChatTemplate:
    """One compiled chat template; rendering has no state, so any thread may use it."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compile `source`, in which `bos_token` and `eos_token` are variables. ValueError if it does not."""
        try:
            self._template = TemplateSandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"bad chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # too deep for the parser, too long a number: anything that Python says
            raise ValueError(f"bad chat template: {type(error).__name__}: {str(error)[:200]}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt for `messages`: mappings with "role" and "content", both strings; other keys pass.

        With `add_generation_prompt` it ends where the assistant's answer begins. Further keyword arguments
        are variables of the template.

        Raises ValueError for a bad message, with the template's own words where the template refuses, and
        where it reaches for what it may not have or does more than it may.
        """
        _check(messages)
        variables = {**self._tokens, "tools": None, "documents": None, **kwargs}
        variables |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        try:
            with rendering() as bounded:
                return bounded("".join(map(bounded, self._template.generate(variables))))
        except TemplateLimitError as error:
            raise ValueError(f"the chat template is stopped: {error}") from error
        except Exception as error:  # a template can fail in any way that Python can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses these messages: {reason}") from error

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of the rendered prompt, where only the template's own control tokens are control tokens.

        Equal to `tokenizer.encode(render(...))` unless a message spells out a control token: there it stays
        text, so nobody ends a turn or opens a system turn by typing "<|im_end|>". Raises as `render` does.
        """
        prompt = self.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        texts = [text for message in messages for text in message.values() if isinstance(text, str)]
        typed = [token for token in tokenizer.control_tokens if any(token in text for text in texts)]
        if not typed:
            return tokenizer.encode(prompt)

        # Break what was typed with a character that nothing here holds, so that after rendering the control
        # tokens still in one piece are the template's; then take that character out again.
        mark = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in prompt)
        control = "|".join(re.escape(t) for t in sorted(tokenizer.control_tokens, key=len, reverse=True))
        start = re.compile(f"(?=(?:{control}))(.)", re.DOTALL)
        guarded = [
            {
                key: start.sub(rf"\1{mark}", value) if isinstance(value, str) else value
                for key, value in m.items()
            }
            for m in messages
        ]
        marked = self.render(guarded, add_generation_prompt=add_generation_prompt, **kwargs)
        ids: list[int] = []
        for place, piece in enumerate(re.split(f"({control})", marked)):
            is_control = place % 2 == 1  # re.split puts what the group matched between the rest
            ids += tokenizer.encode(piece.replace(mark, ""), special_tokens=is_control)
        return ids


def _check(messages: Sequence[Message]) -> None:
    """Raise ValueError unless there are messages and each has a role and a content, both strings."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must hold at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{place}] must be a mapping, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{place}] has no {key!r}")
            if not isinstance(message[key], str):
                raise ValueError(
                    f"messages[{place}][{key!r}] must be a string, not {type(message[key]).__name__}"
                )
