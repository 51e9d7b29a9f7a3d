"""Checks of a model that take milliseconds: a server makes them before it starts to listen."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .options import EngineOptions

if TYPE_CHECKING:
    from pathlib import Path

    from tiny_llm import EngineConfig
    from tiny_llm_checkpoints.model_config import ModelConfig
    from tiny_llm_checkpoints.recommendation import Recommendation


def check_model(options: EngineOptions, **others: Any) -> int | None:
    """Check the engine's options, and that the model's files describe a model that can run with them.

    Returns the longest prompt + output in tokens. No weights are read. If the files may have to be
    downloaded, they are not checked, and the result is None. others: engine options that only some commands
    have. Raises `ConfigError` and `ModelFileError`, as loading the model would.
    """
    from tiny_llm.loader import LOADING_BYTES
    from tiny_llm.resources import requiring

    from tiny_llm_checkpoints.hub import find_model

    config = _engine_config(options, others)
    if options.model is not None and _may_be_on_hub(options.model):
        return None
    path = find_model(options.model)
    with requiring(f"the model {path}", LOADING_BYTES):
        model, recommended = _description(path)
    context = _check_pool(config, model)
    _check_sampling_defaults(config.generation_config, recommended)
    return context


def _engine_config(options: EngineOptions, others: dict[str, Any]) -> "EngineConfig":
    from tiny_llm import ConfigError, EngineConfig
    from tiny_llm_checkpoints.chat_template import CONTENT_FORMATS

    values = {**asdict(options), **others}
    del values["model"]
    content_format = values.pop("chat_template_content_format")
    if content_format not in CONTENT_FORMATS:
        known = ", ".join(CONTENT_FORMATS)
        raise ConfigError(f"chat_template_content_format must be one of {known}, not {content_format!r}")
    return EngineConfig.from_options(**values)


def _may_be_on_hub(name: str) -> bool:
    """Whether a name that is not a path looks like `owner/name` or `owner/name/FILE.gguf`."""
    from tiny_llm_checkpoints.hub import local_path

    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[^/]+(/.*)?", name) is not None
    return is_hub_id and not local_path(name).exists() and not re.fullmatch(r"[^/]+/[^/]+\.gguf", name)


def _description(path: "Path") -> "tuple[ModelConfig, Recommendation]":
    """The configuration in a GGUF file or a folder, and the sampling parameters that it recommends."""
    from tiny_llm_checkpoints.errors import reading
    from tiny_llm_checkpoints.gguf_config import gguf_config
    from tiny_llm_checkpoints.gguf_split import read_gguf_files
    from tiny_llm_checkpoints.hf_config import model_config
    from tiny_llm_checkpoints.json_file import read_json
    from tiny_llm_checkpoints.readers import read_checkpoint
    from tiny_llm_checkpoints.recommendation import of_folder, of_gguf
    from tiny_llm_checkpoints.weight_files import weight_files

    if path.is_dir():
        weight_files(path)
        with reading(path / "config.json"):
            return model_config(read_json(path / "config.json"), ()), of_folder(path)
    if path.suffix == ".safetensors" or not path.is_file():
        read_checkpoint(path)  # raises the error that says why this is not a model
    file = read_gguf_files(path)
    with reading(path):
        return gguf_config(file, frozenset()), of_gguf(path, file.metadata)


def _check_pool(config: "EngineConfig", model: "ModelConfig") -> int:
    """The longest prompt + output in tokens.

    Raises `ConfigError` if the KV pool or the swap space does not fit the model or the machine.
    """
    from tiny_llm.kv_pool import DTYPES

    size = DTYPES[config.kv_cache_dtype].size
    config.swap_blocks(model, size)
    return config.model_len(model, size)


def _check_sampling_defaults(generation_config: str, of_model: "Recommendation") -> None:
    from tiny_llm.generation_defaults import AUTO, NEUTRAL, defaults_of, of_other_folder

    if generation_config != NEUTRAL:
        defaults_of(of_model if generation_config == AUTO else of_other_folder(generation_config))
