"""From a model's name to a model that runs: find it, read its description, check it, load its weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx

from tiny_llm_checkpoints.checkpoint import Checkpoint
from tiny_llm_checkpoints.errors import ModelFileError, reading
from tiny_llm_checkpoints.gguf_split import stem
from tiny_llm_checkpoints.hub import find_model, local_path
from tiny_llm_checkpoints.quantized import Quantized
from tiny_llm_checkpoints.readers import read_checkpoint
from tiny_llm_checkpoints.recommendation import with_its_ends
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .generation_defaults import AUTO, NEUTRAL, Defaults, defaults_of, of_other_folder
from .kernels import compiled_available
from .linear import BiasedLinear, LinearLike, dense_linear, quantized_linear
from .model import Model, build_model
from .resources import needing

T = TypeVar("T")

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
        built = build(checkpoint, activation_bits)
    return LoadedModel(name, path, built, checkpoint.tokenizer, defaults)


def build(checkpoint: Checkpoint, activation_bits: int = 16) -> Model:
    """Read the weights and assemble the model; its packed matrices round activations to so many bits.

    One tensor at a time: each is read, brought into the form that it is multiplied in, and forgotten, so that
    the weights are never in memory twice. Raises `ModelFileError` for a tensor that cannot be read.
    """
    linears = _OnDemand(lambda name: _linear(checkpoint, name, activation_bits))
    vectors = _OnDemand(lambda name: _vector(checkpoint, f"{name}.weight"))
    return build_model(checkpoint.config, linears, vectors)


@dataclass(frozen=True)
class _OnDemand(Generic[T]):
    """Makes each parameter when it is asked for, and keeps none."""

    make: Callable[[str], T]

    def __getitem__(self, name: str) -> T:
        return self.make(name)


def _linear(checkpoint: Checkpoint, name: str, activation_bits: int) -> LinearLike:
    """One matrix, in the form that this device multiplies best, with its bias where it has one."""
    stored = _load(checkpoint, f"{name}.weight")
    if isinstance(stored, Quantized):
        matrix = quantized_linear(*stored, activation_bits=activation_bits)
    else:
        matrix = dense_linear(stored)
    if f"{name}.bias" not in checkpoint.tensors:
        return matrix
    return BiasedLinear(matrix, _vector(checkpoint, f"{name}.bias"))


def _vector(checkpoint: Checkpoint, name: str) -> mx.array:
    """A vector in float32."""
    stored = _load(checkpoint, name)
    if isinstance(stored, Quantized):
        raise ModelFileError(f"{checkpoint.path}: tensor {name} is quantized, expected plain numbers")
    vector = stored.astype(mx.float32)
    mx.eval(vector)
    return vector


def _load(checkpoint: Checkpoint, name: str) -> mx.array | Quantized:
    tensor = checkpoint.tensors[name]
    with reading(tensor.file):
        return tensor.load()


def _with_defaults(checkpoint: Checkpoint, generation_config: str) -> tuple[Checkpoint, Defaults]:
    """The checkpoint and its sampling defaults; another folder adds its end-of-sequence ids."""
    if generation_config == NEUTRAL:
        return checkpoint, {}
    if generation_config == AUTO:
        return checkpoint, defaults_of(checkpoint.recommended)
    other = of_other_folder(generation_config)
    return replace(checkpoint, config=with_its_ends(checkpoint.config, other)), defaults_of(other)


def _weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that the weights are in."""
    return sum(file.stat().st_size for file in {tensor.file for tensor in checkpoint.tensors.values()})
