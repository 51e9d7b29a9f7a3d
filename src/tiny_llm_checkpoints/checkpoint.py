"""What a model file holds, whatever its format.

A reader translates a file's names, shapes and layouts into this, and the tensors stay in their files until
they are loaded. Knows nothing of file formats, and nothing of the model that is built from it.
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


def _some(names: list[str]) -> str:
    """`tensor a is`, `3 tensors (a, b, c) are`, with the names of the first few."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    named = ", ".join(names[:MOST_NAMED])
    return f"{len(names)} tensors ({named}{', ...' if len(names) > MOST_NAMED else ''}) are"
