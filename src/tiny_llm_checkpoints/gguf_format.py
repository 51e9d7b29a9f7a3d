"""The GGUF container: a file's metadata and the position of each tensor. Source: ggml's GGUF specification.

The file is untrusted: every count and size is checked against the file's length before memory is allocated
for it, and no two tensors may share bytes. Knows nothing of models. Tensor data is read only on request.
"""

import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .git_lfs import refuse_pointer
from .tensor_ranges import TensorRange, check_no_overlap

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # of metadata keys, and of tensors; a model of 126 layers has about 1,200 tensors
MAX_ITEMS = 1 << 22  # items in all metadata arrays together; a vocabulary of 262,144 has about 1.3 million
MAX_TEXT = 1 << 24  # bytes of one string; a long chat template has 20 thousand
MAX_NAME = 1024  # bytes of a key's or a tensor's name; ggml's own limit for tensors is 63
MAX_DIMENSIONS = 4
SMALLEST_TENSOR_INFO = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, type and offset
MAX_ALIGNMENT = 1 << 20
CHUNK = 1 << 23  # bytes of the header that are read at a time

_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGMLType(NamedTuple):
    """How a tensor's values are stored: `block` values in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


TYPES = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
}
_OTHER_TYPES = {  # for error messages; those from 31 on are of files for certain processors
    **{9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"},
}


class GGUFTensor(NamedTuple):
    """Location of a tensor: `shape` has the rows first, `offset` counts from the start of `file`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int

    def read(self) -> bytes:
        """The tensor's bytes. Raises ValueError if the file has become shorter."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.nbytes)
        if len(data) != self.nbytes:
            raise ValueError(
                f"tensor {self.name}: expected {self.nbytes} bytes at {self.offset}, found {len(data)}"
            )
        return data


class GGUFFile(NamedTuple):
    """A GGUF file's header. Metadata values are Python numbers, booleans, strings and lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFFile:
    """Read the header of a GGUF file (version 2 or 3, little-endian).

    Raises ValueError with the found and the expected value if the file is not complete and consistent. Time
    and memory are bounded by the actual size of the header.
    """
    with path.open("rb") as file:
        refuse_pointer(file)
        cursor = _Cursor(file, path.stat().st_size)
        magic = cursor.take(4, "the magic")
        if magic != MAGIC:
            raise ValueError(f"not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}")
        version = cursor.number("I", "the version")
        if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
            raise ValueError("the file is big-endian, which is not supported; supported: little-endian")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version} is not supported; supported: 2 and 3, little-endian")
        num_tensors, num_keys = (
            cursor.number("Q", "the tensor count"),
            cursor.number("Q", "the metadata count"),
        )
        for count, least, what in (
            (num_tensors, SMALLEST_TENSOR_INFO, "tensors"),
            (num_keys, 13, "metadata keys"),
        ):
            if count > MAX_ENTRIES:
                raise ValueError(f"the header claims {count} {what}, expected at most {MAX_ENTRIES}")
            cursor.expect(count * least, f"{count} {what}")
        metadata = _read_metadata(cursor, num_keys)
        return GGUFFile(path, metadata, _read_tensors(path, cursor, num_tensors, _alignment(metadata)))


class _Cursor:
    """Reads a file from its start, piece by piece, and never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self.position = 0
        self.num_items = 0
        self._file = file
        self._buffer = b""
        self._buffered_from = 0

    def expect(self, count: int, what: str) -> None:
        """Raise ValueError unless `count` bytes are left."""
        if count > self.size - self.position:
            raise ValueError(
                f"truncated or corrupted: for {what} at byte {self.position}, at least {count} bytes are "
                f"expected, but only {self.size - self.position} of the file's {self.size} bytes are left"
            )

    def take(self, count: int, what: str) -> bytes:
        """Read the next `count` bytes."""
        start = self.position - self._buffered_from
        if start + count > len(self._buffer):
            self.expect(count, what)
            self._buffer = self._buffer[start:] + self._file.read(max(count, CHUNK))
            self._buffered_from, start = self.position, 0
            if count > len(self._buffer):
                raise ValueError(f"truncated: the file became shorter while {what} was read")
        self.position += count
        return self._buffer[start : start + count]

    def number(self, code: str, what: str) -> Any:
        """Read one little-endian number; `code` is its type in `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str, max_bytes: int = MAX_TEXT) -> str:
        """Read a length and that many bytes of UTF-8."""
        length = int.from_bytes(self.take(8, what), "little")
        if length > max_bytes:
            raise ValueError(f"{what} claims {length} bytes of text, expected at most {max_bytes}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 (at byte {self.position - length})") from error

    def texts(self, count: int, what: str) -> list[str]:
        """Read `count` strings: fast from the buffer, otherwise (at its end, or if invalid) with `text`."""
        found: list[str] = []
        while len(found) < count:
            buffer, at = self._buffer, self.position - self._buffered_from
            try:
                while len(found) < count:
                    end = at + 8 + _LENGTH.unpack_from(buffer, at)[0]
                    if end > len(buffer):
                        break
                    found.append(buffer[at + 8 : end].decode())
                    at = end
            except (struct.error, UnicodeDecodeError):
                pass  # `text` reads the string at `at` again and reports the error
            self.position = self._buffered_from + at
            if len(found) < count:
                found.append(self.text(what))
        return found


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text("a metadata key", MAX_NAME)
        if key in metadata:
            raise ValueError(f"metadata {key} appears twice")
        metadata[key] = _read_value(cursor, cursor.number("I", f"the type of {key}"), f"metadata {key}")
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == _STRING:
        return cursor.text(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    if kind not in _NUMBERS:
        raise ValueError(f"{what} has the unknown type {kind}, expected 0 to 12")
    return cursor.number(_NUMBERS[kind], what)


def _read_array(cursor: _Cursor, what: str) -> list[Any]:
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    cursor.num_items += count
    if cursor.num_items > MAX_ITEMS:
        raise ValueError(f"{what} claims {count} items; all metadata together may have at most {MAX_ITEMS}")
    if kind == _STRING:
        cursor.expect(8 * count, f"{what}, {count} strings,")
        return cursor.texts(count, what)
    if kind not in _NUMBERS:
        raise ValueError(f"{what} is an array of type {kind}, expected numbers or strings")
    code = f"<{count}{_NUMBERS[kind]}"
    return list(struct.unpack(code, cursor.take(struct.calcsize(code), f"{what}, {count} numbers,")))


def _alignment(metadata: dict[str, Any]) -> int:
    """The alignment of all tensor offsets: a power of two, as in ggml."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(
            f"metadata general.alignment is {str(alignment)[:40]}, expected a power of two up to "
            f"{MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensors(path: Path, cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        name = cursor.text("a tensor's name", MAX_NAME)
        if name in tensors:
            raise ValueError(f"tensor {name} appears twice")
        tensors[name] = _read_tensor(path, cursor, name)
    data = -(-cursor.position // alignment) * alignment
    placed = {name: _placed(tensor, data, alignment, cursor.size) for name, tensor in tensors.items()}
    check_no_overlap(TensorRange(t.offset, t.offset + t.nbytes, t.name) for t in placed.values())
    return placed


def _placed(tensor: GGUFTensor, data: int, alignment: int, size: int) -> GGUFTensor:
    """The tensor with its offset counted from the start of the file instead of the data section."""
    what = f"tensor {tensor.name}"
    offset = data + tensor.offset
    if offset + tensor.nbytes > size:
        raise ValueError(
            f"truncated or corrupted: {what} ends at byte {offset + tensor.nbytes}, the file at {size}"
        )
    if tensor.offset % alignment:
        raise ValueError(f"{what} has the offset {tensor.offset}, expected a multiple of {alignment}")
    return tensor._replace(offset=offset)


def _read_tensor(path: Path, cursor: _Cursor, name: str) -> GGUFTensor:
    """Read one tensor's header; its offset still counts from the start of the data section."""
    what = f"tensor {name}"
    num_dimensions = cursor.number("I", what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{what} has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q", what) for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.number("I", what), cursor.number("Q", what)
    if kind not in TYPES:
        known = ", ".join(known.name for known in TYPES.values())
        raise ValueError(
            f"{what} has type {_OTHER_TYPES.get(kind, kind)}, which is not supported; supported: {known}"
        )
    if 0 in shape or shape[-1] % TYPES[kind].block:
        raise ValueError(
            f"{what} has the shape {list(shape)}, expected rows of whole blocks of {TYPES[kind].block} "
            f"values ({TYPES[kind].name})"
        )
    nbytes = prod(shape) // TYPES[kind].block * TYPES[kind].nbytes
    return GGUFTensor(path, name, shape, TYPES[kind], offset, nbytes)
