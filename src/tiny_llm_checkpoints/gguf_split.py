"""Reads a model that is split into several GGUF files: `NAME-00001-of-00003.gguf` and so on.

The first file has the metadata. Each file has its own number, the number of files, and part of the tensors.
Source: llama.cpp's gguf-split.
"""

import re
from pathlib import Path

from .errors import ModelFileError, reading
from .gguf_format import GGUFFile, read_gguf_header

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_SHARED_KEYS = (_TENSORS, "general.architecture", "general.name")  # equal in all parts that have them


def read_gguf_files(path: Path) -> GGUFFile:
    """Read the header of a GGUF file; for a split model, the result has the tensors of all its files.

    path: the only file, or the first part.

    Raises a `ModelFileError` that names the file that is missing, out of order or inconsistent.
    """
    first = _header(path)
    with reading(path):
        count = _integer(first, _COUNT, 1)
        if count <= 1 and (_COUNT not in first.metadata or len(split_names(path.name)) == 1):
            return first
        names = _part_names(path, _integer(first, _NUMBER), count)
    others = [_part(path.with_name(name), place, first) for place, name in enumerate(names[1:], 1)]
    return _joined([first, *others])


def split_names(name: str) -> list[str]:
    """The names of all files of a split model, in order; `[name]` for other names."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def stem(name: str) -> str:
    """A model file's name without `.gguf` and without the part number."""
    match = _PART.fullmatch(name)
    return name.removesuffix(".gguf") if match is None else match["stem"]


def _part_names(path: Path, number: int, count: int) -> list[str]:
    names = split_names(path.name)
    if len(names) != count:
        raise ValueError(
            f"the metadata says part {number + 1} of {count}, expected a file name that ends in "
            f"-{number + 1:05}-of-{count:05}.gguf"
        )
    if number != 0 or names[0] != path.name:
        raise ValueError(f"this is part {number + 1} of {count}; open the first part, {names[0]}")
    return names


def _part(path: Path, place: int, first: GGUFFile) -> GGUFFile:
    """Read a further part of the model whose first part is `first`. place: its index, counted from 0."""
    count = _integer(first, _COUNT)
    if not path.is_file():
        raise ModelFileError(f"{path}: part {place + 1} of {count} is missing, expected in the same folder")
    part = _header(path)
    with reading(path):
        for key, wanted in ((_NUMBER, place), (_COUNT, count)):
            if (found := _integer(part, key)) != wanted:
                raise ValueError(f"{key} is {found}, expected {wanted}")
        for key in _SHARED_KEYS:
            if key in part.metadata and part.metadata[key] != first.metadata.get(key):
                raise ValueError(
                    f"{key} is {str(part.metadata[key])[:60]!r}, expected the first part's "
                    f"{str(first.metadata.get(key))[:60]!r} ({first.path.name})"
                )
    return part


def _joined(parts: list[GGUFFile]) -> GGUFFile:
    first, tensors = parts[0], dict(parts[0].tensors)
    for part in parts[1:]:
        with reading(part.path):
            twice = tensors.keys() & part.tensors.keys()
            if twice:
                raise ValueError(f"tensor {min(twice)} appears in two parts, expected in one")
        tensors |= part.tensors
    with reading(first.path):
        if (wanted := _integer(first, _TENSORS, len(tensors))) != len(tensors):
            raise ValueError(f"{_TENSORS} is {wanted}, found {len(tensors)} tensors in all parts")
    return first._replace(tensors=tensors)


def _header(path: Path) -> GGUFFile:
    with reading(path):
        return read_gguf_header(path)


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int:
        raise ValueError(
            f"{key} is {'missing' if value is None else repr(value)[:60]}, expected a whole number"
        )
    return value
