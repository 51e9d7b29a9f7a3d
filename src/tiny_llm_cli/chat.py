"""`tiny-llm chat`: one question from the command line or a pipe, or a conversation at a prompt."""

import os
import secrets
import select
import stat
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .engine import asked_sampling, load
from .options import EngineOptions, SamplingOptions, takes_groups
from .stdin import read_stdin, stdin_is_terminal

if TYPE_CHECKING:
    from .conversation import Conversation

_MAX_TOKENS = 512  # of an answer, where nothing else limits it
_WAIT_FOR_PIPE = 1.0  # seconds, after the model is loaded


@takes_groups(max_num_seqs=1)
def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The question. Without it: what is piped in, or a conversation."
        ),
    ] = None,
    *,
    system: Annotated[
        str | None, typer.Option(help="A system message for the whole conversation.", metavar="TEXT")
    ] = None,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Ask a model one question, or talk with it.

    \b
    tiny-llm chat "What is the capital of France?"
    tiny-llm chat "Summarize this:" < notes.txt
    tiny-llm chat --temperature 0.7 --system "You answer in one sentence."

    Only the answer goes to standard output. With a question and a pipe, the question comes first. In a
    conversation /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.
    """
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
    asked = asked_sampling(sampling, max_tokens=_MAX_TOKENS, seed=seed)
    piped = None if prompt is not None or stdin_is_terminal() else _read_stdin()
    llm = load(engine)

    from .conversation import Conversation, converse

    conversation = Conversation(llm, asked.params(llm.sampling_defaults), system)
    if piped is not None:
        _answer_once(conversation, piped)
    elif prompt is not None:
        piped = _read_stdin_if_it_comes()
        _answer_once(conversation, f"{prompt}\n\n{piped}" if piped else prompt)
    else:
        converse(conversation, llm.model_name)


def _answer_once(conversation: "Conversation", text: str) -> None:
    """Stream one answer to standard output, and end its last line."""
    last = ""
    for delta in conversation.answer(text):
        print(delta.text, end="", flush=True)
        last = delta.text or last
    if not last.endswith("\n"):
        print(flush=True)
    if conversation.cut_short is not None and sys.stderr.isatty():
        print(f"({conversation.cut_short})", file=sys.stderr)


def _read_stdin() -> str:
    """All of standard input, which is the prompt."""
    text = read_stdin().rstrip("\n")
    if not text.strip():
        raise typer.BadParameter("there is none, and standard input is empty", param_hint="PROMPT")
    return text


def _read_stdin_if_it_comes() -> str:
    """Standard input where something is piped in beside the argument; empty where nothing is.

    A program that starts this one may leave an idle pipe behind that never ends: what has not begun to
    arrive after a second is not waited for, and that is said.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or not a file at all
        return ""
    if stat.S_ISCHR(mode):  # a terminal, or /dev/null
        return ""
    if not stat.S_ISREG(mode) and not select.select([sys.stdin], [], [], _WAIT_FOR_PIPE)[0]:
        print(
            f"tiny-llm: warning: nothing came through the pipe for {_WAIT_FOR_PIPE:.0f} s: "
            "the argument alone is the prompt",
            file=sys.stderr,
        )
        return ""
    return sys.stdin.read().rstrip("\n")
