"""Sampling parameters that a model's author recommends: generation_config.json, or a GGUF's general.sampling.

They apply where a caller leaves a parameter out. Which fields count is vLLM's choice: `do_sample` has no
effect, and fields of other kinds of sampling (beams, mirostat, XTC) are ignored, because they are
recommendations and not part of the model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ModelFileError, reading
from .json_file import read_json
from .model_config import ModelConfig
from .sampling_params import SamplingParams
from .token_ids import token_ids

AUTO, NEUTRAL = "auto", "vllm"  # what the model's files say; the engine's own defaults
FILE = "generation_config.json"

_JSON_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_GGUF_FIELDS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}

Defaults = dict[str, Any]  # by the names of `SamplingParams`


@dataclass(frozen=True)
class Recommendation:
    """What a file recommends, not yet checked. fields: from the file's names to those of `SamplingParams`."""

    file: Path
    settings: Mapping[str, Any]
    fields: Mapping[str, str]

    def defaults(self) -> Defaults:
        """The sampling defaults. `ModelFileError` naming the field of a value that no request may have."""
        with reading(self.file):
            return _defaults(self.settings, self.fields)


def of_folder(folder: Path) -> Recommendation:
    """What a folder's generation_config.json recommends; nothing where there is none."""
    file = folder / FILE
    return Recommendation(file, read_json(file) if file.exists() else {}, _JSON_FIELDS)


def of_gguf(file: Path, metadata: Mapping[str, Any]) -> Recommendation:
    """What a GGUF file recommends."""
    return Recommendation(file, metadata, _GGUF_FIELDS)


def of_other_folder(name: str) -> Recommendation:
    """What the folder recommends that a caller names. `ModelFileError` where it has no such file."""
    folder = Path(os.path.expanduser(name))
    if not os.path.isfile(folder / FILE):
        raise ModelFileError(
            f"generation_config must be {AUTO!r}, {NEUTRAL!r} or a folder with a {FILE}, not {name!r}"
        )
    return of_folder(folder)


def with_its_ends(config: ModelConfig, recommended: Recommendation) -> ModelConfig:
    """The configuration with the end-of-sequence ids of a generation_config.json beside its own."""
    with reading(recommended.file):
        ids = token_ids(recommended.settings, "eos_token_id")
        return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *ids})))


def fitted(params: SamplingParams, num_prompt_tokens: int, context: int) -> SamplingParams:
    """Parameters whose recommended `max_tokens` is no more than what the context has left after the prompt.

    Only for a limit that the model recommends: one that a caller gives is refused where it does not fit. A
    prompt that leaves nothing is refused as before.
    """
    left = context - num_prompt_tokens
    if params.max_tokens is None or params.max_tokens <= left or left < max(1, params.min_tokens):
        return params
    return replace(params, max_tokens=left)


def _defaults(found: Mapping[str, Any], fields: Mapping[str, str]) -> Defaults:
    defaults = {}
    for name, field in fields.items():
        if (value := found.get(name)) is not None:
            defaults[field] = _shortest(value)
            _check(name, field, defaults[field])
    return defaults


def _check(name: str, field: str, value: Any) -> None:
    """Refuse a value that no request could have."""
    try:
        SamplingParams.from_options(**{field: value})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {str(value)[:60]}: {str(error)[:200]}") from error


def _shortest(value: Any) -> Any:
    """A GGUF file rounds 0.95 to float32: the shortest number that it can have been is meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
