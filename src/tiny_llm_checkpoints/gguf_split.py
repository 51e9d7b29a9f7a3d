"""A model in several GGUF files, `NAME-00001-of-00003.gguf` and so on, read as one.

The first file has the metadata; each has its number, their count, and tensors of its own. Format: llama.cpp's
gguf-split.
"""

import re
from pathlib import Path

from .errors import ModelFileError, reading
from .gguf_format import GGUFFile, read_gguf_header

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_SAME = (_TENSORS, "general.architecture", "general.name")  # in all parts that have them


def read_gguf_files(path: Path) -> GGUFFile:
    """The header of a GGUF file, with the tensors of all files where the model is split.

    path: the only file, or the first. Raises `ModelFileError` naming the file that is missing, out of order
    or wrong.
    """
    first = _header(path)
    with reading(path):
        count = _integer(first, _COUNT, 1)
        if count <= 1 and (_COUNT not in first.metadata or len(split_names(path.name)) == 1):
            return first
        names = _names(path, _integer(first, _NUMBER), count)
    others = [_part(path.with_name(name), place, first) for place, name in enumerate(names[1:], 1)]
    return _joined([first, *others])


def split_names(name: str) -> list[str]:
    """The names of all files of a split model, in order; only `name` where it is not one of several."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def stem(name: str) -> str:
    """What a model file is called without `.gguf`, and without the number of a part."""
    match = _PART.fullmatch(name)
    return name.removesuffix(".gguf") if match is None else match["stem"]


def _names(path: Path, number: int, count: int) -> list[str]:
    names = split_names(path.name)
    if len(names) != count:
        raise ValueError(
            f"the file says that it is part {number + 1} of {count}, expected a name that ends in "
            f"-{number + 1:05}-of-{count:05}.gguf"
        )
    if number != 0 or names[0] != path.name:
        raise ValueError(f"this is part {number + 1} of {count}: open the first part, {names[0]}")
    return names


def _part(path: Path, place: int, first: GGUFFile) -> GGUFFile:
    """One more file of the model that `first` begins. place: counted from 0."""
    count = _integer(first, _COUNT)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file: part {place + 1} of {count} is missing")
    part = _header(path)
    with reading(path):
        for key, wanted in ((_NUMBER, place), (_COUNT, count)):
            if (found := _integer(part, key)) != wanted:
                raise ValueError(f"{key} is {found}, expected {wanted}")
        for key in _SAME:
            if key in part.metadata and part.metadata[key] != first.metadata.get(key):
                raise ValueError(f"{key} is not what it is in the first part, {first.path.name}")
    return part


def _joined(parts: list[GGUFFile]) -> GGUFFile:
    first, tensors = parts[0], dict(parts[0].tensors)
    for part in parts[1:]:
        with reading(part.path):
            twice = tensors.keys() & part.tensors.keys()
            if twice:
                raise ValueError(f"tensor {min(twice)} is in another part too")
        tensors |= part.tensors
    with reading(first.path):
        if (wanted := _integer(first, _TENSORS, len(tensors))) != len(tensors):
            raise ValueError(f"{_TENSORS} is {wanted}, the parts have {len(tensors)} tensors")
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
