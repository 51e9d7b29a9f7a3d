"""`tiny-llm generate`: many prompts at once, from arguments, files or standard input."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .engine import asked_sampling, load
from .options import EngineOptions, SamplingOptions, takes_groups

if TYPE_CHECKING:
    from tiny_llm import LLM, RequestOutput, SamplingParams

    from .prompts import PromptRequest

_MAX_TOKENS = 128  # of an answer, where nothing else limits it


@takes_groups()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...", help="Texts to continue. Without any, and without --file: lines of stdin."
        ),
    ] = None,
    *,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A prompt on each line, or for .jsonl an object with `prompt` (text or token ids) and any "
            "sampling parameters of its own; - is standard input. May be repeated.",
            metavar="FILE",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask each prompt as a question, through the chat template.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON line a prompt, in order, with token ids, finish reasons, logprobs."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write there.", metavar="FILE", show_default="standard output")
    ] = None,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="A bar on stderr, where that is a terminal.")
    ] = True,
    n: Annotated[
        int,
        typer.Option(
            help="Completions of each prompt; above 1 the default temperature is 1.",
            rich_help_panel="Sampling",
        ),
    ] = 1,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens.", rich_help_panel="Sampling"),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: log-probabilities of each token and of this many likeliest.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: the same for each token of the prompt but the first.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(
            help="End the answer with this token; may be repeated.", metavar="ID", rich_help_panel="Sampling"
        ),
    ] = None,
    include_stop: Annotated[
        bool,
        typer.Option(
            "--include-stop", help="Let the text end with what stopped it.", rich_help_panel="Sampling"
        ),
    ] = False,
    show_special_tokens: Annotated[
        bool,
        typer.Option("--show-special-tokens", help="Let control tokens be text.", rich_help_panel="Sampling"),
    ] = False,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Continue many prompts, all of them together.

    \b
    tiny-llm generate "Once upon a time" --n 3
    tiny-llm generate --file prompts.txt --json --max-tokens 64 > answers.jsonl

    Without --seed a prompt's randomness comes from its place in the list: the same command gives the same
    text. A prompt that cannot run is refused before any runs.
    """
    from .prompts import read_prompts

    for option, value in (("--logprobs", logprobs), ("--prompt-logprobs", prompt_logprobs)):
        if value is not None and not as_json:
            raise typer.BadParameter("shown in JSON only: add --json", param_hint=option)
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
    )
    requests = read_prompts(prompts or [], file or [], asked)
    with nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8") as target:
        llm = load(engine)

        from .render import as_json_line, as_text

        each = [_params(llm, request, chat) for request in requests]
        if chat:
            results = llm.chat([request.messages for request in requests], each, use_tqdm=progress)
        else:
            results = llm.generate([request.prompt for request in requests], each, use_tqdm=progress)
        titled = len(requests) > 1 or any(params.n > 1 for params in each)
        for request, result in zip(requests, results, strict=True):
            prompt = request.prompt
            print(as_json_line(prompt, result) if as_json else as_text(prompt, result, titled), file=target)
    _check_failures(results)


def _check_failures(results: "Sequence[RequestOutput]") -> None:
    """Raise `RequestFailedError` for completions that failed, once all others are written."""
    from tiny_llm import RequestFailedError

    completions = [(result.request_id, output) for result in results for output in result.outputs]
    failed = [(request_id, output.error) for request_id, output in completions if output.error is not None]
    if failed:
        request_id, first = failed[0]
        raise RequestFailedError(
            f"{len(failed)} of {len(completions)} completions failed; the first: {first}", request_id
        )


def _params(llm: "LLM", request: "PromptRequest", chat: bool) -> "SamplingParams":
    """What a prompt runs with; a limit that the model recommends is less where less fits."""
    from tiny_llm.generation_defaults import fitted

    params = request.asked.params(llm.sampling_defaults)
    if "max_tokens" in request.asked.given or "max_tokens" not in llm.sampling_defaults:
        return params
    fitting: SamplingParams = fitted(params, _num_tokens(llm, request, chat), llm.max_model_len)
    return fitting


def _num_tokens(llm: "LLM", request: "PromptRequest", chat: bool) -> int:
    if not isinstance(request.prompt, str):
        return len(request.prompt)
    if chat and llm.chat_template is not None:
        return len(llm.chat_template.encode(request.messages, llm.tokenizer))
    return len(llm.tokenizer.encode(request.prompt, add_special_tokens=True))
