"""A model's checkpoint, independent of the file format.

A reader maps a file's names, shapes and layouts to this form. Tensors stay in their files until they are
loaded. Knows nothing of file formats or of the model that is built from a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from .errors import ModelFileError
from .model_config import ModelConfig
from .quantized import Quantized
from .recommendation import Recommendation
from .tokenizer import Tokenizer

MAX_NAMED = 5  # tensors that an error lists by name


class StoredTensor(Protocol):
    """A tensor that is still in its file. All properties are known without reading its data."""

    @property
    def file(self) -> Path:
        """The file that holds it."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[outputs, inputs] or [size], whatever the stored layout."""

    def load(self) -> mx.array | Quantized:
        """Read the data. Raises ValueError if the file's content does not match the header."""


def as_array(data: bytes) -> mx.array:
    """The bytes of a file as an array: uint8 [n]."""
    return mx.array(data)  # type: ignore[arg-type]  # a buffer, which the stubs do not know


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, its tokenizer, and its tensors by checkpoint name. No tensor is loaded yet.

    recommended: the sampling settings that the model's author recommends.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, StoredTensor]
    recommended: Recommendation

    def check(self, name_in_file: Callable[[str], str] = str) -> None:
        """Check that the tensors and the tokenizer match the configuration, without reading tensor data.

        name_in_file: maps a checkpoint name to the file's name, for errors about missing tensors.

        Raises `ModelFileError` with the file, the tensor, and the found and expected shape.
        """
        expected = self.config.parameter_shapes
        missing = [name_in_file(name) for name in expected if name not in self.tensors]
        if missing:
            raise ModelFileError(
                f"{self.path}: {_listed(missing)} missing, expected in a {self.config.architecture} model"
            )
        extra = [tensor for name, tensor in self.tensors.items() if name not in expected]
        if extra:
            names = _listed([tensor.name for tensor in extra])
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
                f"{self.path}: the tokenizer has {self.tokenizer.vocab_size} tokens, expected at most "
                f"{self.config.vocab_size}, the number of rows of the embedding"
            )


def _listed(names: list[str]) -> str:
    """`tensor a is` or `3 tensors (a, b, c) are`, with at most `MAX_NAMED` names."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    named = ", ".join(names[:MAX_NAMED])
    return f"{len(names)} tensors ({named}{', ...' if len(names) > MAX_NAMED else ''}) are"
