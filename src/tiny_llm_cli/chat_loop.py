"""The loop of a conversation at a terminal: read a text, run it as a command or stream the answer to it."""

import shutil
import sys
from contextlib import closing
from typing import Protocol

from tiny_llm import RequestFailedError

from .chat_commands import ChatCommands, Outcome, is_command
from .conversation import Conversation, Prompt
from .ctrl_c import CtrlC
from .history_file import history_path, open_history
from .line_input import LineInput, unquoted
from .quiet_terminal import quiet_terminal
from .word_wrap import WordWrap


class Lines(Protocol):
    """Where the user's texts come from."""

    def read(self) -> str:
        """Wait for a text. Raises EOFError at the end and KeyboardInterrupt for Ctrl-C."""

    def keep_typed_as_draft(self) -> None:
        """Let the next text start with what was typed since the last `read`; an Enter in it sends nothing."""


def converse_at_terminal(conversation: Conversation, *, keeps_history: bool) -> None:
    """Hold a conversation at this process's terminal. keeps_history: read and write the history file."""
    history = open_history(history_path() if keeps_history else None)
    with quiet_terminal(sys.stdin.fileno()):
        converse(conversation, LineInput(history))


def converse(conversation: Conversation, lines: Lines) -> None:
    """Read, answer, repeat, until the end of the input or /exit. Only answers go to standard output."""
    commands = ChatCommands(conversation)
    hint = "(Ctrl-D or /exit leaves)"
    _show(f"{conversation.model_name}. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            text = lines.read()
            outcome = commands.run(text) if is_command(text) else _asked(conversation, unquoted(text))
            if outcome.leaves:
                return
            _show(outcome.text)
            if outcome.prompt is not None:
                _reply(conversation, outcome.prompt)
                lines.keep_typed_as_draft()
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt, or just before an answer
            _show(hint)
            hint = ""


def _asked(conversation: Conversation, question: str) -> Outcome:
    """The prompt for a question, or why it cannot be asked; nothing for an empty question."""
    try:
        return Outcome(prompt=conversation.prepare(question) if question else None)
    except ValueError as error:
        return Outcome(f"tiny-llm: error: {error}")


def _reply(conversation: Conversation, prompt: Prompt) -> None:
    """Stream one answer. An error ends the answer and is shown; the conversation goes on."""
    was_nearly_full = conversation.is_nearly_full
    if prompt.num_dropped:
        exchanges = "exchange" if prompt.num_dropped == 1 else f"{prompt.num_dropped} exchanges"
        _show(f"(dropped the oldest {exchanges} to fit the context of {conversation.context:,} tokens)")
    try:
        was_stopped = _stream(conversation, prompt)
    except KeyboardInterrupt:
        print(flush=True)
        return
    except (ValueError, RequestFailedError) as error:
        _show(f"tiny-llm: error: {error}")
        return
    if was_stopped:
        _show("(stopped)")
    elif conversation.cut_short:
        _show(f"({conversation.cut_short})")
    if conversation.is_nearly_full and not was_nearly_full:
        _show(_warning(conversation))


def _stream(conversation: Conversation, prompt: Prompt) -> bool:
    """Print the answer as it arrives, and a line break; return whether Ctrl-C stopped it."""
    wrap = WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    try:
        with CtrlC() as ctrl_c, closing(conversation.answer(prompt)) as answer:
            for delta in answer:
                ctrl_c.answering = True
                print(wrap.feed(delta.text) if wrap else delta.text, end="", flush=True)
                if ctrl_c.pressed:
                    break
    finally:
        print(wrap.flush() if wrap else "", end="", flush=True)
    print(flush=True)
    return ctrl_c.pressed


def _warning(conversation: Conversation) -> str:
    used = 0 if conversation.stats is None else conversation.stats.num_tokens
    return (
        f"({used:,} of {conversation.context:,} context tokens are used: soon the oldest exchanges will be "
        "dropped; /reset starts a new conversation)"
    )


def _show(text: str) -> None:
    """Print a text that is not part of an answer."""
    if text:
        print(text, file=sys.stderr, flush=True)
