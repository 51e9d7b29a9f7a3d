"""From a model's name to a model that runs: find it, read its description, check it, load its weights."""

from pathlib import Path
from typing import NamedTuple

from .checkpoint import Checkpoint
from .errors import ModelFileError
from .gguf_reader import read_gguf
from .hf_reader import read_folder
from .hub import find_model
from .kernels import compiled_available
from .model import Model
from .resources import needing
from .tokenizer import Tokenizer

BESIDE_WEIGHTS = 192 << 20  # bytes: the file once more while it is read, the tokenizer, stacks of threads


class LoadedModel(NamedTuple):
    """A model, its tokenizer, and where they came from; `name` is the hub's, or the file's or folder's."""

    name: str
    path: Path
    model: Model
    tokenizer: Tokenizer


def load_model(model: str | Path | None, activation_bits: int = 16) -> LoadedModel:
    """Load a model: None (the embedded one), a .gguf file, a folder in Hugging Face's layout, or a hub id.

    activation_bits: as in `EngineConfig`.

    Raises `ModelFileError` naming the file, what was found and what was expected, and ValueError where the
    environment asks for kernels that there are not. Raises `OutOfResourcesError` where memory is short.
    """
    compiled_available()  # asked first: what is wrong with the kernels is not the file's fault
    path = find_model(model)
    is_hub_id = model is not None and not Path(model).expanduser().exists()
    name = str(model) if is_hub_id else path.resolve().name.removesuffix(".gguf")
    with needing(f"the model {path}", _weight_bytes(path) + BESIDE_WEIGHTS):
        checkpoint = read_checkpoint(path)
        return LoadedModel(name, path, checkpoint.build(activation_bits), checkpoint.tokenizer)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path, by what is there; no weight is read yet."""
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path}: weights alone are no model: name the folder that it is in")
    return read_gguf(path)


def _weight_bytes(path: Path) -> int:
    """Bytes of the files that the weights are in."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
