"""Text to token ids and back, whatever file the tokenizer came from.

Two views on one vocabulary: text in which control tokens are control tokens, and text that is text through
and through. Knows nothing of models, arrays or chat templates. Made by `gguf_tokenizer` and `hf_tokenizer`.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

from .framed_text import FramedText


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level vocabularies: its own where that is visible. Source: GPT-2."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {**{chr(byte): byte for byte in visible}, **{chr(0x100 + i): b for i, b in enumerate(hidden)}}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Encodes text, decodes token ids, and streams text out of ids that arrive one by one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_token: str = "",
        eos_token: str = "",
        eos_token_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
    ) -> None:
        """Take over a tokenizer of the `tokenizers` library; its special tokens are the control tokens."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._framed = FramedText(tokenizer)
        self.vocab_size = max([tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        self.control_tokens = tuple(token.content for token in added.values() if token.special)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template

    def encode(
        self, text: str, *, special_tokens: bool = True, add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        With `special_tokens` (the default, as in transformers and vLLM) control tokens written out in the
        text, such as "<|im_start|>", become those tokens: right for a prompt that somebody wrote or rendered
        as a whole. Pass False for text that came from a user and goes into a prompt that somebody else
        frames: it is then text through and through, and can neither end a turn nor open one.
        `ChatTemplate.encode` does this for each message.

        With `add_special_tokens` the tokenizer's own frame is put around it: the beginning-of-sequence token
        of llama, nothing for most others. A chat template writes its own.

        A byte that the vocabulary has no token for is dropped, as by the checkpoint's own tokenizer (in the
        embedded model six control characters such as U+0004, and the first byte of planes 4 to 11, which
        Unicode has not assigned). Raises ValueError for a lone surrogate: it is not text.
        """
        _check_unicode(text)
        if not special_tokens:
            return self._framed.encode([text], add_special_tokens=add_special_tokens)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_framed(self, pieces: Sequence[str], *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of one text in which every second piece is a control token, and the others are text.

        Equal to `encode` of the pieces joined, unless a text spells out a control token: that stays text, and
        no other token changes. Raises ValueError for a lone surrogate.
        """
        _check_unicode("".join(pieces))
        return self._framed.encode(pieces, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        An id behind the vocabulary has no text: many models have more rows than tokens, and may choose one.
        Raises ValueError for a negative id.
        """
        known = [token_id for token_id in ids if self._is_known(token_id)]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, control tokens written out; part of a character shows as U+FFFD.

        Raises ValueError for a negative id.
        """
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character; of a control token, those of its name.

        Raises ValueError for a negative id.
        """
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if piece.startswith("<0x") and piece.endswith(">"):  # a byte of its own, as in SentencePiece
            return bytes([int(piece[1:-1], 16)])
        is_bytes = set(piece) <= set(BYTE_OF)
        return bytes(BYTE_OF[character] for character in piece) if is_bytes else text.encode()

    def stream(self, *, skip_special_tokens: bool = True) -> "Detokenizer":
        """A detokenizer for one sequence of ids."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    def _is_known(self, token_id: int) -> bool:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return token_id < self.vocab_size


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ValueError(f"the text holds a lone surrogate, {lone!r}, at {error.start}") from None


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

        Raises ValueError for a negative id, and has then taken nothing.
        """
        if not self._tokenizer._is_known(token_id):
            return ""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer._tokenizer, token_id) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """The sequence has ended: return what was held back. Calling it again returns nothing more."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)[self._given :]
        self._given += len(text)
        return text
