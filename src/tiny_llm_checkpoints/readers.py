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
        return read_folder(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(
            f"{path}: a .safetensors file has only weights; pass the folder that contains it"
        )
    if not path.is_file():
        raise ModelFileError(f"{path}: neither a regular file nor a folder")
    return read_gguf(path)
