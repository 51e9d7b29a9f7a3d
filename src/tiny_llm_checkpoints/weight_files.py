"""Selects the safetensors files of a folder that make up its checkpoint, and ignores others.

Repositories may also contain the original release (`consolidated.safetensors`), adapters, and weights in
other formats. The first of these that exists is the checkpoint: the files that `model.safetensors.index.json`
names; `model.safetensors`; all parts `model-00001-of-00003.safetensors`; all .safetensors files except
consolidated ones and adapters.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import ModelFileError, reading
from .json_file import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NOT_CHECKPOINTS = ("consolidated*.safetensors", "adapter_*.safetensors")

_PART = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files in a folder. Raises a `ModelFileError` that names a missing file."""
    index = folder / INDEX
    single = (folder / SINGLE).is_file()
    if index.exists():
        names = indexed_names(index, must_exist=True)
        if single and SINGLE not in names:
            raise ModelFileError(
                f"{folder}: {INDEX} does not name {SINGLE}, so one of them is out of date; remove that one"
            )
        return [folder / name for name in names]
    if single:
        return [folder / SINGLE]
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    names = checkpoint_names(found)
    if names:
        _check_parts(folder, names)
        return [folder / name for name in names]
    if found:
        raise ModelFileError(f"{folder}: {found[0]} is not a checkpoint; expected {SINGLE} or {INDEX}")
    raise ModelFileError(
        f"{folder}: no {SINGLE}; in a folder, .safetensors is the only supported weight format"
    )


def indexed_names(index: Path, *, must_exist: bool) -> list[str]:
    """The file names in an index. must_exist: raise `ModelFileError` for a name that is not a file."""
    weight_map = read_json(index).get("weight_map")
    with reading(index):
        names = _names_of(weight_map)
        missing = [name for name in names if must_exist and not (index.parent / name).is_file()]
        if missing:
            raise ValueError(f"weight_map names {missing[0]!r}, which is not a file in this folder")
    return names


def checkpoint_names(names: Iterable[str]) -> list[str]:
    """The names that belong to the checkpoint if there is no index, in order."""
    own = [name for name in sorted(names) if not any(fnmatchcase(name, p) for p in NOT_CHECKPOINTS)]
    if SINGLE in own:
        return [SINGLE]
    return [name for name in own if _PART.fullmatch(name)] or own


def _names_of(weight_map: Any) -> list[str]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("weight_map is missing, expected an object of file names")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name:
            raise ValueError(
                f"weight_map has {str(name)[:200]!r}, expected the name of a file in this folder"
            )
    return sorted(set(weight_map.values()))


def _check_parts(folder: Path, names: list[str]) -> None:
    """Raise `ModelFileError` if a part is missing; only needed without an index."""
    match = _PART.fullmatch(names[0])
    if match is None:
        return
    count, there = int(match[2]), set(names)
    for number in range(1, count + 1):
        if (name := f"model-{number:05}-of-{count:05}.safetensors") not in there:
            raise ModelFileError(
                f"{folder / name}: part {number} of {count} is missing, expected in the same folder"
            )
