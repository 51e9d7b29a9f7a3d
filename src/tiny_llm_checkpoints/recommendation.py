"""What a model's files recommend for sampling: generation_config.json, or a GGUF's general.sampling.

Which fields count is vLLM's choice: `do_sample` has no effect, and fields of other kinds of sampling (beams,
mirostat, XTC) are ignored, because they are recommendations and not part of the model. Knows nothing of
requests: the engine checks the values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
    """One recommended value. name: the file's word for it; field: the one of `SamplingParams`."""

    name: str
    field: str
    value: Any


@dataclass(frozen=True)
class Recommendation:
    """What a file recommends, not yet checked. fields: from the file's names to those of `SamplingParams`."""

    file: Path
    settings: Mapping[str, Any]
    fields: Mapping[str, str]

    def __iter__(self) -> Iterator[Setting]:
        """The values that are there, in the order of `fields`."""
        for name, field in self.fields.items():
            if (value := self.settings.get(name)) is not None:
                yield Setting(name, field, _shortest(value))


def of_folder(folder: Path) -> Recommendation:
    """What a folder's generation_config.json recommends; nothing where there is none."""
    file = folder / FILE
    return Recommendation(file, read_json(file) if file.exists() else {}, _JSON_FIELDS)


def of_gguf(file: Path, metadata: Mapping[str, Any]) -> Recommendation:
    """What a GGUF file recommends."""
    return Recommendation(file, metadata, _GGUF_FIELDS)


def with_its_ends(config: ModelConfig, recommended: Recommendation) -> ModelConfig:
    """The configuration with the end-of-sequence ids of a generation_config.json beside its own."""
    with reading(recommended.file):
        ids = token_ids(recommended.settings, "eos_token_id")
        return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *ids})))


def _shortest(value: Any) -> Any:
    """A GGUF file rounds 0.95 to float32: the shortest number that it can have been is meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
