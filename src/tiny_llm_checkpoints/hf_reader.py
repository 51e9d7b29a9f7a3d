"""Reads a folder in Hugging Face's layout (config.json, safetensors, tokenizer.json) into a `Checkpoint`.

Weights are plain (float32, float16, bfloat16) or in MLX's quantized format, where each matrix may have its
own bits and group size. Tensor names need no conversion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .checkpoint import Checkpoint, as_array
from .errors import ModelFileError, reading
from .hf_config import model_config
from .hf_tokenizer import hf_tokenizer
from .json_file import read_json
from .model_config import ModelConfig
from .quantized import Quantized
from .recommendation import of_folder, with_its_ends
from .safetensors_format import SafeTensor, read_safetensors_header
from .token_ids import token_ids
from .weight_files import weight_files

GROUP_SIZES, BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
DENSE_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

MINUS_ONE = ("gemma3_text",)  # architectures that store norm weights minus one

_RECOMPUTED = ".rotary_emb.inv_freq"  # a buffer that old checkpoints contain


def read_folder(path: Path) -> Checkpoint:
    """Read the checkpoint in a folder. Raises a `ModelFileError` that names the file and the problem."""
    _check_has_config(path)
    settings = read_json(path / "config.json")
    recommended = of_folder(path)
    with reading(path):
        tokenizer = hf_tokenizer(path, _num_rows(settings))
    with reading(path / "config.json"):
        ends = {*token_ids(settings, "eos_token_id"), *tokenizer.eos_token_ids}
        config = model_config(settings, tuple(sorted(ends)))
        quantization = _Quantization.of(settings)
    config = with_its_ends(config, recommended)
    stored = _stored_tensors(path)
    if config.tie_word_embeddings:
        _drop_tied_head(stored)
    tensors = {
        name: _StoredTensor(tensor, stored, quantization, _is_minus_one(name, config))
        for name, tensor in stored.items()
        if not name.endswith(_RECOMPUTED) and not _is_part(name, stored)
    }
    for tensor in tensors.values():
        with reading(tensor.file):
            tensor.check()
    checkpoint = Checkpoint(path, config, tokenizer, tensors, recommended)
    checkpoint.check()
    return checkpoint


def _num_rows(settings: Mapping[str, Any]) -> int | None:
    """The rows of the embedding; None if the configuration is broken, which `model_config` reports."""
    rows = settings.get("vocab_size")
    return rows if isinstance(rows, int) else None


def _drop_tied_head(stored: dict[str, SafeTensor]) -> None:
    """Remove the embedding that some files store a second time, as `lm_head`.

    Raises a `ModelFileError` if it is another matrix: then the model was trained with a head of its own.
    """
    for part in ("weight", "scales", "biases"):
        head, embedding = stored.pop(f"lm_head.{part}", None), stored.get(f"model.embed_tokens.{part}")
        if head is None:
            continue
        with reading(head.file):
            if embedding is None or not head.equals(embedding):
                raise ValueError(
                    f"tie_word_embeddings is true, but lm_head.{part} differs from model.embed_tokens.{part}"
                )


def _check_has_config(path: Path) -> None:
    """Raise a `ModelFileError` with advice if the folder has no config.json."""
    with reading(path):
        if (path / "config.json").exists():
            return
        gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files:
        advice = f"to load a GGUF file, pass its path, such as {gguf_files[0]}"
    else:
        advice = "a model folder has config.json, tokenizer.json and model.safetensors"
    raise ModelFileError(f"{path}: no config.json in this folder; {advice}")


class _Precision(NamedTuple):
    """How one matrix is quantized."""

    group_size: int
    bits: int


@dataclass(frozen=True)
class _Quantization:
    """config.json's `quantization`: the default for all matrices, and exceptions by module name."""

    default: _Precision | None
    exceptions: Mapping[str, _Precision]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "_Quantization":
        """Read it from config.json. Raises ValueError for any quantization that is not MLX's."""
        found = settings.get("quantization") or settings.get("quantization_config")
        if found is None:
            return cls(None, {})
        if not isinstance(found, dict):
            raise ValueError(f"quantization is {str(found)[:60]!r}, expected an object")
        method = found.get("quant_method", found.get("mode", "affine"))
        if method not in ("affine", "mlx"):
            raise ValueError(
                f"quantization {method!r} is not supported; supported: MLX's affine quantization"
            )
        exceptions = {
            name: _precision(name, value) for name, value in found.items() if isinstance(value, dict)
        }
        return cls(_precision("quantization", found), exceptions)

    def of_module(self, name: str) -> _Precision:
        """The precision of `name`.weight. Raises ValueError if config.json has no quantization."""
        precision = self.exceptions.get(name, self.default)
        if precision is None:
            raise ValueError(f"tensor {name}.scales needs quantization in config.json, which is missing")
        return precision


def _precision(name: str, found: Mapping[str, Any]) -> _Precision:
    if found.get("mode", "affine") != "affine":
        raise ValueError(f"{name}: quantization mode {found['mode']!r} is not supported; supported: affine")
    for field, allowed in (("group_size", GROUP_SIZES), ("bits", BITS)):
        if type(found.get(field)) is not int or found[field] not in allowed:
            raise ValueError(f"{name}: {field} {found.get(field)!r} is not supported; supported: {allowed}")
    return _Precision(found["group_size"], found["bits"])


@dataclass(frozen=True)
class _StoredTensor:
    """One parameter. If quantized, `.scales` and `.biases` belong to its `.weight`.

    minus_one: the file stores the parameter minus one.
    """

    tensor: SafeTensor
    stored: Mapping[str, SafeTensor]
    quantization: _Quantization
    minus_one: bool

    @property
    def file(self) -> Path:
        return self.tensor.file

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        if not self._is_quantized:
            return self.tensor.shape
        return (*self.tensor.shape[:-1], self.tensor.shape[-1] * 32 // self._precision.bits)

    def check(self) -> None:
        """Raise ValueError if types and shapes do not match."""
        name, dtype = self.name, self.tensor.dtype
        expected = ("U32",) if self._is_quantized else tuple(DENSE_TYPES)
        if dtype not in expected:
            raise ValueError(f"tensor {name} has the type {dtype}, expected {' or '.join(expected)}")
        if not self._is_quantized:
            return
        if not self.tensor.shape:
            raise ValueError(f"tensor {name} has no axes, expected a quantized matrix")
        group_size, bits = self._precision
        groups = (*self.shape[:-1], self.shape[-1] // group_size)
        for part in ("scales", "biases"):
            other = self.stored.get(f"{self._module}.{part}")
            if other is None:
                raise ValueError(
                    f"tensor {self._module}.{part} is missing, expected with the quantized {name}"
                )
            if other.dtype not in DENSE_TYPES or other.shape != groups or self.shape[-1] % group_size:
                raise ValueError(
                    f"tensor {other.name} is {other.dtype} {list(other.shape)}, expected floats "
                    f"{list(groups)} for {name} with {bits} bits and groups of {group_size}"
                )

    def load(self) -> mx.array | Quantized:
        if not self._is_quantized:
            return 1.0 + _read(self.tensor).astype(mx.float32) if self.minus_one else _read(self.tensor)
        scales, biases = (_read(self.stored[f"{self._module}.{part}"]) for part in ("scales", "biases"))
        return Quantized(_read(self.tensor), scales, biases, *self._precision)

    @property
    def _module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def _is_quantized(self) -> bool:
        return self.name.endswith(".weight") and f"{self._module}.scales" in self.stored

    @property
    def _precision(self) -> _Precision:
        return self.quantization.of_module(self._module)


def _is_part(name: str, stored: Mapping[str, SafeTensor]) -> bool:
    """Whether a tensor is the scales or biases of a quantized matrix in the file."""
    module, _, part = name.rpartition(".")
    return part in ("scales", "biases") and f"{module}.weight" in stored and f"{module}.scales" in stored


def _is_minus_one(name: str, config: ModelConfig) -> bool:
    return config.architecture in MINUS_ONE and name.endswith("norm.weight")


def _read(tensor: SafeTensor) -> mx.array:
    dtype = DENSE_TYPES.get(tensor.dtype, mx.uint32)
    return as_array(tensor.read()).view(dtype).reshape(tensor.shape)


def _stored_tensors(path: Path) -> dict[str, SafeTensor]:
    """Every tensor of the folder's safetensors files; only headers are read."""
    stored: dict[str, SafeTensor] = {}
    for file in weight_files(path):
        with reading(file):
            found = read_safetensors_header(file)
        twice = sorted(stored.keys() & found.keys())
        if twice:
            other = stored[twice[0]].file.name
            raise ModelFileError(f"{file}: tensor {twice[0]} is also in {other}, expected in one file only")
        stored |= found
    return stored
