"""Sampling parameters for the fields that a request leaves out: the operator's, then the model's."""

from collections.abc import Mapping
from typing import Any

from tiny_llm import ConfigError, SamplingParams
from tiny_llm_checkpoints.suggestions import unknown_name

PARAMETERS = {  # from the names of generation_config.json, as in vLLM, to those of `SamplingParams`
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",  # not in vLLM's list; `SMOLLM2_SAMPLING` sets it
    "max_new_tokens": "max_tokens",
}


def checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `overrides` under the names of `SamplingParams`; raise `ConfigError` naming what is wrong.

    >>> checked_overrides({"temperature": 0.2, "max_new_tokens": 512})
    {'temperature': 0.2, 'max_tokens': 512}
    """
    for name, value in overrides.items():
        if name not in PARAMETERS:
            problem = unknown_name("parameter", name[:60], PARAMETERS)
            raise ConfigError(f"override_generation_config: {problem}")
        try:
            if value is None:
                raise ValueError(f"{name} must be a number, not null")
            SamplingParams.from_options(**{PARAMETERS[name]: value})
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"override_generation_config: {str(error)[:200]}") from error
    return {PARAMETERS[name]: value for name, value in overrides.items()}


def described(overrides: Mapping[str, Any], of_model: Mapping[str, Any], model_source: str | None) -> str:
    """Describe the defaults in one line, grouped by their source. model_source: where `of_model` comes from.

    >>> described({"temperature": 0.2}, {"temperature": 0.7, "top_p": 0.9}, "generation_config.json")
    'temperature 0.2 (--override-generation-config); top_p 0.9 (generation_config.json)'
    """
    left = {name: value for name, value in of_model.items() if name not in overrides}
    groups = [(overrides, "--override-generation-config"), (left, model_source)]
    return "; ".join(f"{_listed(values)} ({source})" for values, source in groups if values)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
