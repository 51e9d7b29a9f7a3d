"""Loads the extension in C++, or says why it cannot be used. Its signatures are those of the package.

`native` is the extension. It has no types: the functions of the package, which call it, have them.
"""

import importlib.metadata
import importlib.util
import os
import re
import reprlib
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

INSTRUCTION_SETS = ("auto", "off", "portable", "avx2", "avx512")
MOST_THREADS = 1024
MOST_DIGITS = 9  # of a number of threads that is written out
EXTENSION = "tiny_llm_kernels._kernels"


class UnavailableError(Exception):
    """Why the extension cannot be used, in one line."""


class Unavailable:
    """Stands in for the extension: any use raises RuntimeError and says why it is not there."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"tiny_llm_kernels.{name} cannot be called: {self._reason}")


def load(wanted: str, threads: str | None) -> ModuleType:
    """The extension, set up as TINY_LLM_KERNELS and TINY_LLM_NUM_THREADS say.

    Raises `UnavailableError` where there is none, ValueError for a wrong setting, and ImportError for an
    extension that was built for another MLX.
    """
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f"TINY_LLM_KERNELS must be auto, off, portable, avx2 or avx512, got {wanted!r}")
    if wanted == "off":
        raise UnavailableError("switched off by TINY_LLM_KERNELS=off")
    module = _loaded(_spec())
    if wanted != "auto":
        module.select_instruction_set(wanted)
    if threads is not None:
        module.set_num_threads(_number_of_threads(threads))
    return module


def _spec() -> ModuleSpec:
    """Where the extension is: in the overlay, or else in the package; not there for another MLX."""
    spec = _learners_own() or importlib.util.find_spec(EXTENSION)
    if spec is None or spec.origin is None:
        raise UnavailableError("not built (no C++ compiler when tiny-llm was installed, or not Linux)")
    built, installed = _built_for(Path(spec.origin)), importlib.metadata.version("mlx")
    if built != installed:
        raise ImportError(
            f"tiny_llm_kernels was built for mlx {built} but mlx {installed} is installed: run `pdm install` "
            f"(or `pip install .`) again, or `pdm run build-kernels` for your own library ({spec.origin})"
        )
    return spec


def _learners_own() -> ModuleSpec | None:
    """A library in the overlay (tiny_llm's folder, or TINY_LLM_OVERLAY) stands in for the package's own."""
    overlay = Path(os.environ.get("TINY_LLM_OVERLAY") or Path(__file__).parents[1] / "tiny_llm")
    file = overlay / f"_kernels{EXTENSION_SUFFIXES[0]}"
    return importlib.util.spec_from_file_location(EXTENSION, file) if file.exists() else None


def _built_for(extension: Path) -> str | None:
    """The MLX version stamped into the extension's bytes, read without loading it."""
    stamp = re.search(rb"tiny_llm_kernels built for mlx=([^;\0]+);", extension.read_bytes())
    return stamp and stamp.group(1).decode()


def _loaded(spec: ModuleSpec) -> ModuleType:
    """The module of the extension, once a kernel has shown that MLX and it mean the same by an array."""
    try:
        module = importlib.util.module_from_spec(spec)
        assert spec.loader is not None  # it has an origin
        spec.loader.exec_module(module)
        module.swiglu(mx.array(0.0)[None], mx.array(0.0)[None])
    except (ImportError, TypeError) as error:
        raise UnavailableError(f"built, but cannot be loaded: {str(error).splitlines()[0]}") from error
    return module


def _number_of_threads(text: str) -> int:
    is_number = text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    if not is_number or not 1 <= int(text) <= MOST_THREADS:
        raise ValueError(
            f"TINY_LLM_NUM_THREADS must be a whole number from 1 to {MOST_THREADS}, got {reprlib.repr(text)}"
        )
    return int(text)


native: Any
reason: str | None = None
try:
    native = load(os.environ.get("TINY_LLM_KERNELS", "auto"), os.environ.get("TINY_LLM_NUM_THREADS"))
except UnavailableError as error:
    reason = str(error)
    native = Unavailable(reason)
