"""The commands of a conversation, such as /help. Each returns what to do; none prints."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny_llm_checkpoints.sizes import counted

from .answer_stats import stats_text
from .conversation import Conversation, Prompt
from .line_input import unquoted
from .saved_chat import read_messages, write_messages

_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?=\s|$)")  # not /etc/hosts
_KEYS = '''
"""        start a message of several lines; another """ ends it
\\          at the end of a line continues the message on the next line (so does Alt-Enter)
Ctrl-C     stop the answer; its text so far is kept
Ctrl-D     leave

Several lines pasted at once are one question. To ask something that starts like a command, put a space
before it. What you type during an answer is kept for the next question, but not sent.'''


@dataclass(frozen=True)
class Outcome:
    """What follows a command: a text to show, a prompt to answer, or the end of the conversation."""

    text: str = ""
    prompt: Prompt | None = None
    leaves: bool = False


@dataclass(frozen=True)
class _Command:
    """argument: its name in the help; empty if there is none, in brackets if it may be left out."""

    names: tuple[str, ...]
    argument: str
    summary: str
    run: Callable[[str], Outcome]

    @property
    def usage(self) -> str:
        """The command's names and its argument, as `/help` lists them."""
        return f"{', '.join(self.names)} {self.argument}".rstrip()


def is_command(text: str) -> bool:
    """Whether a text is a command: a slash and a word at its very start, not a path such as /etc/hosts."""
    return _COMMAND.match(text) is not None


def _path(name: str) -> Path:
    """A file's name as a path, with ~ expanded; an unknown ~user stays as it is."""
    return Path(os.path.expanduser(name))


class ChatCommands:
    """Runs commands on a conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._own_files: set[Path] = set()
        self._commands = (
            _Command(("/system",), "[TEXT]", 'show or set the system message; "" removes it', self._system),
            _Command(("/stats",), "", "speed, tokens and context of the last answer", self._stats),
            _Command(("/retry", "/regen"), "", "replace the last answer with a new one", self._retry),
            _Command(("/reset", "/clear"), "", "forget everything except the system message", self._reset),
            _Command(("/save",), "FILE", "write the messages to a JSON file", self._save),
            _Command(("/load",), "FILE", "continue from the messages in such a file", self._load),
            _Command(("/help", "/?"), "", "show this help", self._help),
            _Command(("/exit", "/quit", "/bye"), "", "leave", self._exit),
        )

    def run(self, text: str) -> Outcome:
        """Run the command in `text`, for which `is_command` holds."""
        name, _, argument = text.strip().partition(" ")
        name, *more = name.split(maxsplit=1)  # a line break ends the name, too
        argument = " ".join([*more, argument]).strip()
        command = next((c for c in self._commands if name.lower() in c.names), None)
        if command is None:
            return Outcome(f"Unknown command {name}; try /help")
        if bool(argument) > bool(command.argument) or (not argument and command.argument == "FILE"):
            return Outcome(f"Usage: {command.usage}")
        try:
            return command.run(unquoted(argument) if argument else "")
        except OSError as error:
            return Outcome(f"{argument}: {error.strerror or error}")
        except ValueError as error:
            return Outcome(f"({error})")

    def _system(self, text: str) -> Outcome:
        if not text:
            return Outcome(self._conversation.system or "There is no system message. /system TEXT sets one.")
        removed = text in ('""', "''")
        self._conversation.set_system(None if removed else text)
        done = "system message removed" if removed else "system message set"
        kept = (
            "; the conversation so far is kept, and /reset drops it" if self._conversation.exchanges else ""
        )
        return Outcome(f"({done}{kept})")

    def _stats(self, _: str) -> Outcome:
        stats = self._conversation.stats
        return Outcome("(no answer yet)" if stats is None else stats_text(stats, self._conversation.context))

    def _retry(self, _: str) -> Outcome:
        same = "(at temperature 0 the answer will be the same; see --temperature)"
        return Outcome(same if self._conversation.is_greedy else "", self._conversation.prepare_retry())

    def _reset(self, _: str) -> Outcome:
        self._conversation.reset()
        return Outcome("(conversation reset)")

    def _save(self, name: str) -> Outcome:
        path = _path(name)
        if path.exists() and path.absolute() not in self._own_files:
            return Outcome(f"{name} already exists; choose another name")
        write_messages(path, self._conversation.model_name, self._conversation.messages)
        self._own_files.add(path.absolute())
        return Outcome(f"(saved {counted(len(self._conversation.messages), 'message')} to {name})")

    def _load(self, name: str) -> Outcome:
        path = _path(name)
        self._conversation.restore(read_messages(path))
        self._own_files.add(path.absolute())
        return Outcome(f"(loaded {counted(len(self._conversation.messages), 'message')} from {name})")

    def _help(self, _: str) -> Outcome:
        width = max(len(command.usage) for command in self._commands) + 2
        lines = [f"{command.usage:<{width}}{command.summary}" for command in self._commands]
        return Outcome("\n".join(lines) + "\n" + _KEYS)

    def _exit(self, _: str) -> Outcome:
        return Outcome(leaves=True)
