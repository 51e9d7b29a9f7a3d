"""Sampling parameters that a model's files recommend: generation_config.json, or a GGUF's general.sampling.

The fields that count are those that vLLM uses: `do_sample` has no effect, and fields of other kinds of
sampling (beams, mirostat, XTC) are ignored. Does not know which values are valid: the engine checks them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .embedded import packaged_sampling
from .errors import reading
from .json_file import read_json
from .model_config import ModelConfig
from .token_ids import token_ids

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


class Setting(NamedTuple):
    """One recommended value. name: the file's name for it; field: the field of `SamplingParams`."""

    name: str
    field: str
    value: Any


@dataclass(frozen=True)
class Recommendation:
    """Recommended sampling parameters, not yet checked.

    file: the file that they belong to. settings: values by the file's own names. fields: the fields of
    `SamplingParams` by the file's names. source: where the values come from, for people to read.
    """

    file: Path
    settings: Mapping[str, Any]
    fields: Mapping[str, str]
    source: str

    def __iter__(self) -> Iterator[Setting]:
        """The values that the file has, in the order of `fields`."""
        for name, field in self.fields.items():
            if (value := self.settings.get(name)) is not None:
                yield Setting(name, field, _shortest(value))


def of_folder(folder: Path) -> Recommendation:
    """What a folder's generation_config.json recommends; nothing if the folder does not have that file."""
    file = folder / FILE
    return Recommendation(file, read_json(file) if file.exists() else {}, _JSON_FIELDS, FILE)


def of_gguf(file: Path, metadata: Mapping[str, Any]) -> Recommendation:
    """The recommendation in a GGUF file, or else the one that `packaged_sampling` has for the file."""
    recommended = Recommendation(file, metadata, _GGUF_FIELDS, "general.sampling")
    packaged = None if any(recommended) else packaged_sampling(file)
    if packaged is None:
        return recommended
    return Recommendation(file, packaged.params, {name: name for name in packaged.params}, packaged.source)


def with_its_ends(config: ModelConfig, recommended: Recommendation) -> ModelConfig:
    """The configuration with the end-of-sequence ids of a generation_config.json added to its own."""
    with reading(recommended.file):
        ids = token_ids(recommended.settings, "eos_token_id")
        return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *ids})))


def _shortest(value: Any) -> Any:
    """Undo the rounding of a GGUF file to float32: 0.95 is stored as 0.949999988, and 0.95 is meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
