"""Text to token ids and back, whatever file the tokenizer came from.

Two views on one vocabulary: text in which control tokens are control tokens, and text that is text through
and through. Knows nothing of models, arrays or chat templates. Made by `gguf_tokenizer` and `hf_tokenizer`.
"""

import re
from collections.abc import Sequence
from copy import copy

import tokenizers

from . import tokenizer_library as library
from .decoder_stages import BYTE_TOKEN, REPLACEMENT, DecoderChain, bytes_of_piece, decoder_chain
from .errors import PromptTooLongError
from .framed_text import FramedText
from .least_tokens import least_tokens

_ANCHOR = "\ue000"  # a token that no vocabulary has: what comes after it stands in the middle of a text


class Tokenizer:
    """Encodes text, decodes token ids, and streams text out of ids that arrive one by one.

    Raises `TokenizerError`, a ValueError, where the `tokenizers` library fails.
    """

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
        with library.guarded("not a tokenizer that can be used"):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            added = tokenizer.get_added_tokens_decoder()
            self._framed = FramedText(tokenizer)
            vocab = tokenizer.get_vocab()
            self.vocab_size = 1 + max([-1, *added, *vocab.values()])
            self._least_tokens = least_tokens(tokenizer, vocab)
            self._chain = decoder_chain(tokenizer.decoder)
            library.encode(tokenizer, ["a"], add_special_tokens=True)  # a broken frame breaks every text
        self._tokenizer = tokenizer
        self.control_tokens = tuple(token.content for token in added.values() if token.special)
        self._control = frozenset(self.control_tokens)
        self._texts: dict[int, str] = {}
        self._middle = Detokenizer(self, skip_special_tokens=False, begun=True)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template

    def encode(
        self,
        text: str,
        *,
        special_tokens: bool = True,
        add_special_tokens: bool = False,
        context: int | None = None,
    ) -> list[int]:
        """Token ids of `text`.

        With `special_tokens` (the default, as in transformers and vLLM) control tokens written out in the
        text, such as "<|im_start|>", become those tokens: right for a prompt that somebody wrote or rendered
        as a whole. Pass False for text that came from a user and goes into a prompt that somebody else
        frames: it is then text through and through, and can neither end a turn nor open one.
        `ChatTemplate.encode` does this for each message.

        With `add_special_tokens` the tokenizer's own frame is put around it: the beginning-of-sequence token
        of llama, nothing for most others. A chat template writes its own.

        With `context`, a prompt that leaves no place for an output in so many tokens raises
        `PromptTooLongError`: before it is tokenized where the text is so long that it must.

        A byte that the vocabulary has no token for is dropped, as by the checkpoint's own tokenizer (in the
        embedded model six control characters such as U+0004, and the first byte of planes 4 to 11, which
        Unicode has not assigned). Raises ValueError for a lone surrogate: it is not text. Other threads go on
        while it runs.
        """
        self.check_text(text, context)
        if special_tokens:
            [ids] = library.encode(self._tokenizer, [text], add_special_tokens=add_special_tokens)
        else:
            ids = self._framed.encode([text], add_special_tokens=add_special_tokens)
        check_length(len(ids), context)
        return ids

    def encode_framed(
        self, pieces: Sequence[str], *, add_special_tokens: bool = False, context: int | None = None
    ) -> list[int]:
        """Token ids of one text in which every second piece is a control token, and the others are text.

        Equal to `encode` of the pieces joined, unless a text spells out a control token: that stays text, and
        no other token changes. Raises as `encode` does.
        """
        self.check_text("".join(pieces), context)
        ids = self._framed.encode(pieces, add_special_tokens=add_special_tokens)
        check_length(len(ids), context)
        return ids

    def check_text(self, text: str, context: int | None = None) -> None:
        """Raise what `encode` would raise of a text, as far as that is known without tokenizing it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = text[error.start]
            raise ValueError(f"the text holds a lone surrogate, {lone!r}, at {error.start}") from None
        if context is not None and self._least_tokens is not None:
            check_length(self._least_tokens.of(text), context, "at least ")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        An id behind the vocabulary has no text: many models have more rows than tokens, and may choose one.
        Raises ValueError for a negative id.
        """
        known = [token_id for token_id in ids if self._is_known(token_id)]
        return library.decode(self._tokenizer, known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token adds in the middle of a text, control tokens written out.

        The space that a token of SentencePiece begins with is part of it. Part of a character shows as
        U+FFFD. Raises ValueError for a negative id.
        """
        known = self._texts.get(token_id)
        if known is None:
            stream = self.stream_within()
            known = stream.push(token_id) + stream.flush()
            if token_id < self.vocab_size:  # so many and no more
                self._texts[token_id] = known
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character; of a control token, those of its name.

        Raises ValueError for a negative id.
        """
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if byte := BYTE_TOKEN.fullmatch(piece):  # as in SentencePiece
            return bytes([int(byte[1], 16)])
        return bytes_of_piece(piece)

    def stream(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> "Detokenizer":
        """A detokenizer for one sequence of ids that begins with `prompt`, whose text it does not repeat."""
        return Detokenizer(self, prompt, skip_special_tokens=skip_special_tokens)

    def stream_within(self) -> "Detokenizer":
        """A detokenizer for ids in the middle of a text whose beginning does not matter."""
        return self._middle.fork()

    def spelled(self, text: str) -> list[str | int]:
        """The characters of a text, and the ids of the control tokens that it spells out, in their places."""
        names = [name for name in self.control_tokens if name and name in text]
        if not names:
            return [*text]
        longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        items: list[str | int | None] = []
        for place, part in enumerate(re.split(f"({longest_first})", text)):
            items += [self._tokenizer.token_to_id(part)] if place % 2 else [*part]
        return [item for item in items if item is not None]

    def is_control(self, token_id: int) -> bool:
        """Whether an id is a control token's."""
        return self._is_known(token_id) and self._tokenizer.id_to_token(token_id) in self._control

    def _is_known(self, token_id: int) -> bool:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return token_id < self.vocab_size

    def _piece(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """A token as the vocabulary has it; None where there is none, or where it is left out."""
        piece = self._tokenizer.id_to_token(token_id) if self._is_known(token_id) else None
        return None if skip_special_tokens and piece in self._control else piece


def check_length(num_tokens: int, context: int | None, at_least: str = "") -> None:
    """Raise `PromptTooLongError` for a prompt of so many tokens that no output fits into the context."""
    if context is not None and num_tokens >= context:
        raise PromptTooLongError(
            f"{at_least}{num_tokens} prompt tokens and 1 output token exceed the context of {context}"
        )


class Detokenizer:
    """The text of one sequence whose token ids arrive one by one; belongs to one sequence and one thread.

    Its text is what the ids add to the prompt: `Tokenizer.decode` of prompt and ids, less what that has in
    common with `decode` of the prompt. So decode(prompt) + all pushes + flush == decode(prompt + ids),
    whatever the ids are. One kind of prompt is an exception, because its own text changes when tokens follow:
    it ends within a character, say. Its decode ends with U+FFFD, and the text begins with the character.

    Pushes never take text back. A character that is spread over tokens comes out whole with its last one. A
    run of byte tokens (SentencePiece's byte fallback) comes out with the first token that is no byte, because
    one byte that is not UTF-8 makes U+FFFD of the whole run. A push costs the same however long the sequence
    is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        begun: bool = False,
    ) -> None:
        """Start behind a prompt; begun: in the middle of a text that is not known."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._chain: DecoderChain = tokenizer._chain.fork()
        if begun:
            self._chain.push(_ANCHOR)
        for token_id in prompt:
            self._decoded(token_id)
        self._shown = self._chain.fork().end()  # the end of the prompt's text, which may change yet

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is final with it, often one word, sometimes nothing.

        Raises ValueError for a negative id, and has then taken nothing.
        """
        return self._new(self._decoded(token_id))

    def flush(self) -> str:
        """The sequence has ended: return what was held back. Calling it again returns nothing more."""
        return self._new(self._chain.end())

    def fork(self) -> "Detokenizer":
        """A copy that goes on independently, as another continuation of the same ids."""
        twin = copy(self)
        twin._chain = self._chain.fork()
        return twin

    def _decoded(self, token_id: int) -> str:
        piece = self._tokenizer._piece(token_id, self._skip_special_tokens)
        return "" if piece is None else self._chain.push(piece)

    def _new(self, text: str) -> str:
        """A text less what the prompt has shown of it already."""
        if not self._shown:
            return text
        common = _num_common(self._shown, text)
        self._shown = self._shown[common:] if common == len(text) else ""
        return text[common:]


def _num_common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
