"""Text to token ids and back, built from what a GGUF file says about its own tokenizer.

Byte-level BPE through the `tokenizers` library. Knows nothing of models, arrays or chat templates; never adds
a token that the text does not hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_UNSUPPORTED_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit stands alone, then GPT-2's pattern over bytes; the order matters for "  1"."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS = {"smollm": _smollm}


class Tokenizer:
    """Encodes text, decodes token ids, and streams text out of ids that arrive one by one."""

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Iterable[str],
        *,
        pre_tokenizer: str,
        control_tokens: Sequence[str] = (),
        user_defined_tokens: Sequence[str] = (),
        bos_token: str = "",
        eos_token: str = "",
        eos_token_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
    ) -> None:
        """Build from `tokens[id]`, in the byte-level alphabet, and merges ("left right") in rank order.

        `from_gguf` is the usual way in. Raises ValueError for a pre-tokenizer that is not supported and for
        merges that do not fit the vocabulary.
        """
        if pre_tokenizer not in _PRE_TOKENIZERS:
            known = ", ".join(sorted(_PRE_TOKENIZERS))
            raise ValueError(f"pre-tokenizer {pre_tokenizer!r} is not supported; supported: {known}")
        try:
            bpe = models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
            )
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"merges that do not fit the {len(tokens)} tokens: {error}") from error

        def build(special: Sequence[str]) -> tokenizers.Tokenizer:
            built = tokenizers.Tokenizer(bpe)
            built.pre_tokenizer = _PRE_TOKENIZERS[pre_tokenizer]()
            built.decoder = decoders.ByteLevel()
            built.add_tokens([AddedToken(token, normalized=False) for token in user_defined_tokens])
            built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
            return built

        # Two views on one model: what the library offers instead is a switch inside the tokenizer, which two
        # threads would turn under each other.
        self._tokenizer = build(control_tokens)
        self._text_only = build(())
        self.vocab_size = len(tokens)
        self.control_tokens = tuple(control_tokens)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build from the metadata of `mx.load(path, return_metadata=True)`; numbers may be 0-d arrays.

        Tokens that the file marks as control are special; those that it marks as user-defined are kept whole
        but are ordinary text. The end-of-sequence ids are the file's eos, eot and eom, as far as it names
        them.

        Raises ValueError for a kind of tokenizer, a pre-tokenizer or a flag that is not supported, and for a
        file that lacks a part.
        """
        found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        kind = found.get("model")
        if kind != "gpt2":
            raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported; supported: gpt2")
        for part in ("tokens", "merges", "token_type"):
            if part not in found:
                raise ValueError(f"the file holds no tokenizer.ggml.{part}")
        for flag in _UNSUPPORTED_FLAGS:
            if _plain(found.get(flag, False)):
                raise ValueError(f"tokenizer.ggml.{flag} is true in this file, which is not supported")

        tokens: list[str] = list(found["tokens"])
        types: list[int] = _plain(found["token_type"])
        if len(types) != len(tokens):
            raise ValueError(f"the file gives {len(types)} token types for {len(tokens)} tokens")

        def token_of(key: str) -> str:
            index = _plain(found.get(key))
            return "" if index is None else tokens[index]

        return cls(
            tokens,
            found["merges"],
            pre_tokenizer=found.get("pre", "default"),
            control_tokens=[t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
            user_defined_tokens=[t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED],
            bos_token=token_of("bos_token_id"),
            eos_token=token_of("eos_token_id"),
            eos_token_ids=frozenset(_plain(found[key]) for key in _END_KEYS if key in found),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; nothing is added in front or behind.

        With `special_tokens` (the default, as in transformers and vLLM) control tokens written out in the
        text, such as "<|im_start|>", become those tokens: right for a prompt that somebody wrote or rendered
        as a whole. Pass False for text that came from a user and goes into a prompt that somebody else
        frames: it is then text through and through, and can neither end a turn nor open one.
        `ChatTemplate.encode` does this for each message.

        A byte that the vocabulary has no token for is dropped, as by the checkpoint's own tokenizer (in the
        embedded model six control characters such as U+0004, and the first byte of planes 4 to 11, which
        Unicode has not assigned). Raises ValueError for a lone surrogate: it is not text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = text[error.start]
            raise ValueError(f"the text holds a lone surrogate, {lone!r}, at {error.start}") from None
        tokenizer = self._tokenizer if special_tokens else self._text_only
        return tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        for token_id in ids:
            self._check(token_id)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, control tokens written out; part of a character shows as U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self.decode([token_id], skip_special_tokens=False)

    def stream(self, *, skip_special_tokens: bool = True) -> "Detokenizer":
        """A detokenizer for one sequence of ids."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1})")


class Detokenizer:
    """The text of one sequence whose token ids arrive one by one; belongs to one sequence and one thread.

    All pushes and the flush, put together, equal `Tokenizer.decode` of all ids, whatever the ids are. A
    character that is spread over tokens comes out whole with its last one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Start at an empty sequence."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._given = 0  # characters returned so far

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is final with it, often one word, sometimes nothing.

        Raises ValueError for an id outside the vocabulary, and has then taken nothing.
        """
        self._tokenizer._check(token_id)
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer._tokenizer, token_id) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """The sequence has ended: return what was held back. Calling it again returns nothing more."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)[self._given :]
        self._given += len(text)
        return text


def _plain(value: Any) -> Any:
    """A metadata value as plain Python: arrays become numbers or lists."""
    return value.tolist() if hasattr(value, "tolist") else value
