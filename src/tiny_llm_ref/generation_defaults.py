"""Sampling parameters that a model's author recommends: they apply where a caller leaves a parameter out."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_llm_checkpoints.errors import ModelFileError, reading
from tiny_llm_checkpoints.recommendation import FILE, Recommendation, Setting, of_folder

from .sampling_params import SamplingParams

AUTO, NEUTRAL = "auto", "vllm"  # what the model's files say; the engine's own defaults

Defaults = dict[str, Any]  # by the names of `SamplingParams`


def defaults_of(recommended: Recommendation) -> Defaults:
    """The sampling defaults. `ModelFileError` naming the field of a value that no request may have."""
    with reading(recommended.file):
        for setting in recommended:
            _check(setting)
    return {setting.field: setting.value for setting in recommended}


def of_other_folder(name: str) -> Recommendation:
    """What the folder recommends that a caller names. `ModelFileError` where it has no such file."""
    folder = Path(os.path.expanduser(name))
    if not os.path.isfile(folder / FILE):
        raise ModelFileError(
            f"generation_config must be {AUTO!r}, {NEUTRAL!r} or a folder with a {FILE}, not {name!r}"
        )
    return of_folder(folder)


def fitted(params: SamplingParams, num_prompt_tokens: int, context: int) -> SamplingParams:
    """Parameters whose recommended `max_tokens` is no more than what the context has left after the prompt.

    Only for a limit that the model recommends: one that a caller gives is refused where it does not fit. A
    prompt that leaves nothing is refused as before.
    """
    left = context - num_prompt_tokens
    if params.max_tokens is None or params.max_tokens <= left or left < max(1, params.min_tokens):
        return params
    return replace(params, max_tokens=left)


def _check(setting: Setting) -> None:
    """Refuse a value that no request could have."""
    try:
        SamplingParams.from_options(**{setting.field: setting.value})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{setting.name} is {str(setting.value)[:60]}: {str(error)[:200]}") from error
