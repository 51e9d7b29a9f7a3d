"""The tokenizer of a folder in Hugging Face's layout: tokenizer.json, and what stands beside it.

tokenizer.json is read by the library that wrote it; tokenizer_config.json and special_tokens_map.json say
which tokens begin and end a text, and the chat template has had three places.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from .errors import ModelFileError, reading
from .json_file import read_json, read_regular
from .tokenizer import Tokenizer
from .tokenizer_library import load

MOST_BYTES = 1 << 28  # of a tokenizer.json; one of 262,144 tokens has 33 million
MOST_TEMPLATE = 1 << 24  # of a chat_template.jinja; a long one has 20 thousand


def hf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder. Raises `ModelFileError` naming the file and what is wrong with it."""
    built = _tokenizer_json(path)
    settings = {**_json(path / "special_tokens_map.json"), **_json(path / "tokenizer_config.json")}
    with reading(path / "tokenizer_config.json"):
        bos, eos = _token(settings, "bos_token"), _token(settings, "eos_token")
    eos_id = built.token_to_id(eos) if eos else None
    template = _chat_template(path, settings)
    with reading(path / "tokenizer.json"):
        return Tokenizer(
            built,
            bos_token=bos,
            eos_token=eos,
            eos_token_ids=frozenset() if eos_id is None else frozenset({eos_id}),
            chat_template=template,
        )


def _tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists() and (path / "tokenizer.model").exists():
        raise ModelFileError(f"{path}: there is a tokenizer.model, but only tokenizer.json is supported")
    with reading(file):
        return load(read_regular(file, MOST_BYTES).decode())


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    return read_json(file) if file.exists() else {}


def _token(settings: Mapping[str, Any], name: str) -> str:
    """A token, given as a text or as an object with a `content`; empty where there is none."""
    value = settings.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{name} is {str(value)[:40]!r}, expected a text")
    return content or ""


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template: a file of its own, or a setting, which may be a list of named ones."""
    file = path / "chat_template.jinja"
    if file.exists():
        with reading(file):
            return read_regular(file, MOST_TEMPLATE).decode()
    found = settings.get("chat_template") or _json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
