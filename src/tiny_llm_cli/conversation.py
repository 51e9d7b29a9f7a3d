"""A conversation: the messages so far, the answers as they stream, and the loop at the prompt."""

import signal
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from types import FrameType
from typing import Self

from tiny_llm import LLM, SamplingParams, TextDelta

HELP = """\
/reset   forget the conversation and start again
/help    show this
/exit    leave (Ctrl-D does too)
Ctrl-C   stop the answer; what was said of it stays"""


class Conversation:
    """Messages with a model. `messages` holds whole turns only: a question and what was said to it.

    cut_short: why the last answer ended before the model was done, in words; None where it did not.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self.cut_short: str | None = None
        self._llm = llm
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> Generator[TextDelta, None, None]:
        """Stream the answer to `text`. Closing the stream ends the answer; what was said of it stays.

        Raises ValueError for a conversation that has outgrown the context, with the figures.
        """
        turn = [{"role": "user", "content": text}]
        tokens = self._encode([*self.messages, *turn])
        room = self._room(len(tokens))
        max_tokens = min(self._params.max_tokens or room, room)
        self.cut_short = None
        said = ""
        try:
            with closing(self._llm.stream(tokens, replace(self._params, max_tokens=max_tokens))) as deltas:
                for delta in deltas:
                    said += delta.text
                    if delta.finish_reason == "length":
                        self.cut_short = self._why_cut(max_tokens)
                    yield delta
        finally:
            if said:
                self.messages += [*turn, {"role": "assistant", "content": said}]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        template = self._llm.chat_template
        if template is None:
            raise ValueError(f"{self._llm.model_name} has no chat template: use `tiny-llm generate`")
        return template.encode(messages, self._llm.tokenizer)

    def _room(self, num_tokens: int) -> int:
        """Tokens left for an answer."""
        limit = self._llm.max_model_len
        if num_tokens >= limit:
            raise ValueError(
                f"the conversation has {num_tokens} tokens and {limit} fit: shorten it or start a new one "
                "(/reset), or raise --max-model-len or --num-blocks where they set the limit"
            )
        return limit - num_tokens

    def _why_cut(self, max_tokens: int) -> str:
        if max_tokens == self._params.max_tokens:
            return f"stopped at --max-tokens {max_tokens}"
        return f"the context of {self._llm.max_model_len} tokens is full: /reset starts a new conversation"


class StopButton:
    """Turns Ctrl-C into a request to stop, while the block runs.

    Once an answer has begun, Ctrl-C only sets `pressed`, so the engine is never left in the middle of a
    step. Before that (a long prompt is read, which can take seconds) it raises KeyboardInterrupt, and so
    does a second Ctrl-C.
    """

    def __init__(self) -> None:
        self.answering = False
        self.pressed = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or not self.answering:
            raise KeyboardInterrupt
        self.pressed = True


def converse(conversation: Conversation, model_name: str) -> None:
    """Read, answer, repeat, until end of file or /exit."""
    import readline  # noqa: F401 (gives input() its editing and its history)

    print(f"{model_name}. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ").strip()
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                _run_command(conversation, line)
            elif line:
                _reply(conversation, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt, or just before an answer
            print("\n(Ctrl-D or /exit leaves)")


def _run_command(conversation: Conversation, line: str) -> None:
    if line == "/reset":
        conversation.reset()
        print("(forgotten)")
    elif line == "/help":
        print(HELP)
    else:
        print(f"{line.split(maxsplit=1)[0]} is no command: /help lists them")


def _reply(conversation: Conversation, text: str) -> None:
    """Stream one answer to the terminal; a mistake of the user's is told and the conversation goes on."""
    try:
        with StopButton() as button, closing(conversation.answer(text)) as answer:
            for delta in answer:
                button.answering = True
                print(delta.text, end="", flush=True)
                if button.pressed:
                    break
        print(f"\n({conversation.cut_short})" if conversation.cut_short and not button.pressed else "")
    except KeyboardInterrupt:
        print()
    except ValueError as error:
        print(f"tiny-llm: error: {error}", file=sys.stderr)
