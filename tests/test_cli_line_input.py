"""The line editor of `tiny-llm chat`: multi-line input, drafts, the history file, and word wrap.

The tests send keys to the line editor through a pipe; they need no terminal.
"""

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from tiny_llm_cli import history_file
from tiny_llm_cli.history_file import history_path, open_history
from tiny_llm_cli.line_input import LineInput, unquoted
from tiny_llm_cli.word_wrap import WordWrap

ENTER, ALT_ENTER, UP, BACKSPACE, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x7f", "\x03", "\x04"


def pasted(text: str) -> str:
    """Return what a terminal sends when `text` is pasted (bracketed paste)."""
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard:
        yield keyboard


@pytest.fixture
def lines(keyboard: PipeInput) -> LineInput:
    return LineInput(InMemoryHistory(), keyboard, DummyOutput())


Read = Callable[[str], str]


@pytest.fixture
def read(keyboard: PipeInput, lines: LineInput) -> Read:
    """A function that types keys and returns the text that the line editor reads."""

    def type_and_read(keys: str) -> str:
        keyboard.send_text(keys)
        return lines.read()

    return type_and_read


# ---- several lines ----


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (f"a line{ENTER}", "a line"),
        (f"first\\{ENTER}second{ENTER}", "first\nsecond"),
        (f"first\\{ENTER}\\{ENTER}third{ENTER}", "first\n\nthird"),
        (f"C:\\\\{ENTER}", "C:\\\\"),
        (f"first{ALT_ENTER}second{ENTER}", "first\nsecond"),
        (f'"""first{ENTER}second"""{ENTER}', '"""first\nsecond"""'),
        (f'"""{ENTER}first{ENTER}{ENTER}third{ENTER}"""{ENTER}', '"""\nfirst\n\nthird\n"""'),
        (f'/system """first{ENTER}second"""{ENTER}', '/system """first\nsecond"""'),
        (f'What does """ mean?{ENTER}', 'What does """ mean?'),
        (pasted("first\rsecond") + ENTER, "first\nsecond"),
        (pasted("make \\\r  all\r") + ENTER, "make \\\n  all\n"),
        ("Explain: " + pasted("if x:\n    y") + ENTER, "Explain: if x:\n    y"),
    ],
)
def test_each_sequence_of_keys_enters_one_text(read: Read, keys: str, text: str) -> None:
    assert read(keys) == text


def test_read_returns_one_text_at_a_time(read: Read, lines: LineInput) -> None:
    assert read(f"one{ENTER}two{ENTER}") == "one"
    assert lines.read() == "two"


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ('"""one\ntwo"""', "one\ntwo"),
        ('  """\n  indented\n"""  ', "  indented"),
        ('""""""', ""),
        ('"""', '"""'),
        ("  plain \n", "plain"),
        ('"""A docstring."""\nimport os', '"""A docstring."""\nimport os'),
    ],
)
def test_triple_quotes_around_a_text_are_removed(text: str, bare: str) -> None:
    assert unquoted(text) == bare


def test_ctrl_d_on_an_empty_line_raises_eof_error(read: Read) -> None:
    with pytest.raises(EOFError):
        read(CTRL_D)


def test_ctrl_c_discards_the_text(read: Read) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(f'"""half a text{ENTER}{CTRL_C}')
    assert read(f"another{ENTER}") == "another"


# ---- typing during an answer ----


@pytest.mark.parametrize(
    ("during", "after", "text"),
    [
        ("typed early", f", sent late{ENTER}", "typed early, sent late"),
        (f"typed early{ENTER}", f", sent late{ENTER}", "typed early, sent late"),
        (f"one{ENTER}two\n", ENTER, "one\ntwo"),
        (f"wrong{BACKSPACE * 5}right", ENTER, "right"),
        ("x" * 3000, ENTER, "x" * 3000),
        ("", f"nothing before{ENTER}", "nothing before"),
    ],
)
def test_text_typed_during_an_answer_becomes_a_draft_that_enter_sends(
    read: Read, keyboard: PipeInput, lines: LineInput, during: str, after: str, text: str
) -> None:
    read(f"a question{ENTER}")
    keyboard.send_text(during)
    lines.keep_typed_as_draft()
    assert read(after) == text


def test_ctrl_d_during_an_answer_takes_effect_after_it(
    read: Read, keyboard: PipeInput, lines: LineInput
) -> None:
    read(f"a question{ENTER}")
    keyboard.send_text(CTRL_D)
    lines.keep_typed_as_draft()
    with pytest.raises(EOFError):
        lines.read()


def test_lines_pasted_after_a_question_become_a_draft(
    read: Read, keyboard: PipeInput, lines: LineInput
) -> None:
    """A terminal without bracketed paste sends pasted lines as if they were typed."""
    assert read(f"one{ENTER}two{ENTER}three{ENTER}") == "one"
    lines.keep_typed_as_draft()
    assert read(ENTER) == "two\nthree"


# ---- the history ----


def lines_of(file: Path, keyboard: PipeInput) -> LineInput:
    """Return a line editor that has loaded its history from `file`, as in a new conversation."""
    return LineInput(open_history(file), keyboard, DummyOutput())


def read_twice(lines: LineInput, keyboard: PipeInput) -> list[str]:
    """Type a text, then recall it with the up arrow; return both texts that were read."""
    keyboard.send_text(f"one{ENTER}")
    first = lines.read()
    keyboard.send_text(f"{UP}{ENTER}")
    return [first, lines.read()]


def test_the_history_contains_the_texts_of_earlier_conversations(tmp_path: Path, keyboard: PipeInput) -> None:
    file = tmp_path / "state" / "history"
    earlier = lines_of(file, keyboard)
    for keys in (f"one\\{ENTER}text{ENTER}", f"another{ENTER}"):
        keyboard.send_text(keys)
        earlier.read()
    later = lines_of(file, keyboard)
    keyboard.send_text(f"{UP}{ENTER}")
    assert later.read() == "another"
    assert list(FileHistory(str(file)).load_history_strings()) == ["another", "one\ntext"]


def test_only_the_owner_can_read_the_history(tmp_path: Path) -> None:
    file = tmp_path / "state" / "history"
    before = os.umask(0)
    try:
        open_history(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        file.chmod(0o644)
        open_history(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_history_is_bounded_and_keeps_the_latest_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "history"
    history = open_history(file)
    for number in range(10):
        history.append_string(f"entry {number}")
    monkeypatch.setattr(history_file, "MAX_ENTRIES", 4)
    assert list(open_history(file).load_history_strings()) == [f"entry {n}" for n in (9, 8, 7, 6)]
    monkeypatch.setattr(history_file, "MAX_CHARACTERS", len("entry 9entry 8"))
    assert list(open_history(file).load_history_strings()) == ["entry 9", "entry 8"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["history"]


def test_without_a_writable_history_file_the_history_lasts_for_the_conversation(
    tmp_path: Path, keyboard: PipeInput
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    lines = lines_of(blocked / "history", keyboard)
    assert read_twice(lines, keyboard) == ["one", "one"]


def test_a_history_file_that_fails_later_does_not_stop_the_conversation(
    tmp_path: Path, keyboard: PipeInput
) -> None:
    file = tmp_path / "history"
    lines = lines_of(file, keyboard)
    file.unlink()
    file.mkdir()
    assert read_twice(lines, keyboard) == ["one", "one"]


def test_the_history_is_in_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "tiny-llm" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "tiny-llm" / "chat_history"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError("no such user")))
    assert history_path() is None


# ---- word wrap ----


def wrapped(text: str, columns: int, piece: int) -> str:
    wrap = WordWrap(columns)
    return "".join(wrap.feed(text[i : i + piece]) for i in range(0, len(text), piece)) + wrap.flush()


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", "one two\nthree four"),
        ("one two", "one two"),
        ("exactly 10 and more", "exactly 10\nand more"),
        ("- one\n\n- two words more", "- one\n\n- two\nwords more"),
        ("word  \n  indented", "word  \n  indented"),
        ("ends with space ", "ends with\nspace "),
        (
            "```\na line of code that is long\n```\nand text after",
            "```\na line of code that is long\n```\nand text\nafter",
        ),
        ("", ""),
    ],
)
def test_lines_break_between_words(text: str, shown: str, piece: int) -> None:
    assert wrapped(text, 10, piece) == shown


def test_a_word_longer_than_a_line_keeps_all_its_characters() -> None:
    word = "0123456789" * 3
    assert "".join(wrapped(f"a {word} b", 10, 1).split()) == f"a{word}b"


def test_wide_characters_fill_two_cells_and_break_anywhere() -> None:
    assert wrapped("你好世界你好世界", 10, 1) == "你好世界你\n好世界"


def test_a_word_is_printed_as_soon_as_it_is_known_to_fit() -> None:
    wrap = WordWrap(10)
    assert [wrap.feed(piece) for piece in ("one", " ", "two")] == ["", "one", ""]
    assert wrap.flush() == " two"


def test_the_line_editor_is_not_imported_for_help() -> None:
    code = (
        "import sys\nfrom tiny_llm_cli.main import run\nrun(['chat', '--help'])\n"
        "sys.exit('prompt_toolkit' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
