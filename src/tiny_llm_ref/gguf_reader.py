"""A GGUF file becomes a model and a tokenizer: names, shapes and layouts are translated here, once.

`mx.load` reads the file and leaves quantized tensors quantized. Format: ggml's GGUF specification.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .config import ModelConfig
from .errors import ModelFileError
from .linear import Linear, LinearLike, quantized_linear
from .model import Model, build_model
from .tokenizer import Tokenizer

ARCHITECTURES = ("llama",)

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class LoadedModel(NamedTuple):
    """What a model file holds."""

    model: Model
    tokenizer: Tokenizer


def load_gguf(path: Path) -> LoadedModel:
    """Read a GGUF file. Raises `ModelFileError` naming the file and what is wrong with it."""
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        loaded = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelFileError(f"{path}: not a readable GGUF file ({error})") from error
    arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    try:
        tokenizer = Tokenizer.from_gguf(metadata)
        config = _model_config(metadata, arrays, tokenizer.eos_token_ids)
        return LoadedModel(_build(config, arrays), tokenizer)
    except KeyError as error:
        raise ModelFileError(f"{path}: {error.args[0]} is missing") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _model_config(
    metadata: Mapping[str, Any], arrays: Mapping[str, mx.array], eos_token_ids: frozenset[int]
) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )

    def number(name: str, default: float | None = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if value is None:
            raise KeyError(f"metadata {architecture}.{name}")
        return value.item() if isinstance(value, mx.array) else value

    hidden_size, heads = number("embedding_length"), number("attention.head_count")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden_size // heads),
        intermediate_size=number("feed_forward_length"),
        vocab_size=arrays["token_embd.weight"].shape[0],
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10_000.0),
        tie_word_embeddings="output.weight" not in arrays,
        eos_token_ids=tuple(sorted(eos_token_ids)),
    )


def _build(config: ModelConfig, arrays: Mapping[str, mx.array]) -> Model:
    linears: dict[str, LinearLike] = {}
    vectors: dict[str, mx.array] = {}
    for gguf_name, array in arrays.items():
        stem, _, part = gguf_name.rpartition(".")
        if part != "weight":
            continue  # scales and biases are taken together with their weight
        name = _checkpoint_name(stem)
        if array.ndim == 1:
            vectors[name] = array.astype(mx.float32)
        else:
            parts = [arrays[f"{stem}.{p}"] for p in ("weight", "scales", "biases") if f"{stem}.{p}" in arrays]
            linears[name] = _linear([_half_rotated(config, name, part) for part in parts], config, name)
    mx.eval(list(vectors.values()))
    return build_model(config, linears, vectors)


def _checkpoint_name(stem: str) -> str:
    """`blk.3.attn_q` -> `model.layers.3.self_attn.q_proj`."""
    if stem in _TOP_NAMES:
        return _TOP_NAMES[stem]
    kind, _, rest = stem.partition(".")
    layer, _, tensor = rest.partition(".")
    if kind != "blk" or tensor not in _BLOCK_NAMES:
        raise ValueError(f"tensor {stem!r} is not one that this architecture has")
    return f"model.layers.{layer}.{_BLOCK_NAMES[tensor]}"


def _half_rotated(config: ModelConfig, name: str, array: mx.array) -> mx.array:
    """Undo GGUF's order of the query and key rows, which pairs row 2i of a head with 2i + 1 for rotation.

    Checkpoints and `rope` pair i with i + D/2. Rows are whole in every layout, so reordering them
    works on packed words, scales and biases alike.
    """
    if not name.endswith(("q_proj", "k_proj")):
        return array
    rows = mx.arange(array.shape[0]).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return array[rows]


def _linear(parts: list[mx.array], config: ModelConfig, name: str) -> LinearLike:
    """One matrix from its stored parts: [weight], or [weight, scales, biases] when quantized."""
    if len(parts) == 1:
        weight = parts[0].astype(mx.float32)
        mx.eval(weight)
        return Linear(weight)
    weight, scales, biases = parts
    in_features = config.intermediate_size if name.endswith("down_proj") else config.hidden_size
    if name.endswith("o_proj"):
        in_features = config.num_attention_heads * config.head_dim
    return quantized_linear(
        weight,
        scales,
        biases,
        group_size=in_features // scales.shape[-1],
        bits=weight.shape[-1] * 32 // in_features,
    )
