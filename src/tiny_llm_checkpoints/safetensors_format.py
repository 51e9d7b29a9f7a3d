"""The safetensors container: the tensors of a file and their positions. Source: Hugging Face's safetensors.

The file is untrusted: its header is checked against the file's length before tensors are read. As in the
format's own library, the tensors must fill the data section exactly, without overlaps or gaps. Knows nothing
of models.
"""

import json
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .git_lfs import refuse_pointer
from .tensor_ranges import TensorRange, check_no_overlap

MAX_HEADER = 1 << 24  # bytes; a model of 126 layers has about 150 thousand
MAX_DIMENSIONS = 8

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
_CHUNK = 1 << 24  # bytes that are compared at once


class SafeTensor(NamedTuple):
    """Location of a tensor: `offset` counts from the file's start; `dtype` is named as in the format."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return prod(self.shape) * _SIZES[self.dtype]

    def read(self) -> bytes:
        """The tensor's bytes. Raises ValueError if the file has become shorter."""
        nbytes = self.nbytes
        with self.file.open("rb") as file:
            file.seek(self.offset)
            data = file.read(nbytes)
        if len(data) != nbytes:
            raise ValueError(
                f"tensor {self.name}: expected {nbytes} bytes at {self.offset}, found {len(data)}"
            )
        return data

    def equals(self, other: "SafeTensor") -> bool:
        """True if both have the same type, shape and bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with self.file.open("rb") as one, other.file.open("rb") as another:
            one.seek(self.offset)
            another.seek(other.offset)
            sizes = (min(_CHUNK, self.nbytes - start) for start in range(0, self.nbytes, _CHUNK))
            return all(one.read(size) == another.read(size) for size in sizes)


def read_safetensors_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of a safetensors file by name.

    Raises ValueError with the found and the expected value if the file is not complete and consistent.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        refuse_pointer(file)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"truncated or corrupted: a header of {length} bytes in a file of {size}")
        if length > MAX_HEADER:
            raise ValueError(f"the header claims {length} bytes, expected at most {MAX_HEADER}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"the header is a {type(header).__name__}, expected an object of tensors")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_filled(tensors.values(), 8 + length, size)
    return tensors


def _check_filled(tensors: Iterable[SafeTensor], begin: int, end: int) -> None:
    """Raise ValueError if a byte from `begin` to `end` belongs to two tensors or to none."""
    position = begin
    for tensor in check_no_overlap(TensorRange(t.offset, t.offset + t.nbytes, t.name) for t in tensors):
        if tensor.begin != position:
            raise ValueError(
                f"bytes {position} to {tensor.begin}, before tensor {tensor.name}, belong to no tensor"
            )
        position = tensor.end
    if position != end:
        raise ValueError(f"the last tensor ends at byte {position}, expected the end of the file at {end}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the header has the key {key!r} twice")
    return found


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> SafeTensor:
    """Check one entry of the header: {"dtype": "F32", "shape": [N, K], "data_offsets": [begin, end]}."""
    what = f"tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{what} lacks dtype, shape or data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(
            f"{what} has type {str(dtype)[:20]!r}, which is not supported; supported: {', '.join(_SIZES)}"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"{what} has the shape {str(shape)[:60]}, expected up to {MAX_DIMENSIONS} whole numbers"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has the data_offsets {str(offsets)[:60]}, expected two whole numbers")
    begin, end = offsets
    nbytes = prod(shape) * _SIZES[dtype]
    if end - begin != nbytes:
        raise ValueError(f"{what} has {end - begin} bytes, expected {nbytes} for {dtype} of shape {shape}")
    if data + end > size:
        raise ValueError(f"truncated or corrupted: {what} ends at byte {data + end}, the file at {size}")
    return SafeTensor(path, name, dtype, tuple(shape), data + begin)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
