"""Load a model by name: find it, read its description, check it, load its weights."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx

from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.checkpoint import Checkpoint
from tiny_llm_checkpoints.errors import ModelFileError, reading
from tiny_llm_checkpoints.gguf_split import stem
from tiny_llm_checkpoints.hub import find_model, local_path
from tiny_llm_checkpoints.quantized import Quantized
from tiny_llm_checkpoints.readers import read_checkpoint
from tiny_llm_checkpoints.recommendation import Recommendation, with_its_ends
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .generation_defaults import AUTO, NEUTRAL, Defaults, defaults_of, of_other_folder
from .kernels import compiled_available
from .linear import BiasedLinear, LinearLike, dense_linear, quantized_linear
from .model import Model, build_model
from .resources import requiring

T = TypeVar("T")

LOADING_BYTES = 192 << 20  # besides the weights: buffers while the file is read, the tokenizer, thread stacks


class LoadedModel(NamedTuple):
    """A model, its tokenizer, and where they came from.

    name: the hub id, or the name of the file or folder without its ending. sampling_defaults: the values of
    the sampling parameters that a caller leaves out, by the names of `SamplingParams`. sampling_source: where
    these values come from; None if there are none.
    """

    name: str
    path: Path
    model: Model
    tokenizer: Tokenizer
    sampling_defaults: Defaults
    sampling_source: str | None


class DescribedModel(NamedTuple):
    """What a model's files say, before any weight is read; the fields are those of `LoadedModel`."""

    name: str
    path: Path
    checkpoint: Checkpoint
    sampling_defaults: Defaults
    sampling_source: str | None


def describe_model(model: str | Path | None, generation_config: str = AUTO) -> DescribedModel:
    """Find a model and read its description: configuration, tokenizer, recommended sampling parameters.

    The arguments and errors are those of `load_model`.
    """
    path = find_model(model)
    is_hub_id = model is not None and not local_path(model).exists()
    name = str(model) if is_hub_id else stem(Path(os.path.abspath(path)).name)  # not a link's target
    with requiring(f"the model {path}", LOADING_BYTES):
        checkpoint, recommended = _recommended(read_checkpoint(path), generation_config)
        defaults = {} if recommended is None else defaults_of(recommended)
    source = recommended.source if recommended is not None and defaults else None
    return DescribedModel(name, path, checkpoint, defaults, source)


def load_model(
    model: str | Path | None, activation_bits: int = 16, generation_config: str = AUTO
) -> LoadedModel:
    """Load a model: None (the embedded one), a .gguf file, a folder in Hugging Face's layout, or a hub id.

    activation_bits, generation_config: as in `EngineConfig`.

    Raises `ModelFileError` naming the file, what was found and what was expected; ValueError if
    TINY_LLM_KERNELS or TINY_LLM_NUM_THREADS has a value that is not valid here; ImportError if the kernels
    were built for another MLX version; `OutOfResourcesError` if memory is short.
    """
    compiled_available()  # first, so that an error about the kernels does not look like one about the file
    name, path, checkpoint, defaults, source = describe_model(model, generation_config)
    with requiring(f"the model {path}", _weight_bytes(checkpoint) + LOADING_BYTES):
        built = build(checkpoint, activation_bits)
    return LoadedModel(name, path, built, checkpoint.tokenizer, defaults, source)


def load_chat_template(path: Path, tokenizer: Tokenizer, content_format: str) -> ChatTemplate | None:
    """Make the chat template of a model; None if it has none. Raises `ModelFileError`, naming the file.

    path: the model's file or folder. content_format: one of `CONTENT_FORMATS`.
    """
    source = tokenizer.chat_template
    if source is None:
        return None
    names = ("chat_template.jinja", "tokenizer_config.json")
    with reading(next((path / name for name in names if (path / name).exists()), path)):
        return ChatTemplate(
            source,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            content_format=content_format,
            tool_source=tokenizer.tool_template,
        )


def build(checkpoint: Checkpoint, activation_bits: int = 16) -> Model:
    """Read the weights and assemble the model.

    activation_bits: the bits that quantized matrices round activations to, 8 or 16. Each tensor is read,
    converted to the layout that its matrix product uses, and released before the next one is read, so the
    weights are never in memory twice. Raises `ModelFileError` for a tensor that cannot be read.
    """
    linears = _OnDemand(lambda name: _linear(checkpoint, name, activation_bits))
    vectors = _OnDemand(lambda name: _vector(checkpoint, f"{name}.weight"))
    return build_model(checkpoint.config, linears, vectors)


@dataclass(frozen=True)
class _OnDemand(Generic[T]):
    """A lookup that loads each parameter when it is asked for, and caches none."""

    make: Callable[[str], T]

    def __getitem__(self, name: str) -> T:
        return self.make(name)


def _linear(checkpoint: Checkpoint, name: str, activation_bits: int) -> LinearLike:
    """One matrix, in the layout that is fastest on this device, with its bias if it has one."""
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


def _recommended(checkpoint: Checkpoint, generation_config: str) -> tuple[Checkpoint, Recommendation | None]:
    """The checkpoint, with a named folder's end-of-sequence ids added, and the recommendation to use."""
    if generation_config == NEUTRAL:
        return checkpoint, None
    if generation_config == AUTO:
        return checkpoint, checkpoint.recommended
    other = of_other_folder(generation_config)
    return replace(checkpoint, config=with_its_ends(checkpoint.config, other)), other


def _weight_bytes(checkpoint: Checkpoint) -> int:
    """The size in bytes of the files that hold the weights."""
    return sum(file.stat().st_size for file in {tensor.file for tensor in checkpoint.tensors.values()})
