"""Turns the options of a command into an engine and sampling parameters of `tiny_llm`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .options import EngineOptions, SamplingOptions

if TYPE_CHECKING:
    from tiny_llm import LLM, SamplingParams


def load(options: EngineOptions, **others: Any) -> "LLM":
    """Load the model of `options` into an engine. others: engine options that only some commands have."""
    from tiny_llm import LLM

    return LLM(**asdict(options), **others)


@dataclass(frozen=True)
class AskedSampling:
    """The sampling parameters that a command was given; `params` fills in the others.

    given: the parameters that the user has set. own: the command's defaults, for parameters that neither the
    user nor the model sets.
    """

    given: Mapping[str, Any]
    own: Mapping[str, Any]

    def but(self, **given: Any) -> "AskedSampling":
        """Return a copy in which these parameters are given too, or have other values."""
        return replace(self, given={**self.given, **given})

    def params(self, recommended: Mapping[str, Any] | None = None) -> "SamplingParams":
        """Combine them: the given ones, then the model's recommendation, then the command's defaults.

        A recommended temperature of 0 counts only for a single completion: several would be equal. Raises
        `SamplingParamsError` for a value that cannot work.
        """
        from tiny_llm import SamplingParams

        usable = dict(recommended or {})
        if self.given.get("n", 1) > 1 and usable.get("temperature") == 0:
            del usable["temperature"]
        return SamplingParams.from_options(**{**self.own, **usable, **self.given})


def asked_sampling(options: SamplingOptions, *, max_tokens: int, **others: Any) -> AskedSampling:
    """The sampling parameters that `options` ask for. others: parameters that only some commands have.

    max_tokens: the command's default. Raises `SamplingParamsError` for a value that cannot work.
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
    """The ids of the control tokens, such as "<|im_end|>"."""
    return frozenset(_single_ids(llm, llm.tokenizer.control_tokens))


def _single_ids(llm: "LLM", tokens: Iterable[str]) -> Iterable[int]:
    for token in tokens:
        yield from llm.tokenizer.encode(token)
