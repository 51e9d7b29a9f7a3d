"""Files that stand beside the weights: read whole, and refused by name where they cannot be."""

import json
from pathlib import Path
from typing import Any

from .errors import reading

MOST_JSON = 1 << 24  # bytes of a configuration or index; the largest known has about 300 thousand


def read_regular(file: Path, most: int) -> bytes:
    """All bytes of a file. `ModelFileError` for one of more than `most`, and for a pipe or a device."""
    with reading(file):
        if not file.is_file() and file.exists() and not file.is_dir():
            raise ValueError("not a regular file")
        size = file.stat().st_size
        if size > most:
            raise ValueError(f"{size} bytes, expected at most {most}")
        return file.read_bytes()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; raises `ModelFileError` for one that is missing, too long or something else."""
    with reading(file):
        content = read_regular(file, MOST_JSON)
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"holds {type(found).__name__}, expected an object")
        return found
