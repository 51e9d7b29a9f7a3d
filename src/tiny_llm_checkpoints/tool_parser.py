"""Finds calls of tools in a model's answer while it is generated. Knows nothing of HTTP.

After the marker of its form (`ToolFormat`) stands one call or a list of them, `[..., ...]`; a call is what
`CallScanner` accepts. In a form without a marker, calls stand at the start of an answer, with `;` between
them. Newer Mistral models write a call as its name, `[ARGS]` and its arguments. White space beside a call is
a part of it. All other text is content, exactly as generated. Text that may become a call is held back.
"""

import re
from collections.abc import Collection
from enum import Enum, auto

from .answer_deltas import CallDelta, ContentDelta, Delta, joined
from .answer_markers import num_begun, num_spaces
from .call_scanner import CallScanner
from .json_scanner import NotJSONError
from .tool_formats import ToolFormat

# A name before its arguments, as newer Mistral models write it, up to the brace that starts them.
_NAMED = re.compile(r"([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s{0,8}(?=\{)")
_MAX_NAMED = 160  # characters of such a name with its marks
_NAMED_CHARS = re.compile(r"[\w\[\]\s-]*")


class _State(Enum):
    START = auto()  # of an answer, where calls may stand without a marker
    TEXT = auto()  # content, up to a marker
    HEAD = auto()  # after a marker or a separator, before a call
    CALL = auto()  # in a call
    AFTER = auto()  # after a call


class ToolParser:
    """The calls in one answer. The joined deltas depend only on the whole text, not on its pieces.

    names: the functions that may be called. as_generated: pass arguments on while they are generated, for
    answers that a grammar keeps valid; otherwise a call is passed on when it is complete. only_calls: drop
    all content, such as a call that is cut off before its arguments. max_calls: drop calls after that many;
    None: no limit.

    num_calls: the calls so far, dropped ones too. is_complete: whether the last of them has ended.

    >>> from tiny_llm_checkpoints.tool_formats import HERMES
    >>> parser = ToolParser(HERMES, ["f"])
    >>> parser.push('Hi. <tool_call>{"name": "f", '), parser.push('"arguments": {}}</tool_call>')
    ([ContentDelta(text='Hi.')], [CallDelta(number=0, name='f', arguments='{}')])
    """

    def __init__(
        self,
        form: ToolFormat,
        names: Collection[str],
        *,
        as_generated: bool = False,
        only_calls: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self.num_calls = 0
        self.is_complete = True
        self._form = form
        self._names = names
        self._as_generated = as_generated
        self._only_calls = only_calls
        self._max_calls = max_calls
        self._marker = form.begin or form.optional
        self._state = _State.TEXT if form.begin else _State.START
        self._text = ""  # not consumed yet
        self._held: list[str] = []  # consumed, but content if it turns out not to be a call
        self._lead = 0  # the number of their first characters in which no other call can start
        self._in_list = False
        self._call: CallScanner | None = None
        self._deltas: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """Take the next piece of the answer; return the deltas that are certain now, joined."""
        self._text += text
        return self._run(is_last=False)

    def finish(self) -> list[Delta]:
        """End the answer; return what was held back."""
        return self._run(is_last=True)

    def _run(self, is_last: bool) -> list[Delta]:
        steps = {
            _State.START: self._read_start,
            _State.TEXT: self._read_text,
            _State.HEAD: self._read_head,
            _State.CALL: self._read_call,
            _State.AFTER: self._read_after,
        }
        while steps[self._state](is_last):
            pass
        deltas, self._deltas = joined(self._deltas), []
        return deltas

    # Each of these returns whether there is more to do with the text so far.

    def _read_start(self, is_last: bool) -> bool:
        text = self._text.lstrip()
        if not text and not is_last:
            return False
        self._hold(0, _State.HEAD if text[:1] in ("{", "[") else _State.TEXT)
        return True

    def _read_text(self, is_last: bool) -> bool:
        text, marker = self._text, self._marker
        place = text.find(marker)
        if place >= 0:
            space = num_spaces(text[:place])
            self._content(text[: place - space])
            self._text = text[place - space :]
            self._hold(space + len(marker), _State.HEAD)
            return True
        end = len(text)
        if not is_last:
            end -= num_begun(text, marker)
            end -= num_spaces(text[:end])
        self._content(text[:end])
        self._text = text[end:]
        return False

    def _read_head(self, is_last: bool) -> bool:
        self._consume(len(self._text) - len(self._text.lstrip()))
        first = self._text[:1]
        if first == "{":
            self._call, self._state = CallScanner(self._names), _State.CALL
        elif first == "[" and not self._in_list:
            self._in_list = True
            self._consume(1)
        elif first and self._marker == "[TOOL_CALLS]" and not self._in_list:
            return self._read_name(is_last)
        elif first or is_last:
            self._fail()
        else:
            return False
        return True

    def _read_name(self, is_last: bool) -> bool:
        """Read a name before its arguments."""
        found = _NAMED.match(self._text)
        if found is not None and found[1] in self._names:
            self._consume(found.end())
            self._call, self._state = CallScanner(self._names, found[1]), _State.CALL
            return True
        fits = _NAMED_CHARS.fullmatch(self._text) is not None and len(self._text) <= _MAX_NAMED
        if not fits or is_last:
            self._fail()
            return True
        return False

    def _read_call(self, is_last: bool) -> bool:
        call = self._call
        assert call is not None
        for place, char in enumerate(self._text):
            try:
                call.push(char)
            except NotJSONError:
                self._break_off(call, place)
                return True
            if call.is_complete:
                self._pass_on(call)
                self._consume(place + 1)
                self._held.clear()
                self.is_complete, self._call, self._state = True, None, _State.AFTER
                return True
        self._consume(len(self._text))
        self._pass_on_early(call)
        if is_last and self.is_complete:
            self._fail()
            return True
        return False

    def _read_after(self, is_last: bool) -> bool:
        form, text = self._form, self._text.lstrip()
        marks = [",", "]"] if self._in_list else [form.end, form.begin or form.optional]
        marks += [] if form.begin or self._in_list else [";"]
        known = next((mark for mark in marks if mark and text.startswith(mark)), None)
        if known == "]":
            self._in_list, self._text = False, text[1:]
        elif known == form.end and known:
            self._text = text[len(known) :]
        elif known is not None:
            self._hold(len(self._text) - len(text) + len(known), _State.HEAD)
        elif not form.begin and not self._in_list and text[:1] == "{":
            self._hold(0, _State.HEAD)
        elif any(mark.startswith(text) for mark in marks):  # an unfinished mark, or nothing
            self._text = "" if is_last else self._text
            return False
        else:
            self._in_list, self._state = False, _State.TEXT
        return True

    def _hold(self, lead: int, state: _State) -> None:
        """Start what may be a call: hold its first `lead` characters, in which no other call can start."""
        self._held.clear()
        self._lead = lead
        self._consume(lead)
        self._state = state

    def _consume(self, num_characters: int) -> None:
        if num_characters:
            self._held.append(self._text[:num_characters])
            self._text = self._text[num_characters:]

    def _fail(self) -> None:
        """Release what was held and is not a call: its lead is content, and the rest may contain calls."""
        held = "".join(self._held) + self._text
        self._content(held[: self._lead])
        self._text = held[self._lead :]
        self._held.clear()
        self._in_list, self._call, self._state = False, None, _State.TEXT

    def _break_off(self, call: CallScanner, place: int) -> None:
        """End a call that cannot become valid. If its start was passed on, only the rest is content."""
        self._pass_on_early(call)
        if self.is_complete:
            self._fail()
        else:
            self._text = self._text[place:]
            self._in_list, self._call, self._state = False, None, _State.TEXT

    def _pass_on_early(self, call: CallScanner) -> None:
        """Pass on the start of a call if that is wanted and its arguments have started."""
        if self._as_generated and call.name is not None and call.has_arguments:
            self._pass_on(call)
            self._held.clear()

    def _pass_on(self, call: CallScanner) -> None:
        """Pass on what is new of a call."""
        assert call.name is not None
        is_new = self.is_complete
        if is_new:
            self.num_calls += 1
        self.is_complete = False
        arguments = call.take() if call.has_arguments else "{}"
        if self._max_calls is None or self.num_calls <= self._max_calls:
            self._deltas.append(CallDelta(self.num_calls - 1, call.name if is_new else None, arguments))

    def _content(self, text: str) -> None:
        if not self._only_calls:
            self._deltas.append(ContentDelta(text))
