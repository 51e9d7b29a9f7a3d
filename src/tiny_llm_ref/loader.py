"""From a model's name to a model that runs: find it, read its description, check it, load its weights."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .checkpoint import Checkpoint
from .errors import ModelFileError
from .generation_defaults import AUTO, NEUTRAL, Defaults, of_other_folder, with_its_ends
from .gguf_reader import read_gguf
from .gguf_split import stem
from .hf_reader import read_folder
from .hub import find_model, local_path
from .kernels import compiled_available
from .model import Model
from .resources import needing
from .tokenizer import Tokenizer

BESIDE_WEIGHTS = 192 << 20  # bytes: the file once more while it is read, the tokenizer, stacks of threads


class LoadedModel(NamedTuple):
    """A model, its tokenizer, and where they came from; `name` is the hub's, or the file's or folder's.

    sampling_defaults: what applies where a caller leaves a parameter out, by the names of `SamplingParams`.
    """

    name: str
    path: Path
    model: Model
    tokenizer: Tokenizer
    sampling_defaults: Defaults


def load_model(
    model: str | Path | None, activation_bits: int = 16, generation_config: str = AUTO
) -> LoadedModel:
    """Load a model: None (the embedded one), a .gguf file, a folder in Hugging Face's layout, or a hub id.

    activation_bits, generation_config: as in `EngineConfig`.

    Raises `ModelFileError` naming the file, what was found and what was expected, and ValueError where the
    environment asks for kernels that there are not. Raises `OutOfResourcesError` where memory is short.
    """
    compiled_available()  # asked first: what is wrong with the kernels is not the file's fault
    path = find_model(model)
    is_hub_id = model is not None and not local_path(model).exists()
    name = str(model) if is_hub_id else stem(path.resolve().name)
    with needing(f"the model {path}", BESIDE_WEIGHTS):
        checkpoint, defaults = _with_defaults(read_checkpoint(path), generation_config)
    with needing(f"the model {path}", _weight_bytes(checkpoint) + BESIDE_WEIGHTS):
        built = checkpoint.build(activation_bits)
    return LoadedModel(name, path, built, checkpoint.tokenizer, defaults)


def _with_defaults(checkpoint: Checkpoint, generation_config: str) -> tuple[Checkpoint, Defaults]:
    """The checkpoint and its sampling defaults; another folder adds its end-of-sequence ids."""
    if generation_config == NEUTRAL:
        return checkpoint, {}
    if generation_config == AUTO:
        return checkpoint, checkpoint.recommended.defaults()
    other = of_other_folder(generation_config)
    return replace(checkpoint, config=with_its_ends(checkpoint.config, other)), other.defaults()


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path, by what is there; no weight is read yet."""
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path}: weights alone are no model: name the folder that it is in")
    if not path.is_file():
        raise ModelFileError(f"{path}: neither a regular file nor a folder")
    return read_gguf(path)


def _weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that the weights are in."""
    return sum(file.stat().st_size for file in {tensor.file for tensor in checkpoint.tensors.values()})
