"""Converts text to token ids and back, whatever file the tokenizer came from.

Control tokens spelled in a text can be encoded as such, or as plain text. Knows nothing of models, arrays or
chat templates. Built by `gguf_tokenizer` and `hf_tokenizer`.
"""

import re
from collections.abc import Collection, Sequence
from copy import copy

import tokenizers

from . import tokenizer_library as library
from .decoder_stages import BYTE_TOKEN, REPLACEMENT, DecoderChain, bytes_of_piece, decoder_chain
from .errors import PromptTooLongError
from .framed_text import FramedText
from .sizes import counted
from .token_bound import token_bound

_ANCHOR = "\ue000"  # a token that is in no vocabulary; tokens after it are in the middle of a text


class Tokenizer:
    """Encodes text, decodes token ids, and streams text from ids that arrive one by one.

    Raises `TokenizerError`, a ValueError, if the `tokenizers` library fails.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_token: str = "",
        eos_token: str = "",
        eos_token_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` library; its special tokens are the control tokens.

        tool_template: the template for chats with tools, if it is another one.
        """
        with library.guarded("the tokenizer is not usable"):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            added = tokenizer.get_added_tokens_decoder()
            self._framed = FramedText(tokenizer)
            vocab = tokenizer.get_vocab()
            self.vocab_size = 1 + max([-1, *added, *vocab.values()])
            self._token_bound = token_bound(tokenizer, vocab)
            self._chain = decoder_chain(tokenizer.decoder)
            library.encode(tokenizer, ["a"], add_special_tokens=True)  # fails now if every encode would fail
        self._tokenizer = tokenizer
        self.control_tokens = tuple(token.content for token in added.values() if token.special)
        self._control = frozenset(self.control_tokens)
        self._texts: dict[int, str] = {}
        self._mid_text = Detokenizer(self, skip_special_tokens=False, mid_text=True)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.tool_template = tool_template

    def encode(
        self,
        text: str,
        *,
        special_tokens: bool = True,
        add_special_tokens: bool = False,
        context: int | None = None,
    ) -> list[int]:
        """Token ids of `text`.

        special_tokens: True (the default, as in transformers and vLLM) encodes control tokens that the text
        spells, such as "<|im_start|>", as those tokens: right for a complete prompt. Pass False for a user's
        text that becomes part of a prompt: control tokens in it stay plain text, so it can neither end a
        message nor start one. `ChatTemplate.encode` does this for each message.
        add_special_tokens: add the tokenizer's own special tokens: the beginning-of-sequence token for llama,
        nothing for most others. Chat templates write their own.
        context: raise `PromptTooLongError` if the prompt leaves no space for an output token in a context of
        this many tokens. A text that is far too long is rejected without being tokenized.

        A byte without a token is dropped, as the checkpoint's own tokenizer does (in the embedded model, six
        control characters such as U+0004, and the first byte of planes 4 to 11, which Unicode does not use).
        Raises ValueError for a lone surrogate, which is not valid text. Releases the GIL while it runs.
        """
        self.check_text(text, context)
        if special_tokens:
            [ids] = library.encode(self._tokenizer, [text], add_special_tokens=add_special_tokens)
        else:
            ids = self._framed.encode([text], add_special_tokens=add_special_tokens)
        check_length(len(ids), context)
        return ids

    def encode_pieces(
        self, pieces: Sequence[str], *, add_special_tokens: bool = False, context: int | None = None
    ) -> list[int]:
        """Token ids of one text, given as pieces: text, control token, text, control token and so on.

        Equal to `encode` of the joined pieces, unless a text spells a control token: that stays text, and no
        other token changes. Raises the errors of `encode`.
        """
        self.check_text("".join(pieces), context)
        ids = self._framed.encode(pieces, add_special_tokens=add_special_tokens)
        check_length(len(ids), context)
        return ids

    def check_text(self, text: str, context: int | None = None) -> None:
        """Raise the errors of `encode` that can be detected without tokenizing."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = text[error.start]
            raise ValueError(f"the text has a lone surrogate, {lone!r}, at character {error.start}") from None
        if context is not None and self._token_bound is not None:
            check_length(self._token_bound.of(text), context, "at least ")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Ids beyond the vocabulary have no text: many models compute more logits than there are tokens, and may
        sample such an id. Raises ValueError for a negative id.
        """
        known = [token_id for token_id in ids if self._is_known(token_id)]
        return library.decode(self._tokenizer, known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text that one token adds in the middle of a text; control tokens are spelled out.

        The leading space of a SentencePiece token is included. An incomplete character appears as U+FFFD.
        Raises ValueError for a negative id.
        """
        known = self._texts.get(token_id)
        if known is None:
            stream = self.stream_mid_text()
            known = stream.push(token_id) + stream.flush()
            if token_id < self.vocab_size:  # bounds the cache
                self._texts[token_id] = known
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character; for a control token, those of its name.

        Raises ValueError for a negative id.
        """
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if byte := BYTE_TOKEN.fullmatch(piece):  # SentencePiece's byte fallback
            return bytes([int(byte[1], 16)])
        return bytes_of_piece(piece)

    def stream(
        self,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        visible: Collection[str] = (),
    ) -> "Detokenizer":
        """A detokenizer for one sequence that starts with `prompt`; it does not repeat the prompt's text.

        visible: control tokens that are not skipped.
        """
        return Detokenizer(self, prompt, skip_special_tokens=skip_special_tokens, visible=visible)

    def stream_mid_text(self) -> "Detokenizer":
        """A detokenizer for ids in the middle of a text whose start does not matter."""
        return self._mid_text.fork()

    def split_control_tokens(self, text: str) -> list[str | int]:
        """Split a text into its characters and the ids of the control tokens that it spells, in order."""
        names = [name for name in self.control_tokens if name and name in text]
        if not names:
            return [*text]
        longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        items: list[str | int | None] = []
        for place, part in enumerate(re.split(f"({longest_first})", text)):
            items += [self._tokenizer.token_to_id(part)] if place % 2 else [*part]
        return [item for item in items if item is not None]

    def is_control(self, token_id: int) -> bool:
        """Whether `token_id` is a control token."""
        return self._is_known(token_id) and self._tokenizer.id_to_token(token_id) in self._control

    def _is_known(self, token_id: int) -> bool:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return token_id < self.vocab_size

    def control_token_ids(self) -> dict[str, int]:
        """The ids of the control tokens, by name."""
        ids = {name: self._tokenizer.token_to_id(name) for name in self.control_tokens}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def _piece(self, token_id: int, skipped: Collection[str]) -> str | None:
        """A token's string in the vocabulary; None if it has none or is skipped."""
        piece = self._tokenizer.id_to_token(token_id) if self._is_known(token_id) else None
        return None if piece in skipped else piece


def check_length(num_tokens: int, context: int | None, at_least: str = "") -> None:
    """Raise `PromptTooLongError` if the prompt leaves no space for an output token in the context."""
    if context is not None and num_tokens >= context:
        raise PromptTooLongError(
            f"{at_least}{counted(num_tokens, 'prompt token')} and 1 output token exceed "
            f"the context of {context}"
        )


class Detokenizer:
    """The text of one sequence whose token ids arrive one by one. Not for use by several threads.

    It returns the text that the ids add to the prompt: `Tokenizer.decode` of prompt and ids, without the
    prefix that it shares with `decode` of the prompt. So decode(prompt) + all pushes + flush ==
    decode(prompt + ids). The exception is a prompt whose own text changes when tokens follow, for example if
    it ends within a character: its decode ends with U+FFFD, and the returned text starts with the complete
    character.

    Text that was returned never changes. A character that spans several tokens is returned with the last of
    them. A run of byte tokens (SentencePiece's byte fallback) is returned with the first token that is not a
    byte, because one invalid byte turns the whole run into U+FFFD. The cost of a push does not depend on the
    length of the sequence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        visible: Collection[str] = (),
        mid_text: bool = False,
    ) -> None:
        """Start after a prompt, or, with `mid_text`, in the middle of an unknown text."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer._control.difference(visible) if skip_special_tokens else frozenset[str]()
        self._chain: DecoderChain = tokenizer._chain.fork()
        if mid_text:
            self._chain.push(_ANCHOR)
        for token_id in prompt:
            self._decoded(token_id)
        self._shown = self._chain.fork().end()  # held text at the prompt's end, which may still change

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is final now: often one word, sometimes nothing.

        Raises ValueError for a negative id; the state is then unchanged.
        """
        return self._new(self._decoded(token_id))

    def flush(self) -> str:
        """Finish: return the text that was held back. A second call returns ""."""
        return self._new(self._chain.end())

    def fork(self) -> "Detokenizer":
        """Return an independent copy, for another continuation of the same ids."""
        twin = copy(self)
        twin._chain = self._chain.fork()
        return twin

    def _decoded(self, token_id: int) -> str:
        piece = self._tokenizer._piece(token_id, self._skipped)
        return "" if piece is None else self._chain.push(piece)

    def _new(self, text: str) -> str:
        """`text` without the part that the prompt already contains."""
        if not self._shown:
            return text
        common = _num_common(self._shown, text)
        self._shown = self._shown[common:] if common == len(text) else ""
        return text[common:]


def _num_common(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
