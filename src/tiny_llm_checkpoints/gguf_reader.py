"""Reads GGUF files into a `Checkpoint`: all names, shapes and layouts are converted here.

Tensors stay quantized if MLX's layout can represent them (`ggml_blocks.QUANTIZED`). Other quantized types are
dequantized to float16 by ggml's `gguf` package. Source: ggml's GGUF specification.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .checkpoint import Checkpoint, as_array
from .errors import reading
from .ggml_blocks import QUANTIZED, dequantized
from .gguf_config import ROPE_FACTORS, WITH_ROPE_FACTORS, gguf_config
from .gguf_format import GGUFTensor
from .gguf_split import read_gguf_files
from .gguf_tokenizer import gguf_tokenizer
from .model_config import ModelConfig
from .quantized import Quantized
from .recommendation import of_gguf

INTERLEAVED = ("llama",)  # architectures whose query and key rows are reordered in GGUF

_DENSE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SECOND_NORM = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read_gguf(path: Path) -> Checkpoint:
    """Read the checkpoint in a GGUF file, or in a split model whose first file this is.

    Raises a `ModelFileError` that names the file and the problem.
    """
    file = read_gguf_files(path)
    with reading(path):
        tokenizer = gguf_tokenizer(file.metadata)
        config = gguf_config(file, tokenizer.eos_token_ids)
    names = _BLOCK_NAMES | (_SANDWICH_NORMS if config.sandwich_norm else _SECOND_NORM)
    tensors = {
        _checkpoint_name(name, names): _StoredTensor(tensor, _interleaved_heads(config, name))
        for name, tensor in file.tensors.items()
        if not (name == ROPE_FACTORS and config.architecture in WITH_ROPE_FACTORS)
    }
    checkpoint = Checkpoint(path, config, tokenizer, tensors, of_gguf(path, file.metadata))
    checkpoint.check(lambda name: _gguf_name(name, names))
    return checkpoint


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a GGUF file. `heads` is the number of heads whose rows must be reordered, or None."""

    tensor: GGUFTensor
    heads: int | None

    @property
    def file(self) -> Path:
        return self.tensor.file

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def load(self) -> mx.array | Quantized:
        kind = self.tensor.type
        rows = self._ordered(as_array(self.tensor.read()).reshape(self.shape[0], -1))
        if kind.name in _DENSE:
            return rows.view(_DENSE[kind.name]).reshape(self.shape)
        if kind.name in QUANTIZED:
            return QUANTIZED[kind.name](rows.reshape(self.shape[0], -1, kind.nbytes))
        return dequantized(rows, kind)

    def _ordered(self, rows: mx.array) -> mx.array:
        """Undo GGUF's order of query and key rows: [N, bytes per row] -> [N, bytes per row].

        GGUF puts the two rows that are rotated together next to each other (2i and 2i + 1 of a head);
        checkpoints and `rope` pair i with i + D/2. Every type stores whole rows, so moving bytes is enough.
        """
        if self.heads is None:
            return rows
        order = mx.arange(rows.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return rows[order]


def _interleaved_heads(config: ModelConfig, name: str) -> int | None:
    """The number of heads of a query or key tensor whose rows GGUF reorders; None for other tensors."""
    if config.architecture not in INTERLEAVED:
        return None
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2]) if name.startswith("blk.") else None


def _checkpoint_name(name: str, block_names: Mapping[str, str]) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Unknown names map to names that no checkpoint has, so they cannot be mistaken for another tensor.
    """
    stem, _, part = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{part}"
    kind, _, rest = stem.partition(".")
    layer, _, tensor = rest.partition(".")
    if kind != "blk" or tensor not in block_names:
        return f"unknown {name}"
    return f"model.layers.{layer}.{block_names[tensor]}.{part}"


def _gguf_name(name: str, block_names: Mapping[str, str]) -> str:
    """The inverse of `_checkpoint_name`."""
    stem, _, part = name.rpartition(".")
    top = {ours: theirs for theirs, ours in _TOP_NAMES.items()}
    if stem in top:
        return f"{top[stem]}.{part}"
    layer, _, tensor = stem.removeprefix("model.layers.").partition(".")
    block = {ours: theirs for theirs, ours in block_names.items()}
    return f"blk.{layer}.{block[tensor]}.{part}"
