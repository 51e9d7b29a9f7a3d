"""Reads the tokenizer of a folder in Hugging Face's layout: tokenizer.json and the files next to it.

The `tokenizers` library reads tokenizer.json. `hf_special_tokens` reads the beginning and end tokens, and
tokens that only the settings name; the chat templates are in files of their own or in a setting.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import tokenizers

from .errors import ModelFileError, reading
from .git_lfs import refuse_pointer
from .hf_special_tokens import add_tokens, read_optional, token_of, tokenizer_settings
from .json_file import read_regular
from .tokenizer import Tokenizer
from .tokenizer_library import load

MAX_BYTES = 1 << 28  # bytes of a tokenizer.json; one with 262,144 tokens has 33 million
TEMPLATES = "additional_chat_templates"  # the folder of templates other than the default
MAX_TEMPLATE = 1 << 24  # bytes of a chat_template.jinja; a long one has 20 thousand


def hf_tokenizer(path: Path, num_rows: int | None = None) -> Tokenizer:
    """Read the tokenizer of a folder. Raises a `ModelFileError` that names the file and the problem.

    num_rows: rows of the model's embedding, which limit the tokens that the settings add.
    """
    built = _tokenizer_json(path)
    settings = tokenizer_settings(path)
    with reading(path / "tokenizer_config.json"):
        bos, eos = token_of(settings, "bos_token"), token_of(settings, "eos_token")
    add_tokens(path, settings, built, num_rows)
    eos_id = built.token_to_id(eos) if eos else None
    templates = _chat_templates(path, settings)
    with reading(path / "tokenizer.json"):
        return Tokenizer(
            built,
            bos_token=bos,
            eos_token=eos,
            eos_token_ids=frozenset() if eos_id is None else frozenset({eos_id}),
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
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


def _chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name: from files of their own, or from a setting, which may be a list of templates."""
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / TEMPLATES).glob("*.jinja"))}
    if templates := {name: _text_of(file) for name, file in files.items() if file.exists()}:
        return templates
    found = settings.get("chat_template") or read_optional(path / "chat_template.json").get("chat_template")
    if not isinstance(found, list):
        found = [{"name": "default", "template": found}]
    named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def _text_of(file: Path) -> str:
    with reading(file):
        return read_regular(file, MAX_TEMPLATE).decode()
