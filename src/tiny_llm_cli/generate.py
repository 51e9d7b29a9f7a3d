"""`tiny-llm generate`: many prompts at once, from arguments, files or standard input."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from .engine import AskedSampling, asked_sampling, load
from .form_options import FormOptions, asked_form
from .lines import STDIN, Line, name_of, read_lines
from .options import EngineOptions, SamplingOptions, takes_groups
from .stdin import stdin_is_terminal

if TYPE_CHECKING:
    from tiny_llm import LLM, RequestOutput, SamplingParams

    from .batch import BatchRequest
    from .prompts import PromptRequest

_MAX_TOKENS = 128  # of an answer, if neither the user nor the model sets a limit
_SAMPLING = "Sampling"


@takes_groups(
    shown={
        "max_tokens": "the model's recommendation, or 128; lowered to what the context has left",
        "temperature": "the model's recommendation, or 0 (1 if --n is above 1)",
        "seed": "the position of each prompt in the list, so the same command gives the same text",
    }
)
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Texts to continue. Without any, and without --file: the lines of standard input.",
        ),
    ] = None,
    *,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            "-f",
            help="Read prompts from a file, or from standard input (-): one per line, as text or JSON. "
            "Repeat the option for several files.",
            metavar="FILE",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask each prompt as a question, through the chat template.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object for each prompt, in order, with token ids, finish reasons and "
            "log-probabilities.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the results to a file.",
            metavar="FILE",
            show_default="standard output",
        ),
    ] = None,
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress", help="Show a progress bar on standard error if it is a terminal."
        ),
    ] = True,
    sampling: SamplingOptions,
    n: Annotated[
        int, typer.Option(help="The number of completions of each prompt.", rich_help_panel=_SAMPLING)
    ] = 1,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Do not stop at end-of-sequence tokens.", rich_help_panel=_SAMPLING
        ),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json, print the log-probabilities of each token and of the N most likely tokens.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json, print the log-probabilities of each prompt token except the first, "
            "and of the N most likely tokens.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Stop at this token. Repeat the option for several.",
            metavar="ID",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    include_stop: Annotated[
        bool,
        typer.Option(
            "--include-stop",
            help="Include the stop text or stop token in the answer.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False,
    show_special_tokens: Annotated[
        bool,
        typer.Option(
            "--show-special-tokens", help="Include special tokens in the text.", rich_help_panel=_SAMPLING
        ),
    ] = False,
    form: FormOptions,
    engine: EngineOptions,
) -> None:
    """Complete many prompts together.

    \b
    tiny-llm generate "Once upon a time" --n 3
    tiny-llm generate --chat --json "Name a color." "Name a fruit." > answers.jsonl
    echo '{"id": 7, "messages": [{"role": "user", "content": "Hi"}]}' | tiny-llm generate --json
    tiny-llm generate --chat "Is water wet?" --choice yes --choice no
    tiny-llm generate --chat "Describe Paris as JSON." --json-schema city.json

    A line of JSON has "prompt" (text or token ids) or "messages" (a conversation), and may have an "id",
    which comes back with the result, and sampling parameters ("temperature", "max_tokens", ...), which
    override the options. A file's lines are JSON if its name ends in .jsonl or if its first line is such an
    object. Every prompt is checked before any runs; an error names the file and the line.

    OpenAI's batch files ("custom_id", "url" and "body" on each line) are answered as `tiny-llm serve` would
    answer them, and the results have OpenAI's batch format. If a line fails, its result is the error, the
    other lines are still answered, and the exit code is 1. Sampling options apply to requests that leave
    them out.
    """
    asked = asked_sampling(
        sampling,
        max_tokens=_MAX_TOKENS,
        n=n,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=stop_token_id or None,
        include_stop_str_in_output=include_stop,
        skip_special_tokens=not show_special_tokens,
        structured_outputs=asked_form(form),
    )
    arguments = prompts or []
    files = _files(arguments, file or [])
    lines = read_lines(files)
    if not arguments and not lines:
        raise ValueError(f"no prompts in {', '.join(map(name_of, files))}")

    from .batch import is_batch, read_batch

    if is_batch(lines):
        _check_batch(arguments, prompt_logprobs)
        with _opened(output) as target:
            _run_batch(load(engine), read_batch(lines), asked, target, progress)
    else:
        for option, value in (("--logprobs", logprobs), ("--prompt-logprobs", prompt_logprobs)):
            if value is not None and not as_json:
                raise typer.BadParameter("only JSON output shows them: add --json", param_hint=option)
        requests = _read_prompts(arguments, lines, asked, chat)
        with _opened(output) as target:
            _run_prompts(load(engine), requests, as_json, target, progress)


def _files(arguments: Sequence[str], files: Sequence[Path]) -> Sequence[Path]:
    """The files to read: standard input if there is nothing else. Raises a usage error for a terminal."""
    if arguments or files:
        return files
    if stdin_is_terminal():
        raise typer.BadParameter(
            "give prompts as arguments, with --file, or on standard input", param_hint="PROMPT"
        )
    return [STDIN]


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Where results go, opened before the model is loaded, so that an error comes early.

    A file keeps its content until `_emptied`.
    """
    if output is None:
        sys.stdout.write("")  # raises if it is closed
    with nullcontext(sys.stdout) if output is None else output.open("a", encoding="utf-8") as target:
        yield target


def _emptied(target: TextIO) -> TextIO:
    """Remove the earlier content of a file, right before the first result."""
    if target is not sys.stdout and target.seekable():
        target.truncate(0)
    return target


# ---- prompts ----


def _read_prompts(
    arguments: Sequence[str], lines: Sequence[Line], asked: AskedSampling, chat: bool
) -> "list[PromptRequest]":
    from .prompts import from_arguments, from_lines

    requests = from_arguments(arguments, asked) + from_lines(lines, asked)
    return [request.as_question() for request in requests] if chat else requests


def _run_prompts(
    llm: "LLM", requests: "Sequence[PromptRequest]", as_json: bool, target: TextIO, progress: bool
) -> None:
    from .render import as_json_line, as_text

    prompts = [_encoded(llm, request) for request in requests]
    each = [_params(llm, *pair) for pair in zip(requests, prompts, strict=True)]
    for request, prompt, params in zip(requests, prompts, each, strict=True):
        _check_that_it_fits(llm, request, prompt, params)
    results = llm.generate(prompts, each, use_tqdm=progress)
    titled = len(requests) > 1 or any(params.n > 1 for params in each)
    _emptied(target)
    for request, result in zip(requests, results, strict=True):
        print(as_json_line(request, result) if as_json else as_text(request, result, titled), file=target)
    _check_failures(results)


def _encoded(llm: "LLM", request: "PromptRequest") -> str | list[int]:
    """A prompt as the engine takes it: a conversation goes through the chat template."""
    if request.messages is None:
        assert request.prompt is not None
        return request.prompt
    if llm.chat_template is None:
        raise ValueError(
            f"{llm.model_name} has no chat template: leave out --chat, "
            "and give prompts as text, not as messages"
        )
    with _naming(request.place):
        tokens: list[int] = llm.chat_template.encode(request.messages, llm.tokenizer)
    return tokens


def _params(llm: "LLM", request: "PromptRequest", prompt: str | list[int]) -> "SamplingParams":
    """The sampling parameters of a prompt; a default limit is lowered to what the context can hold."""
    from tiny_llm.generation_defaults import fit_to_context

    params = request.asked.params(llm.sampling_defaults)
    if "max_tokens" in request.asked.given:
        return params
    tokens = llm.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    fitting: SamplingParams = fit_to_context(params, len(tokens), llm.max_model_len)
    return fitting


def _check_that_it_fits(
    llm: "LLM", request: "PromptRequest", prompt: str | list[int], params: "SamplingParams"
) -> None:
    """Raise ValueError, which names the line, for a prompt of a file that can never run."""
    if request.place is not None:
        with _naming(request.place):
            llm.engine.request(prompt, params)


@contextmanager
def _naming(place: str | None) -> Iterator[None]:
    """Add the file and the line to the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        if place is None:
            raise
        raise ValueError(f"{place}: {error}") from error


def _check_failures(results: "Sequence[RequestOutput]") -> None:
    """Raise `RequestFailedError` if completions failed; all others have been written."""
    from tiny_llm import RequestFailedError

    completions = [(result.request_id, output) for result in results for output in result.outputs]
    failed = [(request_id, output.error) for request_id, output in completions if output.error is not None]
    if failed:
        request_id, first = failed[0]
        raise RequestFailedError(
            f"{len(failed)} of {len(completions)} completions failed; the first: {first}", request_id
        )


# ---- batch files ----


def _check_batch(arguments: Sequence[str], prompt_logprobs: int | None) -> None:
    """Raise a usage error for arguments and options that a batch file does not allow."""
    if arguments:
        raise typer.BadParameter("a batch file cannot be combined with prompts", param_hint="PROMPT")
    if prompt_logprobs is not None:
        raise typer.BadParameter(
            "OpenAI's batch format has no prompt log-probabilities", param_hint="--prompt-logprobs"
        )


def _run_batch(
    llm: "LLM", requests: "Sequence[BatchRequest]", asked: AskedSampling, target: TextIO, progress: bool
) -> None:
    from .batch import other_models
    from .batch_run import run_batch
    from .progress import request_progress

    if others := other_models(requests, llm.model_name):
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        warnings.warn(
            f"the batch asks for the model {names}, but {llm.model_name} answers (see --model)",
            UserWarning,
            stacklevel=1,
        )
    with request_progress(len(requests), progress) as report:
        outcome = run_batch(llm, requests, asked.given, _emptied(target), report)
    if outcome.num_failed:
        count = f"{outcome.num_failed} of {outcome.num_requests} requests failed"
        raise ValueError(f"{count}; the first: {outcome.first_failure}")
