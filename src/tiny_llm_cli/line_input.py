"""What a user types at the prompt: one line, or several, with editing and a history.

Enter sends the text. It starts a new line instead after a backslash and inside open triple quotes; Alt-Enter
always does. A pasted text is inserted as it is, line breaks included.
"""

import re
import sys

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import History
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.utils import is_dumb_terminal

QUOTES = '"""'
_OPENING = re.compile(rf"\s*(/\w+\s+)?{QUOTES}")
_ENTER = (Keys.ControlM, Keys.ControlJ)


def is_open(text: str) -> bool:
    """Whether a text, or the argument of a command, starts with triple quotes that are not closed yet."""
    return _OPENING.match(text) is not None and text.count(QUOTES) % 2 == 1


def unquoted(text: str) -> str:
    """A text without the space around it, and without the triple quotes around it."""
    text = text.strip()
    if len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class LineInput:
    """Reads texts from the terminal. If standard output is a file, the prompt goes to standard error."""

    def __init__(self, history: History, typed: Input | None = None, shown: Output | None = None) -> None:
        """typed, shown: the terminal to read from and to write to; None: that of this process."""
        self._input = typed or create_input(sys.stdin)
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=history,
            key_bindings=_key_bindings(),
            enable_suspend=True,
            reserve_space_for_menu=0,
            input=self._input,
            output=shown or _terminal_output(),
        )

    def read(self) -> str:
        """Wait for a text. Raises EOFError for Ctrl-D in an empty line, KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt()

    def keep_typed_as_draft(self) -> None:
        """Let the next text start with what was typed since the last `read`; an Enter in it sends nothing.

        Such an Enter becomes a line break; at the end of what was typed, it is dropped. Other keys work as
        usual: Ctrl-D still ends the conversation if nothing else was typed.
        """
        keys = get_typeahead(self._input)
        while more := self._input.read_keys():
            keys += more
        keys += self._input.flush_keys()
        while keys and keys[-1].key in _ENTER:
            keys.pop()
        line_break = KeyPress(Keys.BracketedPaste, "\n")
        store_typeahead(self._input, [line_break if key.key in _ENTER else key for key in keys])


def _terminal_output() -> Output | None:
    """The terminal, without cursor position requests, which some terminals answer late or never."""
    if is_dumb_terminal():
        return None
    output = create_output(always_prefer_tty=True)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False
    return output


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching the history
    bindings.add("enter", filter=typing)(_send_or_continue)
    bindings.add("escape", "enter", filter=typing)(_start_line)
    return bindings


def _send_or_continue(event: KeyPressEvent) -> None:
    buffer = event.current_buffer
    if buffer.document.is_cursor_at_the_end and _ends_with_backslash(buffer.text):
        buffer.delete_before_cursor()
        _start_line(event)
    elif is_open(buffer.text):
        _start_line(event)
    else:
        buffer.validate_and_handle()


def _start_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


def _ends_with_backslash(text: str) -> bool:
    """Whether the last character is a backslash that no other one escapes."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1
