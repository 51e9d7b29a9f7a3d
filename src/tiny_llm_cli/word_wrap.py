"""Word wrap for text that arrives in pieces."""

from prompt_toolkit.utils import get_cwidth

_FENCE = "```"


class WordWrap:
    """Breaks lines between words, at `columns` terminal cells.

    Text of a word is held back until it is known whether the word fits. Code between ``` lines is not
    wrapped, so that it can be copied. Wide characters (CJK) break anywhere, and a word longer than half a
    line is not held back any longer.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0
        self._space = ""  # before the word
        self._word = ""
        self._line_start = ""  # the start of the text's current line, to detect fences
        self._in_code = False

    def feed(self, text: str) -> str:
        """The text to print now, for a piece of text that has arrived."""
        return "".join(map(self._next, text))

    def flush(self) -> str:
        """The text that is still held back."""
        shown, self._space = self._place() + self._space, ""
        return shown

    def _next(self, character: str) -> str:
        if character == "\n":
            return self._end_line()
        if len(self._line_start) < self._columns:
            self._line_start += character
        if self._in_code:
            return character
        if character.isspace():
            shown = self._place()
            self._space += character
            return shown
        width = get_cwidth(character)
        shown = self._place() if width > 1 else ""
        self._word += character
        if width > 1 or len(self._word) > self._columns // 2:
            shown += self._place()
        return shown

    def _end_line(self) -> str:
        shown = self.flush() + "\n"
        if self._line_start.lstrip().startswith(_FENCE):
            self._in_code = not self._in_code
        self._line_start, self._column = "", 0
        return shown

    def _place(self) -> str:
        """The word with the space or the line break before it; nothing if there is no word."""
        if not self._word:
            return ""
        space, word = self._space, self._word
        self._space = self._word = ""
        if self._column and self._column + get_cwidth(space) + get_cwidth(word) > self._columns:
            self._column, space = 0, "\n"
        else:
            self._column += get_cwidth(space)
        self._column += get_cwidth(word)
        return space + word
