"""A lower bound on a text's number of tokens, known from its length, so that huge prompts fail fast.

The bound follows from the tokenizer's components. There is no bound if a component may drop or absorb text.
Knows nothing of requests or contexts.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models

from .decoder_stages import BYTE_OF

MAX_COMPOSED = 4  # characters that NFC may compose to one: the longest canonical decomposition has 4

# Components that keep at least one character, or one byte, for each input character.
_NORMALIZERS = {"Prepend", "NFD", "Lowercase", "ByteLevel", "NFC", "Replace"}
_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
_CONTINUATION = range(0x80, 0xC0)  # UTF-8 continuation bytes; every character outside ASCII has at least one


class TokenBound(NamedTuple):
    """The bound for one tokenizer.

    longest, longest_in_ascii: the maximum number of characters per token, in any text and in ASCII text.
    dropped: characters that may have no token.
    """

    longest: int
    longest_in_ascii: int
    dropped: str

    def of(self, text: str) -> int:
        """A lower bound on the number of tokens of `text`. Takes one pass for each character in `dropped`."""
        longest = self.longest_in_ascii if text.isascii() else self.longest
        counted = len(text) - sum(text.count(character) for character in self.dropped)
        return -(-counted // longest)


def token_bound(tokenizer: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> TokenBound | None:
    """Derive the bound for a tokenizer and its vocabulary; None if there is no bound."""
    added = tokenizer.get_added_tokens_decoder().values()
    normalizers, pre_tokenizers = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    dropped = _dropped(tokenizer.model, vocab, any(part["type"] == "ByteLevel" for part in pre_tokenizers))
    is_known = (
        all(_keeps(part, _NORMALIZERS) for part in normalizers)
        and all(_keeps(part, _PRE_TOKENIZERS) for part in pre_tokenizers)
        and all(_frames(part) for part in _parts(tokenizer.post_processor))
        and not any(token.lstrip or token.rstrip for token in added)  # these absorb any number of spaces
    )
    if dropped is None or not is_known:
        return None
    longest = max(map(len, [*vocab, *(token.content for token in added)]))
    composes = any(part["type"] == "NFC" for part in normalizers)
    return TokenBound(longest * (MAX_COMPOSED if composes else 1), longest, dropped)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A component's parts in JSON form, with nested sequences flattened."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = [value for value in part.values() if part["type"] == "Sequence" and isinstance(value, list)]
    if not inner:
        yield part
    for one in inner[0] if inner else []:
        yield from _flat(one)


def _keeps(part: dict[str, Any], known: set[str]) -> bool:
    """Whether a normalizer or pre-tokenizer keeps part of every character."""
    if part["type"] == "Replace":
        return len(part["pattern"].get("String", "")) == 1 and part["content"] != ""
    return part["type"] in known and part.get("behavior") != "Removed"


def _frames(part: dict[str, Any]) -> bool:
    """Whether a post-processor only adds tokens around the text."""
    if part["type"] == "TemplateProcessing":
        return any("Sequence" in piece for piece in part["single"])
    return part["type"] in ("ByteLevel", "BertProcessing", "RobertaProcessing")


def _dropped(model: models.Model, vocab: Mapping[str, int], is_byte_level: bool) -> str | None:
    """The characters that may have no token in this model; None if that may be any character."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not is_byte_level:
        has_bytes = model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        return "" if has_bytes else None
    missing = [byte for letter, byte in BYTE_OF.items() if letter not in vocab]
    if any(byte in _CONTINUATION for byte in missing):
        return None
    return "".join(chr(byte) for byte in missing if byte < 0x80)
