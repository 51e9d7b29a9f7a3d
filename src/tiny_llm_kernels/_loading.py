"""Loads the C++ extension, or records why it cannot be used.

`native` is the extension. It is untyped; the functions of the package that call it have the annotations.
"""

import importlib.metadata
import importlib.util
import os
import re
import reprlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

INSTRUCTION_SETS = ("auto", "off", "portable", "avx2", "avx512")
MAX_THREADS = 1024
MAX_DIGITS = 9  # in TINY_LLM_NUM_THREADS
EXTENSION = "tiny_llm_kernels._kernels"


class UnavailableError(Exception):
    """The extension cannot be used; the message is the reason, in one line."""


class Unavailable:
    """Replaces the extension if it is unavailable: any use raises RuntimeError with the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"tiny_llm_kernels.{name} cannot be called: {self._reason}")


def load(wanted: str, threads: str | None) -> ModuleType:
    """Load the extension and apply TINY_LLM_KERNELS and TINY_LLM_NUM_THREADS.

    Raises `UnavailableError` if it is off, not built, or cannot be loaded, ValueError for an invalid setting,
    and ImportError for an extension that was built for another MLX version.
    """
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f"TINY_LLM_KERNELS must be auto, off, portable, avx2 or avx512, got {wanted!r}")
    if wanted == "off":
        raise UnavailableError("switched off by TINY_LLM_KERNELS=off")
    num_threads = None if threads is None else _number_of_threads(threads)
    module = _loaded(_spec())
    if wanted != "auto":
        module.select_instruction_set(wanted)
    if num_threads is not None:
        module.set_num_threads(num_threads)
    return module


def _spec() -> ModuleSpec:
    """Find the extension, in the overlay first, then in the package; check its MLX version."""
    spec = _overlay_spec() or importlib.util.find_spec(EXTENSION)
    if spec is None or spec.origin is None:
        raise UnavailableError("not built (no C++ compiler when tiny-llm was installed, or not Linux)")
    built, installed = _built_for(Path(spec.origin)), importlib.metadata.version("mlx")
    if built != installed:
        raise ImportError(
            f"tiny_llm_kernels was built for mlx {built} but mlx {installed} is installed: run `pdm install` "
            f"(or `pip install .`) again, or `pdm run build-kernels` for your own library ({spec.origin})"
        )
    return spec


def _overlay_spec() -> ModuleSpec | None:
    """A learner's library in the overlay (tiny_llm's folder, or TINY_LLM_OVERLAY); it takes precedence."""
    overlay = Path(os.environ.get("TINY_LLM_OVERLAY") or Path(__file__).parents[1] / "tiny_llm")
    file = overlay / f"_kernels{EXTENSION_SUFFIXES[0]}"
    return importlib.util.spec_from_file_location(EXTENSION, file) if file.exists() else None


def _built_for(extension: Path) -> str | None:
    """The MLX version that is stamped into the extension file; found without loading it."""
    stamp = re.search(rb"tiny_llm_kernels built for mlx=([^;\0]+);", extension.read_bytes())
    return stamp and stamp.group(1).decode()


def _loaded(spec: ModuleSpec) -> ModuleType:
    """Load the extension and run a kernel, which fails if it and MLX disagree about the array type.

    It is loaded once, even if a setting was rejected and the package is imported again: it cannot register
    its types twice.
    """
    if EXTENSION in sys.modules:
        return sys.modules[EXTENSION]
    try:
        module = importlib.util.module_from_spec(spec)
        assert spec.loader is not None  # because it has an origin
        spec.loader.exec_module(module)
        module.swiglu(mx.array(0.0)[None], mx.array(0.0)[None])
        sys.modules[EXTENSION] = module
    except (ImportError, TypeError) as error:
        raise UnavailableError(f"built, but cannot be loaded: {str(error).splitlines()[0]}") from error
    return module


def _number_of_threads(text: str) -> int:
    """Parse TINY_LLM_NUM_THREADS. Raises ValueError unless it is from 1 to `MAX_THREADS`."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
    if not is_number or not 1 <= int(text) <= MAX_THREADS:
        raise ValueError(
            f"TINY_LLM_NUM_THREADS must be a whole number from 1 to {MAX_THREADS}, got {reprlib.repr(text)}"
        )
    return int(text)


native: Any
reason: str | None = None
try:
    native = load(os.environ.get("TINY_LLM_KERNELS", "auto"), os.environ.get("TINY_LLM_NUM_THREADS"))
except UnavailableError as error:
    reason = str(error)
    native = Unavailable(reason)
