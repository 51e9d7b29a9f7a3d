"""Reads the small files of a checkpoint whole; errors name the file."""

import json
from pathlib import Path
from typing import Any

from .errors import reading

MAX_JSON = 1 << 24  # bytes of a configuration or an index; the largest known has about 300 thousand


def read_regular(file: Path, max_bytes: int) -> bytes:
    """Read a whole file. Raises `ModelFileError` if it exceeds `max_bytes`, or is a pipe or a device."""
    with reading(file):
        if not file.is_file() and file.exists() and not file.is_dir():
            raise ValueError("not a regular file")
        size = file.stat().st_size
        if size > max_bytes:
            raise ValueError(f"has {size} bytes, expected at most {max_bytes}")
        return file.read_bytes()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelFileError` if the file is missing, too long, or not a JSON object."""
    with reading(file):
        content = read_regular(file, MAX_JSON)
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:  # a number with thousands of digits raises ValueError
            raise ValueError(f"not valid JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"contains a {type(found).__name__}, expected an object")
        return found
