"""A GGUF file becomes a checkpoint: its names, shapes and layouts are translated here, once.

Quantized tensors stay quantized where MLX's layout can say the same (`ggml_blocks.QUANTIZED`); every other
quantized type is dequantized to float16 by ggml's own `gguf` package. Format: ggml's GGUF specification.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint import Checkpoint, as_array
from .errors import reading
from .ggml_blocks import QUANTIZED, dequantized
from .gguf_format import GGUFFile, GGUFTensor, read_gguf_header
from .gguf_tokenizer import gguf_tokenizer
from .model_config import FULL, GELU, SLIDING, ModelConfig
from .quantize import Quantized

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
INTERLEAVED = ("llama",)  # architectures whose query and key rows GGUF reorders

_DENSE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_ROPE_FACTORS = "rope_freqs.weight"
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
# What llama.cpp's code, not the file, says of Gemma 3; where a file says it after all, the file is right.
_GEMMA3_PERIOD = 6  # every sixth layer sees everything
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62  # the one whose queries are scaled by hidden_size / heads instead of head_dim


def read_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file. Raises `ModelFileError` naming the file and what is wrong with it."""
    with reading(path):
        file = read_gguf_header(path)
        tokenizer = gguf_tokenizer(file.metadata)
        config = _model_config(file, tokenizer.eos_token_ids)
    names = _BLOCK_NAMES | (_SANDWICH_NORMS if config.sandwich_norm else _SECOND_NORM)
    tensors = {
        _checkpoint_name(name, names): _StoredTensor(file, name, tensor, _heads_to_undo(config, name))
        for name, tensor in file.tensors.items()
        if name != _ROPE_FACTORS
    }
    checkpoint = Checkpoint(path, config, tokenizer, tensors)
    checkpoint.check(lambda name: _gguf_name(name, names))
    return checkpoint


@dataclass(frozen=True)
class _StoredTensor:
    """One tensor of a GGUF file; `heads` is set where the rows of each head must be put back in order."""

    gguf: GGUFFile
    name: str
    tensor: GGUFTensor
    heads: int | None

    @property
    def file(self) -> Path:
        return self.gguf.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def load(self) -> mx.array | Quantized:
        kind = self.tensor.type
        rows = self._ordered(as_array(self.gguf.read(self.name)).reshape(self.shape[0], -1))
        if kind.name in _DENSE:
            return rows.view(_DENSE[kind.name]).reshape(self.shape)
        if kind.name in QUANTIZED:
            return QUANTIZED[kind.name](rows.reshape(self.shape[0], -1, kind.nbytes))
        return dequantized(rows, kind)

    def _ordered(self, rows: mx.array) -> mx.array:
        """Undo GGUF's order of query and key rows, which pairs row 2i of a head with 2i + 1 for rotation.

        Checkpoints and `rope` pair i with i + D/2. Rows are whole in every type, so their bytes are moved:
        [N, bytes of a row] -> the same.
        """
        if self.heads is None:
            return rows
        order = mx.arange(rows.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return rows[order]


def _heads_to_undo(config: ModelConfig, name: str) -> int | None:
    if config.architecture not in INTERLEAVED:
        return None
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2]) if name.startswith("blk.") else None


def _checkpoint_name(name: str, block_names: Mapping[str, str]) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name is kept."""
    stem, _, part = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{part}"
    kind, _, rest = stem.partition(".")
    layer, _, tensor = rest.partition(".")
    if kind != "blk" or tensor not in block_names:
        return name
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


# Metadata to configuration.


def _model_config(file: GGUFFile, eos_token_ids: frozenset[int]) -> ModelConfig:
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    found = _Metadata(metadata, architecture)
    hidden_size, heads = found.integer("embedding_length"), found.integer("attention.head_count")
    head_dim = found.integer("attention.key_length", hidden_size // max(1, heads))
    _refuse_other_features(found, head_dim)
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing")
    config = ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_hidden_layers=found.integer("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=found.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=found.integer("feed_forward_length"),
        vocab_size=tensors["token_embd.weight"].shape[0],
        max_position_embeddings=found.integer("context_length"),
        rms_norm_eps=found.number("attention.layer_norm_rms_epsilon"),
        rope_theta=found.number("rope.freq_base", 10_000.0),
        rope_factors=_rope_factors(file, found, head_dim),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture in ("qwen3", "gemma3"),
        eos_token_ids=tuple(sorted(eos_token_ids)),
    )
    return _as_gemma3(config, found) if architecture == "gemma3" else config


def _as_gemma3(config: ModelConfig, found: "_Metadata") -> ModelConfig:
    """The configuration with what Gemma 3 has beside a llama; its norms are in the file as they are used."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if found.number(name, 0.0) != 0.0:
            raise ValueError(f"gemma3.{name} is {found.number(name)}, which is not supported; expected none")
    scaled_by = config.hidden_size / config.num_attention_heads
    return replace(
        config,
        sliding_window=found.integer("attention.sliding_window"),
        layer_types=_layer_types(found, config.num_hidden_layers),
        rope_local_theta=found.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA),
        query_pre_attn_scalar=scaled_by if config.num_hidden_layers == _GEMMA3_27B_LAYERS else None,
        hidden_act=GELU,
        sandwich_norm=True,
        scale_embeddings=True,
    )


def _layer_types(found: "_Metadata", num_layers: int) -> tuple[str, ...]:
    """Which layers have the window: a flag for each, or every layer but each `period`-th."""
    key = "attention.sliding_window_pattern"
    flags = found.metadata.get(f"{found.architecture}.{key}")
    if not isinstance(flags, list):
        period = found.integer(key, _GEMMA3_PERIOD)
        if period < 1:
            raise ValueError(f"metadata {found.architecture}.{key} is {period}, expected at least 1")
        flags = [(layer + 1) % period != 0 for layer in range(num_layers)]
    return tuple(SLIDING if flag else FULL for flag in flags)


@dataclass(frozen=True)
class _Metadata:
    """Numbers of one architecture: `embedding_length` stands in the file as `llama.embedding_length`."""

    metadata: Mapping[str, Any]
    architecture: str

    def integer(self, name: str, default: int | None = None) -> int:
        return self._value(name, default, int)  # type: ignore[return-value]

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._value(name, default, (int, float)))

    def _value(self, name: str, default: float | None, kind: type | tuple[type, ...]) -> int | float:
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"metadata {key} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"metadata {key} is {str(value)[:60]!r}, expected one number")
        return value  # type: ignore[return-value]


def _refuse_other_features(found: _Metadata, head_dim: int) -> None:
    """Refuse what would make this another computation than the engine's."""
    expected = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
    if found.architecture != "gemma3":
        expected["attention.sliding_window"] = 0
    for name, wanted in expected.items():
        value = found.integer(name, wanted)
        if value != wanted:
            raise ValueError(
                f"{found.architecture}.{name} is {value}, which is not supported; expected {wanted}"
            )


def _rope_factors(file: GGUFFile, found: _Metadata, head_dim: int) -> tuple[float, ...] | None:
    """What the file divides rotary frequencies by: a tensor (llama 3), or one factor for all (linear)."""
    if _ROPE_FACTORS in file.tensors:
        tensor = file.tensors[_ROPE_FACTORS]
        if tensor.type.name != "F32":
            raise ValueError(f"tensor {_ROPE_FACTORS} is {tensor.type.name}, expected F32")
        factors: list[float] = as_array(file.read(_ROPE_FACTORS)).view(mx.float32).tolist()  # type: ignore[assignment]
        return tuple(factors)
    kind = found.metadata.get(f"{found.architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{found.architecture}.rope.scaling.type {kind!r} is not supported; supported: none, linear"
        )
    factor = found.number("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    return None if factor == 1.0 else (factor,) * (head_dim // 2)
