"""Checks of a benchmark's arguments before the model is loaded, so that a mistake does not cost a run."""

from typing import TYPE_CHECKING, NamedTuple

import typer

from .engine import load_silently
from .loading_notice import loading_notice
from .model_check import check_model
from .options import EngineOptions

if TYPE_CHECKING:
    from tiny_llm import LLM


class LongestRequest(NamedTuple):
    """The longest request of a benchmark, in tokens, and the options that set its length."""

    options: str
    prompt_tokens: int
    output_tokens: int


def load_for(engine: EngineOptions, *requests: LongestRequest) -> "LLM":
    """Load the model if it can run these requests. Raises `BadParameter` for one that exceeds the context.

    The context is known before the model is loaded, unless the model may have to be downloaded.
    """
    with loading_notice():
        context = check_model(engine)
        if context is not None:
            _check_lengths(requests, context)
        llm = load_silently(engine)
    _check_lengths(requests, llm.max_model_len)
    return llm


def check_concurrency(engine: EngineOptions, max_concurrency: int) -> None:
    """Raise `BadParameter` if the engine's queue would reject some of the requests."""
    waiting = engine.max_num_waiting
    if waiting is not None and max_concurrency > engine.max_num_seqs + waiting:
        raise typer.BadParameter(
            f"{max_concurrency} is more than --max-num-seqs ({engine.max_num_seqs}) and --max-num-waiting "
            f"({waiting}) together",
            param_hint="--max-concurrency",
        )


def check_api_key(key: str | None) -> None:
    """Raise `BadParameter` for a key that an HTTP header cannot carry."""
    if key is not None and not (key.isascii() and key.isprintable()):
        raise typer.BadParameter("must have only printable ASCII characters", param_hint="--api-key")


def _check_lengths(requests: tuple[LongestRequest, ...], context: int) -> None:
    for options, prompt, output in requests:
        if prompt + output > context:
            raise typer.BadParameter(
                f"{prompt} prompt tokens and {output} output token{'s' if output > 1 else ''} exceed the "
                f"context of {context}",
                param_hint=options,
            )
