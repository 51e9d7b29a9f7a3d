"""Reads the checkpoint at a path: a GGUF file, or a folder in Hugging Face's layout."""

from pathlib import Path

from .checkpoint import Checkpoint
from .errors import ModelFileError
from .gguf_reader import read_gguf
from .hf_reader import read_folder


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a GGUF file or a folder. Tensor data stays in the files.

    Raises a `ModelFileError` that names the file and the problem.
    """
    if path.is_dir():
        _check_folder(path)
        return read_folder(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(
            f"{path}: a .safetensors file has only weights; pass the folder that contains it"
        )
    if not path.is_file():
        raise ModelFileError(f"{path}: neither a regular file nor a folder")
    return read_gguf(path)


def _check_folder(path: Path) -> None:
    """Raise `ModelFileError` for a folder that holds no part of a model in Hugging Face's layout."""
    if (path / "config.json").exists() or any(path.glob("*.safetensors*")):
        return
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files:
        hint = f"to load a GGUF file from it, name the file: {gguf_files[0]}"
    else:
        hint = "a model folder has config.json, tokenizer.json and model.safetensors"
    raise ModelFileError(f"{path}: this folder has no config.json; {hint}")
