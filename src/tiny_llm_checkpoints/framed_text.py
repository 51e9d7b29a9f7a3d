"""Tokenizes a prompt in one piece, with only those control tokens that the template wrote.

Tokenizing a prompt piece by piece would give other tokens: some tokenizers treat the start of a text
specially. So the prompt stays whole. The template's control tokens are renamed to strings that no message
can contain; everything else is plain text. Knows nothing of templates.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from . import tokenizer_library as library


class FramedText:
    """A tokenizer that treats control tokens as text, except at the positions that the caller names.

    It shares the vocabulary of a `tokenizer` whose model merges characters; any other model is copied, with
    its control tokens renamed.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        secret = secrets.token_hex(8)  # clients cannot guess it, so no message contains it
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
        """Token ids of the joined pieces: text, control token, text, control token and so on.

        add_special_tokens: add the tokenizer's own prefix and suffix, such as a beginning-of-sequence token.
        """
        text = "".join(self._names[piece] if place % 2 else piece for place, piece in enumerate(pieces))
        [ids] = library.encode(self._tokenizer, [text])
        renamed = self._ids
        ids = [renamed.get(id_, id_) for id_ in ids] if renamed else ids
        before, after = self._around() if add_special_tokens else ([], [])
        return [*before, *ids, *after]

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after a text."""
        if self._frame is None:
            [ids] = library.encode(self._original, ["a"], add_special_tokens=True)
            [plain] = library.encode(self._original, ["a"])
            start = next((s for s in range(len(ids)) if ids[s : s + len(plain)] == plain), len(ids))
            self._frame = ids[:start], ids[start + len(plain) :]
        return self._frame


def _renamed(token: AddedToken, names: dict[str, str]) -> AddedToken:
    """The token with its new name; the rules for finding it in text stay the same."""
    return AddedToken(
        names.get(token.content, token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _without_frame(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A tokenizer with the same vocabulary and rules, but without added tokens or a post-processor."""
    bare = tokenizers.Tokenizer(_without_control_tokens(tokenizer, names))
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(tokenizer, part) is not None:
            setattr(bare, part, getattr(tokenizer, part))
    return bare


def _without_control_tokens(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> Any:
    """The tokenizer's model; if it looks up whole words in its vocabulary, control tokens are renamed there.

    Models that merge characters need no change: no merge produces a control token.
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
