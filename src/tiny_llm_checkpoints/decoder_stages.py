"""Streaming versions of the `tokenizers` library's decoders: token strings in, text out, one at a time.

The library's decoders need all tokens at once. A `DecoderChain` takes them one by one and returns text as
soon as no later token can change it. After `end`, the whole text equals the library's for the same tokens.
Knows nothing of ids, vocabularies or special tokens.
"""

import json
import re
from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Self, TypeVar

from tokenizers import decoders

from .tokenizer_library import guarded

CACHED_TOKENS = 1 << 14  # decoded tokens that a decoder keeps

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # as the library's Rust code parses it


def _byte_alphabet() -> dict[str, int]:
    """Map characters of byte-level vocabularies to bytes; visible ones map to themselves. Source: GPT-2."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {**{chr(byte): byte for byte in visible}, **{chr(0x100 + i): b for i, b in enumerate(hidden)}}


BYTE_OF = _byte_alphabet()


def bytes_of_piece(token: str) -> bytes:
    """The bytes of a byte-level token; a token with characters outside the alphabet gives its own UTF-8."""
    try:
        return bytes([BYTE_OF[letter] for letter in token])
    except KeyError:
        return token.encode()


class Stage:
    """One decoder of a chain: tokens in, tokens out.

    held: tokens that were pushed but are not final yet. The only attribute that is changed in place, so
    `fork` must copy it.
    """

    def __init__(self) -> None:
        self.held: list[str] = []

    def push(self, token: str) -> list[str]:
        """Take the next token; return the tokens that are final now."""
        raise NotImplementedError

    def end(self) -> list[str]:
        """Finish: return the tokens that were held. Nothing is held afterwards."""
        return []

    def fork(self) -> Self:
        """Return an independent copy in the same state."""
        twin = copy(self)
        twin.held = self.held.copy()
        return twin


class DecoderChain:
    """Decoders in sequence. A tokenizer forks one unused chain for each text."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)

    def push(self, token: str) -> str:
        """Take the next token; return the text that is final now. Raises what the library raises."""
        return self._through([token], 0)

    def end(self) -> str:
        """Finish: return the text that was held. A second call returns ""."""
        rests = [self._through(stage.end(), place) for place, stage in enumerate(self._stages, start=1)]
        return "".join(rests)

    def fork(self) -> "DecoderChain":
        """Return an independent copy in the same state."""
        return DecoderChain([stage.fork() for stage in self._stages])

    def _through(self, tokens: list[str], first: int) -> str:
        for stage in self._stages[first:]:
            if len(tokens) == 1:  # the usual case
                tokens = stage.push(tokens[0])
            else:
                tokens = [made for token in tokens for made in stage.push(token)]
        return "".join(tokens)


def decoder_chain(decoder: decoders.Decoder | None) -> DecoderChain:
    """The chain that equals a decoder of the library; for None, the library's default: join by spaces.

    If a decoder can change text long before its last token (such as a regular expression over fused text),
    the result is still exact, but all text comes with `end`.
    """
    if decoder is None:
        return DecoderChain([_Each(lambda token: token, lambda token: f" {token}")])
    with guarded("the decoder cannot be read"):
        parts = _flat(json.loads(decoder.__getstate__()))
    stages: list[Stage] = []
    is_fused = False
    for place, part in enumerate(parts):
        makers = _ON_FUSED if is_fused else _ON_TOKENS
        stage = makers.get(part["type"], _no_stage)(part)
        if stage is None and part["type"] != "Fuse":
            return DecoderChain([*stages, _Whole(parts[place:], is_fused)])
        stages += [] if stage is None else [stage]
        is_fused = is_fused or part["type"] in ("Fuse", "ByteLevel")
    return DecoderChain(stages)


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's parts in order, with nested sequences flattened."""
    if part["type"] != "Sequence":
        return [part]
    return [inner for outer in part["decoders"] for inner in _flat(outer)]


def _library_decoder(parts: Sequence[dict[str, Any]]) -> Callable[[list[str]], str]:
    """The library's `decode` for decoder parts in JSON form."""
    built = decoders.Sequence([])
    built.__setstate__(json.dumps({"type": "Sequence", "decoders": list(parts)}).encode())

    def decode(tokens: list[str]) -> str:
        with guarded("the decoder failed on these tokens"):
            return built.decode(tokens)

    return decode


class _Each(Stage):
    """Changes each token independently: the first in one way, all others in another."""

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]) -> None:
        super().__init__()
        self._change = first
        self._later = later

    def push(self, token: str) -> list[str]:
        changed = self._change(token)
        self._change = self._later
        return [changed]


T = TypeVar("T")


def _cached(change: Callable[[str], T]) -> Callable[[str], T]:
    """`change` with a cache, because a text repeats few distinct tokens."""
    return lru_cache(CACHED_TOKENS)(change)


def _each(part: dict[str, Any]) -> Stage:
    """A decoder whose output depends only on the token and on whether it is the first."""
    decode = _library_decoder([part])
    return _Each(lambda token: decode([token]), _cached(lambda token: decode(["", token])))


def _alike(part: dict[str, Any]) -> Stage:
    """A decoder whose output depends only on the token or, for fused text, only on the character."""
    decode = _library_decoder([part])
    change = _cached(lambda token: decode([token]))
    return _Each(change, change)


class _Distinct(Stage):
    """CTC: drops a token that repeats the previous one, and tokens without text."""

    def __init__(self, part: dict[str, Any]) -> None:
        super().__init__()
        self._decode = _library_decoder([part])
        self._previous: str | None = None

    def push(self, token: str) -> list[str]:
        if token == self._previous:
            return []
        self._previous = token
        text = self._decode([token])
        return [text] if text else []


class _HeldLast(Stage):
    """BPEDecoder: a word's suffix becomes a space, or nothing at the end of the text."""

    def __init__(self, part: dict[str, Any]) -> None:
        super().__init__()
        self._suffix: str = part["suffix"]

    def push(self, token: str) -> list[str]:
        final = [held.replace(self._suffix, " ") for held in self.held]
        self.held = [token]
        return final

    def end(self) -> list[str]:
        final, self.held = [held.replace(self._suffix, "") for held in self.held], []
        return final


class _ByteRuns(Stage):
    """ByteFallback: a run of byte tokens becomes text if all of it is UTF-8, else one U+FFFD per byte.

    A run is held until a token that is not a byte follows. Returning complete characters earlier would be
    wrong: one invalid byte at its end changes the whole run.
    """

    def push(self, token: str) -> list[str]:
        if BYTE_TOKEN.fullmatch(token):
            self.held.append(token)
            return []
        return [*self.end(), token]

    def end(self) -> list[str]:
        run = bytes(int(token[3:5], 16) for token in self.held)
        self.held = []
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(run)


class _Bytes(Stage):
    """ByteLevel: decodes the bytes of all tokens as UTF-8; invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        super().__init__()
        self._part = b""  # the first bytes of an incomplete character
        self._bytes_of = _cached(bytes_of_piece)

    def push(self, token: str) -> list[str]:
        known = self._part + self._bytes_of(token)
        text, used = utf_8_decode(known, "replace", False)
        self._part = known[used:]
        return [text]

    def end(self) -> list[str]:
        text, _ = utf_8_decode(self._part, "replace", True)
        self._part = b""
        return [text]


class _StripEnds(Stage):
    """Strip on fused text: removes up to `start` characters at its start and `stop` at its end."""

    def __init__(self, part: dict[str, Any]) -> None:
        super().__init__()
        self._content: str = part["content"]
        self._start, self._stop = part["start"], part["stop"]

    def push(self, token: str) -> list[str]:
        token = self._without_start(token)
        text = "".join([*self.held, token])
        tail = min(self._stop, len(text) - len(text.rstrip(self._content)))
        self.held = [text[len(text) - tail :]]
        return [text[: len(text) - tail]]

    def end(self) -> list[str]:
        self.held = []
        return []

    def _without_start(self, token: str) -> str:
        cut = min(self._start, len(token) - len(token.lstrip(self._content)))
        self._start = self._start - cut if cut == len(token) else 0
        return token[cut:]


class _Whole(Stage):
    """Decoders that need all tokens: holds everything until the end."""

    def __init__(self, parts: Sequence[dict[str, Any]], is_fused: bool) -> None:
        super().__init__()
        self._decode = _library_decoder(parts)
        self._is_fused = is_fused
        self._has_ended = False

    def push(self, token: str) -> list[str]:
        self.held.append(token)
        return []

    def end(self) -> list[str]:
        if self._has_ended:
            return []
        self._has_ended = True
        tokens, self.held = ["".join(self.held)] if self._is_fused else self.held, []
        return [self._decode(tokens)]


def _no_stage(_: dict[str, Any]) -> Stage | None:
    return None


def _replace_on_fused(part: dict[str, Any]) -> Stage | None:
    """On fused text, only a replacement of single characters can be streamed."""
    pattern = part["pattern"].get("String", "")
    return _alike(part) if len(pattern) == 1 else None


_Maker = Callable[[dict[str, Any]], Stage | None]
_ON_TOKENS: dict[str, _Maker] = {
    "BPEDecoder": _HeldLast,
    "ByteFallback": lambda part: _ByteRuns(),
    "ByteLevel": lambda part: _Bytes(),
    "CTC": _Distinct,
    "Metaspace": _each,
    "Replace": _alike,
    "Strip": _alike,
    "WordPiece": _each,
}
_ON_FUSED: dict[str, _Maker] = {
    "Metaspace": _alike,  # the fused text is a single token, so it is the first
    "Replace": _replace_on_fused,
    "Strip": _StripEnds,
}
