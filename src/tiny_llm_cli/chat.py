"""`tiny-llm chat`: one question from the command line or a pipe, or a conversation at a prompt."""

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from .engine import asked_sampling, load
from .form_options import FormOptions, asked_form
from .options import EngineOptions, SamplingOptions, takes_groups
from .stdin import read_stdin, stdin_has_data, stdin_is_terminal

if TYPE_CHECKING:
    from .conversation import Conversation

_MAX_TOKENS = 512  # of an answer, unless the user or the model sets another limit
_WAIT_FOR_PIPE = 1.0  # seconds, after the model is loaded


@takes_groups(max_num_seqs=1)
def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The question. Without it, the question is read from a pipe, or a conversation starts.",
        ),
    ] = None,
    *,
    system: Annotated[
        str | None,
        typer.Option(help="The system message: how the model should answer.", metavar="TEXT"),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="Save what you type, so that the arrow keys bring it back in later conversations. The file, "
            "~/.local/state/tiny-llm/chat_history (or under $XDG_STATE_HOME), is readable only by you.",
            envvar="TINY_LLM_CHAT_HISTORY",
        ),
    ] = True,
    sampling: SamplingOptions,
    form: FormOptions,
    engine: EngineOptions,
) -> None:
    """Ask a model one question, or have a conversation with it.

    \b
    tiny-llm chat                                         start a conversation
    tiny-llm chat "What is the capital of France?"        ask one question
    tiny-llm chat "Summarize this:" < notes.txt           ask about a file
    git diff | tiny-llm chat "Describe this change:"      ask about a command's output
    tiny-llm chat --system "You answer in one sentence."  say how to answer

    Only the answer goes to standard output. In a conversation, /help lists the commands: they set the system
    message, show the speed, save the messages and more. To enter several lines, paste them or type
    them between triple quotes. Ctrl-C stops an answer, Ctrl-D leaves. When a conversation outgrows the
    context, its oldest questions and answers are dropped.
    """
    _check_text(prompt, "PROMPT")
    _check_text(system, "--system")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
    asked = asked_sampling(sampling, max_tokens=_MAX_TOKENS, seed=seed, structured_outputs=asked_form(form))
    piped = None if prompt is not None or stdin_is_terminal() else _read_question()
    with _line_break_after_ctrl_c():
        llm = load(engine)
        _check_max_tokens(sampling.max_tokens, llm.max_model_len)

        from .conversation import Conversation

        conversation = Conversation(llm, asked.params(llm.sampling_defaults), system)
        if piped is not None:
            _answer_once(conversation, piped)
        elif prompt is not None:
            piped = _read_pipe()
            _answer_once(conversation, f"{prompt}\n\n{piped}" if piped else prompt)
        else:
            from .chat_loop import converse_at_terminal

            converse_at_terminal(conversation, keeps_history=history)


def _answer_once(conversation: "Conversation", question: str) -> None:
    """Stream one answer to standard output, and end its last line."""
    last = ""
    for delta in conversation.answer(conversation.prepare(question)):
        print(delta.text, end="", flush=True)
        last = delta.text or last
    if not last.endswith("\n"):
        print(flush=True)
    if conversation.cut_short is not None and sys.stderr.isatty():
        print(f"({conversation.cut_short})", file=sys.stderr)


def _read_question() -> str:
    """All of standard input, which is the question."""
    text = read_stdin().rstrip("\n")
    if not text.strip():
        raise typer.BadParameter("no prompt was given, and standard input is empty", param_hint="PROMPT")
    return text


def _read_pipe() -> str:
    """Standard input if data is piped into it; empty otherwise."""
    try:
        return read_stdin().rstrip("\n") if stdin_has_data(_WAIT_FOR_PIPE) else ""
    except TimeoutError as error:
        print(f"tiny-llm: warning: {error}; only the argument is used as the question", file=sys.stderr)
        return ""


def _check_text(text: str | None, name: str) -> None:
    """Reject bytes that are not text; Python keeps them as lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter("not UTF-8 text", param_hint=name) from error


def _check_max_tokens(max_tokens: int | None, context: int) -> None:
    if max_tokens is not None and max_tokens > context:
        raise typer.BadParameter(
            f"{max_tokens} exceeds the context of {context} tokens", param_hint="--max-tokens"
        )


@contextmanager
def _line_break_after_ctrl_c() -> Iterator[None]:
    """End the line in which a terminal shows ^C, so that the shell's prompt starts a new one."""
    try:
        yield
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        raise
