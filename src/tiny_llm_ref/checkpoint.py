"""What a model file holds, whatever its format, and how it becomes a model.

A reader translates a file's names, shapes and layouts into this; `build` makes the model from it, one
tensor at a time: each is read, brought into the form that it is multiplied in, and forgotten, so that
the weights are never in memory twice. Knows nothing of file formats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

from .errors import ModelFileError, reading
from .generation_defaults import Recommendation
from .linear import BiasedLinear, LinearLike, dense_linear, quantized_linear
from .model import Model, build_model
from .model_config import ModelConfig
from .quantize import Quantized
from .tokenizer import Tokenizer

T = TypeVar("T")

MOST_NAMED = 5  # tensors that an error names, of those that are missing or too many


class StoredTensor(Protocol):
    """A tensor that is still in its file; all properties are known without reading it."""

    @property
    def file(self) -> Path:
        """The file that it is in."""

    @property
    def name(self) -> str:
        """What the file calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as numbers, [outputs, inputs] or [size], however it is stored."""

    def load(self) -> mx.array | Quantized:
        """Read it. Raises ValueError where what is there cannot be it."""


def as_array(data: bytes) -> mx.array:
    """The bytes of a file as they are, uint8 [n]."""
    return mx.array(data)  # type: ignore[arg-type]  # a buffer, which the stubs do not know


@dataclass(frozen=True)
class Checkpoint:
    """A model and its tokenizer before they are loaded; `tensors` by their checkpoint names.

    recommended: how the model's author would sample from it.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, StoredTensor]
    recommended: Recommendation

    def check(self, name_in_file: Callable[[str], str] = str) -> None:
        """Refuse what cannot be this configuration's model, before a single tensor is read.

        name_in_file: what the file would call a tensor that is missing. Raises `ModelFileError` naming
        the file, the tensor, what was found and what was expected.
        """
        expected = self.config.parameter_shapes
        missing = [name_in_file(name) for name in expected if name not in self.tensors]
        if missing:
            raise ModelFileError(f"{self.path}: {_some(missing)} missing")
        extra = [tensor for name, tensor in self.tensors.items() if name not in expected]
        if extra:
            names = _some([tensor.name for tensor in extra])
            raise ModelFileError(f"{extra[0].file}: {names} not part of a {self.config.architecture} model")
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise ModelFileError(
                    f"{tensor.file}: tensor {tensor.name} has the shape {list(tensor.shape)}, "
                    f"expected {list(shape)}"
                )
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ModelFileError(
                f"{self.path}: the tokenizer has {self.tokenizer.vocab_size} tokens, the embedding only "
                f"{self.config.vocab_size} rows"
            )

    def build(self, activation_bits: int = 16) -> Model:
        """Read the weights and assemble the model; its packed matrices round activations to so many bits."""
        linears = _OnDemand(lambda name: self._linear(name, activation_bits))
        vectors = _OnDemand(lambda name: self._vector(f"{name}.weight"))
        return build_model(self.config, linears, vectors)

    def _linear(self, name: str, activation_bits: int) -> LinearLike:
        """One matrix, in the form that this device multiplies best, with its bias where it has one."""
        stored = self._load(f"{name}.weight")
        if isinstance(stored, Quantized):
            matrix = quantized_linear(*stored, activation_bits=activation_bits)
        else:
            matrix = dense_linear(stored)
        if f"{name}.bias" not in self.tensors:
            return matrix
        return BiasedLinear(matrix, self._vector(f"{name}.bias"))

    def _vector(self, name: str) -> mx.array:
        """A vector in float32."""
        stored = self._load(name)
        if isinstance(stored, Quantized):
            raise ModelFileError(f"{self.path}: tensor {name} is quantized, expected plain numbers")
        vector = stored.astype(mx.float32)
        mx.eval(vector)
        return vector

    def _load(self, name: str) -> mx.array | Quantized:
        tensor = self.tensors[name]
        with reading(tensor.file):
            return tensor.load()


@dataclass(frozen=True)
class _OnDemand(Generic[T]):
    """Makes each parameter when it is asked for, and keeps none."""

    make: Callable[[str], T]

    def __getitem__(self, name: str) -> T:
        return self.make(name)


def _some(names: list[str]) -> str:
    """`tensor a is`, `3 tensors (a, b, c) are`, with the names of the first few."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    named = ", ".join(names[:MOST_NAMED])
    return f"{len(names)} tensors ({named}{', ...' if len(names) > MOST_NAMED else ''}) are"
