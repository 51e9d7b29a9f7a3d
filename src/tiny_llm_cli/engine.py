"""From options to an engine and sampling parameters: the one place where the commands meet `tiny_llm`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
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


@dataclass(frozen=True)
class AskedSampling:
    """The sampling parameters that a command was given; `params` adds what was left out.

    own: what this command uses where neither its user nor the model says anything.
    """

    given: Mapping[str, Any]
    own: Mapping[str, Any]

    def but(self, **given: Any) -> "AskedSampling":
        """The same with other parameters given, or given otherwise."""
        return replace(self, given={**self.given, **given})

    def params(self, recommended: Mapping[str, Any] | None = None) -> "SamplingParams":
        """What was given, then what the model recommends, then the command's own; `SamplingParamsError`."""
        from tiny_llm import SamplingParams

        return SamplingParams.from_options(**{**self.own, **(recommended or {}), **self.given})


def asked_sampling(options: SamplingOptions, *, max_tokens: int, **others: Any) -> AskedSampling:
    """What `options` ask for; `others` are fields that only one command has.

    max_tokens: the command's own, for an answer whose length nothing else limits. Raises
    `SamplingParamsError` for what no model could run with.
    """
    given = {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}
    if options.logit_bias is not None:
        given["logit_bias"] = dict(options.logit_bias) or None
    greedy_unless_several = 0.0 if others.get("n", 1) == 1 else 1.0
    own = {"temperature": greedy_unless_several, "max_tokens": max_tokens}
    asked = AskedSampling({**given, **others}, own)
    asked.params()
    return asked


def control_token_ids(llm: "LLM") -> frozenset[int]:
    """The ids of tokens that are no text, such as "<|im_end|>"."""
    return frozenset(_single_ids(llm, llm.tokenizer.control_tokens))


def _single_ids(llm: "LLM", tokens: Iterable[str]) -> Iterable[int]:
    for token in tokens:
        yield from llm.tokenizer.encode(token)
