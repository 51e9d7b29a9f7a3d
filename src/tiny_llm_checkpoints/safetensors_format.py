"""The safetensors container: which tensors a file holds, and where their bytes lie.

The file is not trusted: its header is held against the bytes that are there before a tensor is read. As in
the format's own library, the tensors of a file fill its data exactly: no byte belongs to two of them, or to
none. Knows nothing of models. Format: Hugging Face's safetensors.
"""

import json
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .tensor_ranges import TensorRange, check_no_overlap

MOST_HEADER = 1 << 24  # bytes; a model of 126 layers has about 150 thousand
MOST_DIMENSIONS = 8

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}


class SafeTensor(NamedTuple):
    """Where one tensor lies: `offset` from the file's first byte; `dtype` in the format's own words."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.shape) * _SIZES[self.dtype]

    def read(self) -> bytes:
        """The tensor's bytes. ValueError where the file has become shorter."""
        nbytes = self.nbytes
        with self.file.open("rb") as file:
            file.seek(self.offset)
            data = file.read(nbytes)
        if len(data) != nbytes:
            raise ValueError(f"expected {nbytes} bytes at {self.offset}, found {len(data)}")
        return data


def read_safetensors_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of a safetensors file by name.

    Raises ValueError saying what was found and what was expected, for anything that is not a whole and
    consistent file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"truncated or corrupted: a header of {length} bytes in a file of {size}")
        if length > MOST_HEADER:
            raise ValueError(f"the header claims {length} bytes, expected at most {MOST_HEADER}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_key_twice)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"the header is {type(header).__name__}, expected an object of tensors")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_filled(tensors.values(), 8 + length, size)
    return tensors


def _check_filled(tensors: Iterable[SafeTensor], begin: int, end: int) -> None:
    """Refuse bytes of the data, from `begin` to `end`, that belong to two tensors or to none."""
    position = begin
    for tensor in check_no_overlap(TensorRange(t.offset, t.offset + t.nbytes, t.name) for t in tensors):
        if tensor.begin != position:
            raise ValueError(
                f"bytes {position} to {tensor.begin}, before tensor {tensor.name}, are no tensor's"
            )
        position = tensor.end
    if position != end:
        raise ValueError(f"the tensors end at byte {position}, the file at {end}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the header has {key!r} twice")
    return found


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> SafeTensor:
    """One entry of the header: {"dtype": "F32", "shape": [N, K], "data_offsets": [begin, end]}."""
    what = f"tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{what} has no dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"{what} has the unknown type {str(dtype)[:20]!r}; known: {', '.join(_SIZES)}")
    if not _whole_numbers(shape) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(
            f"{what} has the shape {str(shape)[:60]}, expected up to {MOST_DIMENSIONS} whole numbers"
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
