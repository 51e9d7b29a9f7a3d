"""Default sampling parameters: a model's recommended values, for parameters that a caller leaves out."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_llm_checkpoints.errors import ModelFileError, reading
from tiny_llm_checkpoints.recommendation import FILE, Recommendation, Setting, of_folder

from .sampling_params import SamplingParams

AUTO, NEUTRAL = "auto", "vllm"  # the model's recommendation; the engine's own defaults

Defaults = dict[str, Any]  # by the names of `SamplingParams`


def defaults_of(recommended: Recommendation) -> Defaults:
    """The defaults of a recommendation. Raises `ModelFileError`, with the field, for an invalid value."""
    with reading(recommended.file):
        for setting in recommended:
            _check(setting)
    return {setting.field: setting.value for setting in recommended}


def of_other_folder(name: str) -> Recommendation:
    """The recommendation of a folder that a caller names. Raises `ModelFileError` if it is missing."""
    folder = Path(os.path.expanduser(name))
    if not os.path.isfile(folder / FILE):
        raise ModelFileError(
            f"generation_config must be {AUTO!r}, {NEUTRAL!r} or a folder with a {FILE}, not {name!r}"
        )
    return of_folder(folder)


def fit_to_context(params: SamplingParams, num_prompt_tokens: int, context: int) -> SamplingParams:
    """The parameters, with `max_tokens` reduced to the tokens that the context has left after the prompt.

    Only for a default limit; a caller's own limit that does not fit is an error. If the
    prompt leaves no tokens, or fewer than `min_tokens`, the parameters are returned unchanged: the engine
    then rejects the request.
    """
    left = context - num_prompt_tokens
    if params.max_tokens is None or params.max_tokens <= left or left < max(1, params.min_tokens):
        return params
    return replace(params, max_tokens=left)


def _check(setting: Setting) -> None:
    """Raise ValueError for a value that no request may have."""
    try:
        SamplingParams.from_options(**{setting.field: setting.value})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{setting.name} is {str(setting.value)[:60]}: {str(error)[:200]}") from error
