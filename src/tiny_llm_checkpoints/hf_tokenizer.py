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
        return _deterministic(load(data.decode()))


def _deterministic(built: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Raise ValueError for a tokenizer that draws merges at random, which is meant for training."""
    if dropout := getattr(built.model, "dropout", None):
        raise ValueError(f"dropout {dropout} is not supported: a text would have other tokens each time")
    return built


def _chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name: from files of their own, or from a setting, which may be a list of templates."""
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / TEMPLATES).glob("*.jinja"))}
    if templates := {name: _text_of(file) for name, file in files.items() if file.exists()}:
        return templates
    file = path / "tokenizer_config.json"
    if not settings.get("chat_template"):
        file = path / "chat_template.json"
        settings = read_optional(file)
    with reading(file):
        return _named_templates(settings.get("chat_template"))


def _named_templates(found: Any) -> dict[str, str]:
    """The templates of a setting: one text, or texts by name. Raises ValueError for anything else."""
    if not found:
        return {}
    if isinstance(found, str):
        return {"default": found}
    named = found
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    texts = [*named, *named.values()] if isinstance(named, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or len(named) < len(found):
        raise ValueError(f"chat_template is {str(found)[:60]!r}, expected a text or a list of named texts")
    return dict(named)


def _text_of(file: Path) -> str:
    with reading(file):
        return read_regular(file, MAX_TEMPLATE).decode()
