"""Reads the tokenizer of a folder in Hugging Face's layout: tokenizer.json and the files next to it.

The `tokenizers` library reads tokenizer.json. The beginning and end tokens come from tokenizer_config.json
and special_tokens_map.json; the chat template is in one of three places.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import tokenizers

from .errors import ModelFileError, reading
from .git_lfs import refuse_pointer
from .json_file import read_json, read_regular
from .tokenizer import Tokenizer
from .tokenizer_library import load

MAX_BYTES = 1 << 28  # bytes of a tokenizer.json; one with 262,144 tokens has 33 million
MAX_TEMPLATE = 1 << 24  # bytes of a chat_template.jinja; a long one has 20 thousand


def hf_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a folder. Raises a `ModelFileError` that names the file and the problem."""
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
        raise ModelFileError(
            f"{path}: found only tokenizer.model, which is not supported; expected tokenizer.json"
        )
    with reading(file):
        data = read_regular(file, MAX_BYTES)
        refuse_pointer(BytesIO(data))
        return load(data.decode())


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file does not exist."""
    return read_json(file) if file.exists() else {}


def _token(settings: Mapping[str, Any], name: str) -> str:
    """A token's text, which is a string or the `content` of an object; "" if it is missing."""
    value = settings.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{name} is {str(value)[:40]!r}, expected a string")
    return content or ""


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template: from its own file, or from a setting, which may be a list of named templates."""
    file = path / "chat_template.jinja"
    if file.exists():
        with reading(file):
            return read_regular(file, MAX_TEMPLATE).decode()
    found = settings.get("chat_template") or _json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
