"""Text in which only the control tokens that a template wrote are control tokens, tokenized in one piece.

A prompt that is tokenized piece by piece differs from the same prompt in one piece: some tokenizers treat the
beginning of a text in a way of their own. So the prompt stays whole. The control tokens of the template get
names that no text can hold, and what is left is text. Knows nothing of templates.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from . import tokenizer_library as library


class FramedText:
    """A tokenizer to which control tokens are text, unless it is told where they are.

    The vocabulary is shared with `tokenizer`, not copied.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        secret = secrets.token_hex(8)  # no text of a client can contain it
        names = {
            token.content: f"\ue000{secret}{id_:x}\ue001" for id_, token in added.items() if token.special
        }
        self._names = names
        self._original = tokenizer
        self._tokenizer = _without_frame(tokenizer, names)
        self._tokenizer.add_tokens([_renamed(token, names) for token in added.values()])
        found = {
            self._tokenizer.token_to_id(names.get(t.content, t.content)): id_ for id_, t in added.items()
        }
        self._ids = {own: id_ for own, id_ in found.items() if own is not None and own != id_}
        self._frame: tuple[list[int], list[int]] | None = None

    def encode(self, pieces: Sequence[str], *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of the pieces joined: text, control token, text, control token and so on.

        add_special_tokens: put the tokenizer's own frame around them, such as a beginning-of-sequence token.
        """
        text = "".join(self._names[piece] if place % 2 else piece for place, piece in enumerate(pieces))
        [ids] = library.encode(self._tokenizer, [text])
        renamed = self._ids
        ids = [renamed.get(id_, id_) for id_ in ids] if renamed else ids
        before, after = self._around() if add_special_tokens else ([], [])
        return [*before, *ids, *after]

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text."""
        if self._frame is None:
            [ids] = library.encode(self._original, ["a"], add_special_tokens=True)
            [plain] = library.encode(self._original, ["a"])
            start = next((s for s in range(len(ids)) if ids[s : s + len(plain)] == plain), len(ids))
            self._frame = ids[:start], ids[start + len(plain) :]
        return self._frame


def _renamed(token: AddedToken, names: dict[str, str]) -> AddedToken:
    """The token under its new name. It is found in text as the token itself would be."""
    return AddedToken(
        names.get(token.content, token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _without_frame(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A tokenizer with the same vocabulary and rules, without added tokens and without a frame."""
    bare = tokenizers.Tokenizer(_without_control_tokens(tokenizer, names))
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(tokenizer, part) is not None:
            setattr(bare, part, getattr(tokenizer, part))
    return bare


def _without_control_tokens(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> Any:
    """The tokenizer's model. If it finds whole words in its vocabulary, control tokens are renamed there.

    A model that merges characters does not find them: no merge makes a control token.
    """
    model = tokenizer.model
    if not isinstance(model, (models.Unigram, models.WordLevel, models.WordPiece)):
        return model
    saved = json.loads(tokenizer.to_str())["model"]
    if isinstance(model, models.Unigram):
        unknown = saved["unk_id"]
        scored = [
            (text if place == unknown else names.get(text, text), score)
            for place, (text, score) in enumerate(saved["vocab"])
        ]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=saved.get("byte_fallback", False))
    unk_token = saved["unk_token"]
    vocab = {
        text if text == unk_token else names.get(text, text): id_ for text, id_ in saved["vocab"].items()
    }
    if isinstance(model, models.WordLevel):
        return models.WordLevel(vocab, unk_token=unk_token)
    rules = {key: saved[key] for key in ("max_input_chars_per_word", "continuing_subword_prefix")}
    return models.WordPiece(vocab, unk_token=unk_token, **rules)
