"""Reads the tokens that a folder's settings add to those of tokenizer.json, as transformers does.

A tokenizer.json usually has all tokens. In folders written by older tools, some are only in
tokenizer_config.json, special_tokens_map.json or added_tokens.json.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from .errors import reading
from .json_file import read_json
from .tokenizer_library import guarded

Settings = Mapping[str, Any]
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = "added_tokens_decoder"  # all added tokens by id, in tokenizer_config.json


def tokenizer_settings(path: Path) -> dict[str, Any]:
    """The settings of a folder's tokenizer.

    special_tokens_map.json counts only if tokenizer_config.json does not list the added tokens; it then wins.
    """
    settings = read_optional(path / "tokenizer_config.json")
    further = path / "special_tokens_map.json"
    older = read_optional(further)
    with reading(further):
        _named_tokens(older), _other_special_tokens(older)  # raises for values that are not tokens
    return settings if _LISTED in settings else {**settings, **older}


def read_optional(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file does not exist."""
    return read_json(file) if file.exists() else {}


def token_of(settings: Settings, name: str) -> str:
    """A token's text, which is a string or the `content` of an object; "" if it is missing."""
    value = settings.get(name)
    return "" if value is None else _added_token(name, value).content


def add_tokens(path: Path, settings: Settings, built: tokenizers.Tokenizer, num_rows: int | None) -> None:
    """Add to `built` the tokens that the folder's settings name and its tokenizer.json lacks.

    num_rows: rows of the model's embedding; a new token beyond them is left out, so that its name stays text.

    Raises a `ModelFileError` that names the file and the problem.
    """
    known = built.get_added_tokens_decoder()
    with reading(path / "tokenizer_config.json"):
        named, others = _named_tokens(settings), _other_special_tokens(settings)
        names = {token.content for token in named}
        if _LISTED in settings:
            listed = _listed_tokens(settings)
        else:
            listed = _older_list(path, known, names | {token.content for token in others})
        for token in (*listed, *named, *others):
            token.special = token.special or token.content in names
        there = {token.content for token in (*known.values(), *listed)}
        wanted = [*listed, *(token for token in (*named, *others) if token.content not in there)]
        with guarded("the added tokens are not usable"):
            built.add_tokens(list(_fitting(wanted, built, num_rows)))


def _listed_tokens(settings: Settings) -> list[AddedToken]:
    """The added tokens that the settings list, in order of their ids."""
    listed = settings[_LISTED]
    if not isinstance(listed, dict):
        raise ValueError(f"{_LISTED} is {str(listed)[:40]!r}, expected an object")
    by_id = {_id(key): _added_token(f"{_LISTED}.{key[:20]}", value) for key, value in listed.items()}
    return [by_id[place] for place in sorted(by_id)]


def _older_list(path: Path, known: Collection[int], special: Collection[str]) -> list[AddedToken]:
    """The tokens that added_tokens.json adds to the known ids, in order of their ids."""
    file = path / "added_tokens.json"
    found = read_optional(file)
    with reading(file):
        by_id = {_id(place): AddedToken(name, special=name in special) for name, place in found.items()}
    return [by_id[place] for place in sorted(by_id.keys() - set(known))]


def _named_tokens(settings: Settings) -> list[AddedToken]:
    """The special tokens that have a name in the settings, such as `eos_token` or `image_token`."""
    further = {name: value for name, value in settings.items() if name.endswith("_token")}
    named = {role: settings.get(role) for role in _ROLES}
    named |= {name: value for name, value in further.items() if isinstance(value, str)}
    if isinstance(settings.get("extra_special_tokens"), dict):
        named |= settings["extra_special_tokens"]
    return [_added_token(name, value) for name, value in named.items() if value]


def _other_special_tokens(settings: Settings) -> list[AddedToken]:
    """The special tokens in a list."""
    extra = settings.get("extra_special_tokens")
    found = (
        extra if extra and not isinstance(extra, dict) else settings.get("additional_special_tokens") or []
    )
    if not isinstance(found, list):
        raise ValueError(f"the list of special tokens is {str(found)[:40]!r}, expected a list")
    return [_added_token("a special token", value) for value in found]


def _added_token(name: str, value: Any) -> AddedToken:
    """A token from its text or from an object; one given as text is special."""
    fields = value if isinstance(value, dict) else {"content": value, "special": True}
    content = fields.get("content")
    flags = {flag: fields[flag] for flag in _FLAGS if flag in fields}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{name} is {str(value)[:40]!r}, expected a string, or an object with a token")
    return AddedToken(content, **flags)


def _id(value: Any) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{text[:40]!r} is not a token id")
    return int(text)


def _fitting(
    tokens: Iterable[AddedToken], built: tokenizers.Tokenizer, num_rows: int | None
) -> Iterator[AddedToken]:
    """The tokens that are in the vocabulary, and the new ones that get an id below `num_rows`."""
    next_id = max([built.get_vocab_size(with_added_tokens=False) - 1, *built.get_added_tokens_decoder()]) + 1
    new: set[str] = set()
    for token in tokens:
        if built.token_to_id(token.content) is None and token.content not in new:
            if num_rows is not None and next_id + len(new) >= num_rows:
                continue
            new.add(token.content)
        yield token
