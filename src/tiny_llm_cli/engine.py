"""From options to an engine and sampling parameters: the one place where the commands meet `tiny_llm`."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from .options import EngineOptions, SamplingOptions

if TYPE_CHECKING:
    from tiny_llm import LLM, SamplingParams


def load(options: EngineOptions, **others: Any) -> "LLM":
    """The model of `options` in an engine of its own; `others` are fields that only one command has."""
    from tiny_llm import LLM

    return LLM(**asdict(options), **others)


def check(options: EngineOptions, **others: Any) -> None:
    """Refuse what no model could run with, before one is loaded."""
    from tiny_llm import EngineConfig

    values = {**asdict(options), **others}
    for name in ("model", "chat_template_content_format"):
        del values[name]
    EngineConfig.from_options(**values)


def sampling_params(options: SamplingOptions, **others: Any) -> "SamplingParams":
    """The `SamplingParams` of `options`; `others` are fields of it that only one command has."""
    from tiny_llm import SamplingParams

    values = {field.name: getattr(options, field.name) for field in fields(options)}
    values["logit_bias"] = dict(values["logit_bias"] or []) or None
    greedy_unless_several = 0.0 if others.get("n", 1) == 1 else 1.0
    if values["temperature"] is None:
        values["temperature"] = greedy_unless_several
    return SamplingParams(**{**values, **others})


def control_token_ids(llm: "LLM") -> frozenset[int]:
    """The ids of tokens that are no text, such as "<|im_end|>"."""
    return frozenset(_single_ids(llm, llm.tokenizer.control_tokens))


def _single_ids(llm: "LLM", tokens: Iterable[str]) -> Iterable[int]:
    for token in tokens:
        yield from llm.tokenizer.encode(token)
