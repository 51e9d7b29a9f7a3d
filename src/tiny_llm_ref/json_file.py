"""A file that holds one JSON object, refused by name where it does not."""

import json
from pathlib import Path
from typing import Any

from .errors import reading

MOST_JSON = 1 << 24  # bytes of a configuration or index; the largest known has about 300 thousand


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; raises `ModelFileError` for one that is missing, too long or something else."""
    with reading(file):
        if not file.is_file() and file.exists():
            raise ValueError("not a regular file")
        size = file.stat().st_size
        if size > MOST_JSON:
            raise ValueError(f"{size} bytes of JSON, expected at most {MOST_JSON}")
        try:
            found = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"holds {type(found).__name__}, expected an object")
        return found
