"""`tiny-llm chat`: one question, and a conversation with its commands and Ctrl-C.

Oracle: the engine's own `chat`.
"""

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandResult, Run, check_blocks_are_freed, cli, expected_answer, llm, plain_cli
from tiny_llm import LLM, SamplingParams
from tiny_llm_cli import chat_loop
from tiny_llm_cli.chat_loop import converse
from tiny_llm_cli.conversation import Conversation, Exchange
from tiny_llm_cli.history_file import MAX_ENTRY, open_history
from tiny_llm_cli.saved_chat import read_messages, write_messages

__all__ = ["check_blocks_are_freed", "cli", "llm", "plain_cli"]

# ---- chat, one question ----


def test_chat_prints_only_the_answer(cli: Run, llm: LLM) -> None:
    done = cli("chat", "Name a colour.", "--max-tokens", "8")
    assert done == CommandResult(0, expected_answer(llm, "Name a colour.") + "\n", "")


def test_chat_answers_in_the_form_that_is_asked_for(cli: Run) -> None:
    done = cli("chat", "Is water wet?", "--choice", "indeed", "--choice", "hardly")
    assert done.out in ("indeed\n", "hardly\n")


def test_chat_reads_its_question_from_a_pipe(cli: Run, llm: LLM) -> None:
    done = cli("chat", "--max-tokens", "8", stdin="Name a\ncolour.\n")
    assert done.out == expected_answer(llm, "Name a\ncolour.") + "\n"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A pipe as standard input, and a function that writes a text to it and closes it."""
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as stdin, os.fdopen(write, "w", encoding="utf-8") as other:
        monkeypatch.setattr(sys, "stdin", stdin)

        def send(text: str) -> None:
            other.write(text)
            other.close()

        yield send


def test_chat_puts_the_argument_before_the_piped_text(
    cli: Run, llm: LLM, piped: Callable[[str], None]
) -> None:
    piped("red, green\n")
    done = cli("chat", "Pick one:", "--max-tokens", "8", stdin=None)
    assert done.out == expected_answer(llm, "Pick one:\n\nred, green") + "\n"


@pytest.mark.usefixtures("piped")
def test_chat_does_not_wait_for_a_pipe_without_data(
    cli: Run, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["tiny_llm_cli.chat"], "_WAIT_FOR_PIPE", 0.01)
    done = cli("chat", "Name a colour.", "--max-tokens", "8", stdin=None)
    assert done.out == expected_answer(llm, "Name a colour.") + "\n"
    assert "no data in the pipe for 0.01 s" in done.err


def test_chat_with_a_seed_is_reproducible(cli: Run) -> None:
    arguments = ["chat", "Name a colour.", "--max-tokens", "6", "--temperature", "2", "--seed"]
    assert cli(*arguments, "7").out == cli(*arguments, "7").out


def test_chat_without_a_seed_gives_different_answers(cli: Run) -> None:
    arguments = ["chat", "Name a colour.", "--max-tokens", "6", "--temperature", "3"]
    assert len({cli(*arguments).out for _ in range(4)}) > 1


def test_a_question_longer_than_the_context_is_rejected_with_the_limit_and_advice(
    cli: Run, monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 40)
    done = cli("chat", "word " * 100)
    assert done.code == 1
    assert done.out == ""
    advice = "shorten it, or raise --num-blocks (the model's own limit is 8,192 tokens)"
    assert f"must fit into 40 tokens: {advice}" in done.err
    assert "/reset" not in done.err
    assert done.err.count("\n") == 1


def test_an_answer_stops_when_the_context_is_full(
    cli: Run, monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    whole = expected_answer(llm, "Write a long story.", max_tokens=100)
    monkeypatch.setattr(llm, "max_model_len", 50)
    done = cli("chat", "Write a long story.")
    assert done.code == 0
    assert 0 < len(done.out) < len(whole)
    assert whole.startswith(done.out.rstrip("\n"))


def test_max_tokens_larger_than_the_context_is_rejected(cli: Run) -> None:
    done = cli("chat", "Name a colour.", "--max-tokens", "99999999")
    assert (done.code, done.out) == (2, "")
    assert "--max-tokens: 99999999 exceeds the context of 1024 tokens" in done.err


class Bytes:
    """Standard input that holds bytes, as a pipe does."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_input_that_is_not_utf8_is_rejected_with_the_offset_of_the_byte(
    cli: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(b"caf\xc3\xa9 \xff"))
    done = cli(command, stdin=None)
    assert (done.code, done.out) == (1, "")
    assert "standard input is not UTF-8 text: byte 0xff at offset 6" in done.err


def test_arguments_that_are_not_utf8_are_rejected(plain_cli: Run) -> None:
    assert "PROMPT: not UTF-8 text" in plain_cli("chat", "\udcff").err
    assert "--system: not UTF-8 text" in plain_cli("chat", "Hello.", "--system", "\udcff").err


def test_a_byte_order_mark_and_carriage_returns_are_removed_from_piped_text(
    cli: Run, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(b"\xef\xbb\xbfName a\r\ncolour.\r\n"))
    done = cli("chat", "--max-tokens", "8", stdin=None)
    assert done.out == expected_answer(llm, "Name a\ncolour.") + "\n"


# ---- chat, a conversation ----


class Keyboard(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("options", "variable", "kept"),
    [([], None, True), (["--no-history"], None, False), ([], "0", False), (["--history"], "0", True)],
)
def test_the_history_can_be_turned_off(
    cli: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], variable: str | None, kept: bool
) -> None:
    keeps: list[bool] = []
    monkeypatch.setattr(
        chat_loop, "converse_at_terminal", lambda conversation, keeps_history: keeps.append(keeps_history)
    )
    monkeypatch.setattr(sys, "stdin", Keyboard())
    if variable is not None:
        monkeypatch.setenv("TINY_LLM_CHAT_HISTORY", variable)
    assert cli("chat", *options, stdin=None) == CommandResult(0, "", "")
    assert keeps == [kept]


def test_a_wrong_value_of_the_history_variable_is_reported_by_its_name(
    cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_LLM_CHAT_HISTORY", "maybe")
    done = cli("chat", "Hi")
    assert done.code == 2
    assert "error: TINY_LLM_CHAT_HISTORY must be 1 (on) or 0 (off), not 'maybe' (see" in done.err


def test_the_help_shows_switches_and_variables_with_plain_defaults(cli: Run) -> None:
    assert "TINY_LLM_CHAT_HISTORY; default: on]" in " ".join(cli("chat", "--help").out.split())
    words = " ".join(cli("bench", "serve", "--help").out.split())
    assert words.count("OPENAI_API_KEY") == 1


class Typed:
    """Input that returns these texts and raises these exceptions (for keys), and at the end EOFError."""

    def __init__(self, *texts: str | BaseException) -> None:
        self._texts = iter([*texts, EOFError()])
        self.num_drafts = 0

    def read(self) -> str:
        text = next(self._texts)
        if isinstance(text, BaseException):
            raise text
        return text

    def keep_typed_as_draft(self) -> None:
        self.num_drafts += 1


def talk(llm: LLM, *texts: str | BaseException, **params: Any) -> Conversation:
    """Hold a conversation in which the user types `texts`."""
    params = {"temperature": 0.0, "max_tokens": 6, **params}
    conversation = Conversation(llm, SamplingParams(**params), system="Be brief.")
    converse(conversation, Typed(*texts))
    return conversation


def questions(conversation: Conversation) -> list[str]:
    return [exchange.question for exchange in conversation.exchanges]


def test_a_conversation_keeps_its_messages(llm: LLM) -> None:
    conversation = talk(llm, "Name a colour.", "", "  ", "Another.")
    messages = conversation.messages
    assert [message["role"] for message in messages] == ["system", *("user", "assistant") * 2]
    assert messages[3]["content"] == "Another."
    params = SamplingParams(temperature=0.0, max_tokens=6)
    again = llm.chat(messages[:4], params, use_tqdm=False)[0].outputs[0].text
    assert messages[4]["content"] == again


def test_only_answers_go_to_standard_output(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llm, "Name a colour.", "/stats", "/help", "/nonsense", "Another.")
    assert capsys.readouterr().out == "".join(f"{answer}\n" for _, answer in conversation.exchanges)


def test_reset_keeps_only_the_system_message(llm: LLM) -> None:
    for command in ("/reset", "/clear"):
        conversation = talk(llm, "Name a colour.", command)
        assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_text_typed_during_an_answer_becomes_a_draft(llm: LLM) -> None:
    typed = Typed("Name a colour.", "/help", "Another.")
    converse(Conversation(llm, SamplingParams(temperature=0.0, max_tokens=2)), typed)
    assert typed.num_drafts == 2


def test_ctrl_c_at_the_prompt_shows_how_to_exit_only_once(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(llm, KeyboardInterrupt(), "Name a colour.", KeyboardInterrupt(), KeyboardInterrupt())
    assert capsys.readouterr().err.count("(Ctrl-D or /exit leaves)") == 1
    assert questions(conversation) == ["Name a colour."]


def test_ctrl_c_between_a_question_and_its_answer_drops_the_question_and_the_conversation_continues(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    reply, interruptions = chat_loop._reply, [KeyboardInterrupt()]

    def interrupted(*arguments: Any) -> None:
        if interruptions:
            raise interruptions.pop()
        reply(*arguments)

    monkeypatch.setattr(chat_loop, "_reply", interrupted)
    conversation = talk(llm, "Name a number.", "Name a colour.")
    assert "Ctrl-D" in capsys.readouterr().err
    assert questions(conversation) == ["Name a colour."]


def test_ctrl_c_stops_the_answer_and_keeps_its_text_so_far(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    stream = llm.stream

    def interrupted(*args: Any) -> Iterator[Any]:
        with closing(stream(*args)) as deltas:
            for number, delta in enumerate(deltas):
                if number == 2:
                    signal.raise_signal(signal.SIGINT)
                yield delta

    monkeypatch.setattr(llm, "stream", interrupted)
    conversation = talk(llm, "Count to one hundred.", max_tokens=50)
    [exchange] = conversation.exchanges
    assert 1 <= len(llm.tokenizer.encode(exchange.answer)) <= 3
    assert conversation.stats is not None
    assert conversation.stats.num_answer_tokens == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_token_drops_the_question(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    """The signal arrives in the main thread, which waits while the engine's thread runs a step."""
    step = llm.core.step

    def interrupted() -> Any:
        monkeypatch.setattr(llm.core, "step", step)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return []

    monkeypatch.setattr(llm.core, "step", interrupted)
    assert questions(talk(llm, "Name a colour.", "Name another.")) == ["Name another."]


def test_retry_asks_again_what_ctrl_c_stopped_before_the_first_token(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    conversation = Conversation(llm, SamplingParams(temperature=0.0, max_tokens=6))
    converse(conversation, Typed("Name a colour."))
    with monkeypatch.context() as patch:
        patch.setattr(llm, "stream", lambda *_: (delta for delta in ()))
        converse(conversation, Typed("Name a fruit."))
    assert questions(conversation) == ["Name a colour."]
    converse(conversation, Typed("/retry"))
    assert questions(conversation) == ["Name a colour.", "Name a fruit."]


# ---- commands ----


def test_help_explains_all_commands(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llm, "/help", "/exit", AssertionError("the input was read after /exit"))
    shown = capsys.readouterr().err
    names = ("/system", "/stats", "/retry", "/reset", "/save", "/load", "/help", "/exit", "/quit", "Ctrl-C")
    assert [name for name in names if name not in shown] == []
    assert questions(conversation) == []


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye", "/EXIT", "/exit "])
def test_exit_commands_stop_the_conversation(llm: LLM, command: str) -> None:
    talk(llm, command, AssertionError("the input was read after the command"))


def test_an_unknown_command_is_not_a_question(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llm, "/sing a song", "/42")
    assert "Unknown command /sing; try /help" in capsys.readouterr().err
    assert questions(conversation) == ["/42"]


def test_a_path_or_a_slash_after_a_space_is_a_question(llm: LLM) -> None:
    typed = ["/etc/hosts is what?", " /exit is what?"]
    assert questions(talk(llm, *typed, max_tokens=1)) == ["/etc/hosts is what?", "/exit is what?"]


def test_a_command_with_a_missing_or_extra_argument_shows_its_usage(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(llm, "Name a colour.", "/save", "/reset all")
    shown = capsys.readouterr().err
    assert "Usage: /save FILE" in shown
    assert "Usage: /reset, /clear" in shown
    assert len(conversation.exchanges) == 1


def test_the_system_command_shows_sets_and_removes_the_system_message(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(llm, "Name a colour.", "/system", '/system """Answer\nin French."""', max_tokens=1)
    shown = capsys.readouterr().err
    assert "Be brief." in shown
    assert "(system message set; the conversation so far is kept, and /reset drops it)" in shown
    assert conversation.messages[0] == {"role": "system", "content": "Answer\nin French."}
    assert questions(conversation) == ["Name a colour."]
    assert talk(llm, '/system ""').messages == []
    assert "(system message removed)" in capsys.readouterr().err


def test_a_system_message_that_the_template_rejects_is_not_set(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = llm.chat_template.encode

    def without_system(messages: list[dict[str, str]], *others: Any) -> list[int]:
        if messages[0] == {"role": "system", "content": "Sing."}:
            raise ValueError("System role not supported")
        return encode(messages, *others)

    monkeypatch.setattr(llm.chat_template, "encode", without_system)
    conversation = talk(llm, "/system Sing.", "Name a colour.")
    assert "System role not supported" in capsys.readouterr().err
    assert conversation.system == "Be brief."
    assert len(conversation.exchanges) == 1


def test_stats_count_the_tokens_of_the_last_answer(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llm, "/stats", "Name a colour.", "Another.", "/stats")
    shown = capsys.readouterr().err
    stats = conversation.stats
    assert stats is not None
    prompt = llm.chat_template.encode(conversation.messages[:4], llm.tokenizer)
    expected = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)[0]
    assert stats.num_prompt_tokens == len(prompt)
    assert stats.num_answer_tokens == len(expected.outputs[0].token_ids)
    assert 0 < stats.num_cached_tokens < len(prompt)
    assert stats.ttft is not None
    assert stats.ttft > 0
    assert "(no answer yet)" in shown
    assert f"{len(prompt)} tokens, {stats.num_cached_tokens} from the prefix cache" in shown
    assert "tokens/s" in shown
    assert f"{stats.num_tokens} of 1,024 tokens" in shown


def test_retry_replaces_the_last_answer(llm: LLM) -> None:
    for command in ("/retry", "/regen"):
        conversation = talk(
            llm, command, "Name a colour.", "Tell a story.", command, temperature=3.0, seed=1, max_tokens=12
        )
        first = talk(llm, "Name a colour.", "Tell a story.", temperature=3.0, seed=1, max_tokens=12)
        assert questions(conversation) == ["Name a colour.", "Tell a story."]
        assert conversation.exchanges[0] == first.exchanges[0]
        assert conversation.exchanges[1] != first.exchanges[1]


def test_a_retry_stopped_before_its_first_token_keeps_the_old_answer(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    conversation = talk(llm, "Name a colour.")
    before = list(conversation.exchanges)

    def interrupted(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(llm, "stream", interrupted)
    converse(conversation, Typed("/retry"))
    assert conversation.exchanges == before


def test_retry_at_temperature_zero_warns_that_the_answer_will_be_the_same(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(llm, "/retry", "Name a colour.", "/retry")
    shown = capsys.readouterr().err
    assert "(no question yet)" in shown
    assert "at temperature 0 the answer will be the same" in shown


def test_a_saved_conversation_can_be_loaded(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    saved = talk(llm, "Name a colour.", "Another.", f"/save {file}", f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "model": llm.model_name,
        "messages": saved.messages,
    }
    loaded = talk(llm, "Never mind.", f"/load {file}", f"/save {file}")
    assert loaded.messages == saved.messages


def test_save_does_not_overwrite_other_files(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("precious", encoding="utf-8")
    talk(llm, f"/save {file}", f"/save {tmp_path / 'missing' / 'chat.json'}")
    shown = capsys.readouterr().err
    assert "notes.txt already exists; choose another name" in shown
    assert "No such file or directory" in shown
    assert file.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not a JSON file"),
        ("{}", 'has no list of "messages"'),
        ('[{"role": "tool", "content": "x"}]', 'messages[0] needs a "role"'),
        ('[{"role": "user", "content": 1}]', 'messages[0] needs a "role"'),
        ('["x"]', 'messages[0] needs a "role"'),
        ('[{"role": "user", "content": "x"}]', "must alternate"),
        ('[{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]', "must alternate"),
    ],
)
def test_loading_an_invalid_file_leaves_the_conversation_unchanged(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content, encoding="utf-8")
    conversation = talk(llm, "Name a colour.", f"/load {file}", max_tokens=1)
    assert reason in capsys.readouterr().err
    assert (conversation.system, questions(conversation)) == ("Be brief.", ["Name a colour."])


def test_half_of_a_character_is_not_loaded_and_saving_never_empties_a_file(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    content = '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "yes"}]'
    file.write_text(content)
    with pytest.raises(ValueError, match=r"messages\[0\] has half of a character"):
        read_messages(file)
    with pytest.raises(UnicodeEncodeError):
        write_messages(file, "m", [{"role": "user", "content": "\ud83d"}])
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    assert file.read_text() == content


def test_a_save_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_messages(tmp_path / "link.json", "m", [])
    assert (tmp_path / "link.json").is_symlink()
    assert read_messages(tmp_path / "real.json") == []


def test_a_file_name_with_an_unknown_user_is_a_message(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    talk(llm, "/save ~nobody-at-all/x.json", "/load ~nobody-at-all.json")
    assert capsys.readouterr().err.count("No such file or directory") == 2


def test_a_system_message_that_leaves_no_space_for_a_question_is_not_set(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(llm, "/system " + "be nice " * llm.max_model_len)
    assert conversation.system == "Be brief."
    assert "prompt and answer together must fit" in capsys.readouterr().err


def test_a_long_paste_does_not_displace_the_history(tmp_path: Path) -> None:
    file = tmp_path / "history"
    history = open_history(file)
    for entry in ("first", "x" * (MAX_ENTRY + 1), "last"):
        history.append_string(entry)
    assert list(open_history(file).load_history_strings()) == ["last", "first"]


# ---- the end of the context ----


def filled(llm: LLM, *, num_exchanges: int = 6, **params: Any) -> Conversation:
    conversation = Conversation(llm, SamplingParams(temperature=0.0, max_tokens=8, **params))
    conversation.exchanges = [Exchange(f"Question {i}?", f"Answer {i}.") for i in range(num_exchanges)]
    return conversation


def without(llm: LLM, num_dropped: int) -> Conversation:
    conversation = filled(llm)
    conversation.exchanges = conversation.exchanges[num_dropped:]
    return conversation


def num_tokens(llm: LLM, conversation: Conversation, question: str) -> int:
    messages = [*conversation.messages, {"role": "user", "content": question}]
    return len(llm.chat_template.encode(messages, llm.tokenizer))


def test_the_oldest_exchanges_are_dropped_when_the_context_is_full(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = filled(llm)
    monkeypatch.setattr(llm, "max_model_len", num_tokens(llm, conversation, "Next?") + 7)
    converse(conversation, Typed("Next?"))
    kept = questions(conversation)
    num_dropped = 7 - len(kept)
    assert num_dropped > 1
    assert kept == [*(f"Question {i}?" for i in range(num_dropped, 6)), "Next?"]
    saved = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert saved == [*(f"Question {i}?" for i in range(6)), "Next?"]  # with those that were dropped
    assert f"(dropped the oldest {num_dropped} exchanges to fit the context of" in capsys.readouterr().err


def test_exchanges_are_dropped_only_until_half_of_the_context_is_free(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    conversation = filled(llm)
    context = num_tokens(llm, conversation, "Next?") + 7
    monkeypatch.setattr(llm, "max_model_len", context)
    prompt = conversation.prepare("Next?")
    dropped = prompt.num_dropped
    assert dropped > 0
    assert prompt.exchanges == conversation.exchanges[dropped:]
    assert len(prompt.token_ids) == num_tokens(llm, without(llm, dropped), "Next?") <= context // 2
    assert num_tokens(llm, without(llm, dropped - 1), "Next?") > context // 2


def test_a_conversation_that_just_fits_drops_nothing(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    conversation = filled(llm)
    monkeypatch.setattr(llm, "max_model_len", num_tokens(llm, conversation, "Next?") + 8)
    assert conversation.prepare("Next?").num_dropped == 0


def test_a_question_too_long_for_the_context_is_rejected_and_the_conversation_continues(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 80)
    conversation = talk(llm, "Name a colour.", "word " * 90, "Another.")
    shown = capsys.readouterr().err
    assert "must fit into 80 tokens: shorten it, or raise --num-blocks" in shown
    assert questions(conversation) == ["Name a colour.", "Another."]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"max_model_len": 64}, "raise --max-model-len (the model's own limit is 8,192 tokens)"),
        ({"num_blocks": 4}, "raise --num-blocks (the model's own limit is 8,192 tokens)"),
        ({"kv_cache_memory": 1 << 21}, "raise --kv-cache-memory (the model's own limit is 8,192 tokens)"),
    ],
)
def test_the_advice_names_the_option_that_limits_the_context(options: dict[str, int], advice: str) -> None:
    small = LLM(max_num_seqs=1, **options)
    with pytest.raises(ValueError, match="shorten it") as refused:
        Conversation(small, SamplingParams(max_tokens=8)).prepare("word " * 500)
    assert advice in str(refused.value)


def test_a_nearly_full_context_is_announced_once_before_anything_is_dropped(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = filled(llm)
    monkeypatch.setattr(llm, "max_model_len", num_tokens(llm, conversation, "Next?") + 12)
    converse(conversation, Typed("Next?"))
    shown = capsys.readouterr().err
    assert "context tokens are used: soon the oldest exchanges will be dropped" in shown
    assert "(dropped" not in shown
    converse(conversation, Typed("Next?"))
    assert "soon" not in capsys.readouterr().err


def test_an_answer_that_fills_the_context_shows_a_message(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 25)
    talk(llm, "Write a long story.", max_tokens=100)
    assert "(stopped: the context of 25 tokens is full)" in capsys.readouterr().err


def test_an_answer_that_reaches_max_tokens_shows_a_message(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(llm, "Write a long story.", max_tokens=3)
    assert "(stopped at --max-tokens 3)" in capsys.readouterr().err
