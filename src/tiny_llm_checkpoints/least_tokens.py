"""How many tokens a text has at least, known from its length: a prompt far too long need not be tokenized.

The bound is proven from what a tokenizer is made of. For parts that may drop or swallow text it is 0, which
says nothing. Knows nothing of requests and contexts.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models

from .decoder_stages import BYTE_OF

MOST_COMPOSED = 4  # characters that NFC makes one of: the longest canonical decomposition has 4

# Parts that leave at least one character, or one byte, for each that they take.
_NORMALIZERS = {"Prepend", "NFD", "Lowercase", "ByteLevel", "NFC", "Replace"}
_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
_CONTINUATION = range(0x80, 0xC0)  # bytes: every character outside ASCII has one


class LeastTokens(NamedTuple):
    """Of one tokenizer. longest: characters that one token may stand for, outside ASCII and within it.

    dropped: characters that may have no token at all.
    """

    longest: int
    longest_in_ascii: int
    dropped: str

    def of(self, text: str) -> int:
        """A number that the tokens of `text` are not fewer than; costs a look at its characters at most."""
        longest = self.longest_in_ascii if text.isascii() else self.longest
        counted = len(text) - sum(text.count(character) for character in self.dropped)
        return -(-counted // longest)


def least_tokens(tokenizer: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> LeastTokens | None:
    """The bound of a tokenizer of the library with all its tokens; None where there is none."""
    added = tokenizer.get_added_tokens_decoder().values()
    normalizers, pre_tokenizers = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    dropped = _dropped(tokenizer.model, vocab, any(part["type"] == "ByteLevel" for part in pre_tokenizers))
    is_known = (
        all(_keeps(part, _NORMALIZERS) for part in normalizers)
        and all(_keeps(part, _PRE_TOKENIZERS) for part in pre_tokenizers)
        and all(_frames(part) for part in _parts(tokenizer.post_processor))
        and not any(token.lstrip or token.rstrip for token in added)  # they swallow any number of spaces
    )
    if dropped is None or not is_known:
        return None
    longest = max(map(len, [*vocab, *(token.content for token in added)]))
    composes = any(part["type"] == "NFC" for part in normalizers)
    return LeastTokens(longest * (MOST_COMPOSED if composes else 1), longest, dropped)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A component's parts in their JSON form, nested sequences opened."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = [value for value in part.values() if part["type"] == "Sequence" and isinstance(value, list)]
    if not inner:
        yield part
    for one in inner[0] if inner else []:
        yield from _flat(one)


def _keeps(part: dict[str, Any], known: set[str]) -> bool:
    """Whether a normalizer or pre-tokenizer leaves something of every character."""
    if part["type"] == "Replace":
        return len(part["pattern"].get("String", "")) == 1 and part["content"] != ""
    return part["type"] in known and part.get("behavior") != "Removed"


def _frames(part: dict[str, Any]) -> bool:
    """Whether a post-processor only puts tokens around the text."""
    if part["type"] == "TemplateProcessing":
        return any("Sequence" in piece for piece in part["single"])
    return part["type"] in ("ByteLevel", "BertProcessing", "RobertaProcessing")


def _dropped(model: models.Model, vocab: Mapping[str, int], is_byte_level: bool) -> str | None:
    """The characters that this model may have no token for; None where these may be any."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not is_byte_level:
        has_bytes = model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        return "" if has_bytes else None
    missing = [byte for letter, byte in BYTE_OF.items() if letter not in vocab]
    if any(byte in _CONTINUATION for byte in missing):
        return None
    return "".join(chr(byte) for byte in missing if byte < 0x80)
