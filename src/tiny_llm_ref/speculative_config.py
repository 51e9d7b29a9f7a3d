"""The options of speculative decoding; names are vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

from tiny_llm_checkpoints.errors import ConfigError, shown
from tiny_llm_checkpoints.suggestions import check_fields, suggests_fields

from .errors import is_integer

METHODS = ("ngram",)
MAX_DRAFT = 64  # tokens in a draft
MAX_NGRAM = 32


class NgramSizes(NamedTuple):
    """The sizes of n-grams, from `least` to `most` tokens."""

    least: int
    most: int


DEFAULT_SIZES = NgramSizes(2, 4)


@suggests_fields
@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed. Raises `ConfigError` for any value that is not allowed.

    method: "ngram", the only one: the last tokens of prompt and output are looked up earlier in them, and
        what followed there is the draft.
    num_speculative_tokens: the most tokens in a draft, from 1 to 64. A sequence drafts fewer, or none, if
        more would not pay.
    prompt_lookup_max, prompt_lookup_min: the longest and the shortest n-gram that is looked up, in tokens,
        from 1 to 32. The defaults are 4 and 2; if only one is given, the other has the same value.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 7
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = " or ".join(map(repr, METHODS))
            raise ConfigError(f"speculative_config: method must be {known}, not {shown(self.method)}")
        self._set_count("num_speculative_tokens", MAX_DRAFT)
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            if getattr(self, name) is not None:
                self._set_count(name, MAX_NGRAM)
        sizes = self.ngram_sizes
        if sizes.least > sizes.most:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min ({sizes.least}) exceeds prompt_lookup_max "
                f"({sizes.most})"
            )

    @property
    def ngram_sizes(self) -> NgramSizes:
        """The sizes of the n-grams that are looked up."""
        least, most = self.prompt_lookup_min, self.prompt_lookup_max
        if least is None and most is None:
            return DEFAULT_SIZES
        return NgramSizes(least or most or 1, most or least or 1)

    @classmethod
    def of(cls, given: "Mapping[str, object] | SpeculativeConfig") -> "SpeculativeConfig":
        """Return the configuration that a mapping describes; a `SpeculativeConfig` is returned unchanged."""
        if isinstance(given, SpeculativeConfig):
            return given
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ConfigError(
                f"speculative_config must be a mapping from names to values, not {shown(given)}"
            )
        check_fields(cls, given, "field of speculative_config", ConfigError)
        return cls(**given)  # type: ignore[arg-type]  # checked on creation

    def _set_count(self, name: str, most: int) -> None:
        """Check a field that counts tokens, and make it an int."""
        value = getattr(self, name)
        if not is_integer(value) or not 1 <= index(value) <= most:
            raise ConfigError(
                f"speculative_config: {name} must be a whole number from 1 to {most}, not {shown(value)}"
            )
        object.__setattr__(self, name, index(value))
