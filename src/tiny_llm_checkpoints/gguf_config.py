"""Turns a GGUF file's metadata into a `ModelConfig`, and rejects what the engine does not compute.

Missing keys have llama.cpp's defaults. If a key that llama.cpp knows asks for a computation that the engine
does not have, the file is rejected, even if llama.cpp ignores the key for this architecture. Unknown keys are
ignored. docs/models.md lists the known ones.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

import mlx.core as mx

from .checkpoint import as_array
from .gguf_format import GGUFFile
from .gguf_keys import GGUFKeys
from .model_config import FULL, GELU, SILU, SLIDING, ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
ROPE_FACTORS = "rope_freqs.weight"  # a tensor of divisors of the rotary frequencies
WITH_ROPE_FACTORS = ("llama",)  # architectures for which llama.cpp reads it

# Gemma 3's values that llama.cpp keeps in its code, not in the file. A value in the file takes precedence.
_GEMMA3_PERIOD = 6  # every sixth layer has full attention
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62  # identifies the 27B model, whose queries are scaled by hidden_size / heads

# The supported values of these keys. In most of them 0 means "off".
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.value_scale": (0, 1),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.key_length_mla": (0,),
    "attention.value_length_mla": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.recurrent_layers": ([],),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_length_per_layer_input": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "full_attention_interval": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "rope.dimension_sections": ([], [0] * 4),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
_ROPE_SCALING = ("none", "linear")


def gguf_config(file: GGUFFile, eos_token_ids: frozenset[int]) -> ModelConfig:
    """The configuration of a GGUF file's model. Raises a ValueError that names the key or tensor at fault."""
    architecture = _architecture(file.metadata)
    keys = GGUFKeys(file.metadata, architecture)
    tensors = file.tensors
    hidden_size, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(1, heads))
    _reject_unsupported(keys, hidden_size, head_dim)
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing")
    config = ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_hidden_layers=keys.integer("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=keys.integer("feed_forward_length"),
        vocab_size=tensors["token_embd.weight"].shape[0],
        max_position_embeddings=keys.integer("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10_000.0),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture in ("qwen3", "gemma3"),
        eos_token_ids=tuple(sorted(eos_token_ids)),
    )
    _check_scale(keys, _query_scalar(config))
    config = replace(config, rope_factors=_rope_factors(file, keys, config))
    return _as_gemma3(config, keys) if architecture == "gemma3" else config


def _architecture(metadata: Mapping[str, Any]) -> str:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"general.type is {str(kind)[:60]!r}, expected 'model'")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return architecture


def _reject_unsupported(keys: GGUFKeys, hidden_size: int, head_dim: int) -> None:
    """Raise ValueError for the first key that asks for a computation that the engine does not have."""
    expected: dict[str, tuple[Any, ...]] = {
        **_NEUTRAL,
        **dict.fromkeys(("attention.value_length", "rope.dimension_count"), (head_dim,)),
        **dict.fromkeys(("attention.key_length_swa", "attention.value_length_swa"), (head_dim,)),
        "rope.dimension_count_swa": (head_dim,),
        "embedding_length_out": (0, hidden_size),
    }
    if keys.prefix != "gemma3":
        expected |= {"attention.sliding_window": (0,), "hidden_activation": (SILU,)}
    else:
        expected["hidden_activation"] = ("gelu", GELU)
    for name, allowed in expected.items():
        value = keys.value(name)
        if value is not None and not any(wanted == value for wanted in allowed):
            raise ValueError(
                f"{keys.prefix}.{name} is {str(value)[:60]}, which is not supported; expected "
                f"{' or '.join(map(str, allowed))}"
            )


def _check_scale(keys: GGUFKeys, scalar: float) -> None:
    """Require the attention scale 1 / sqrt(scalar), to float32 precision; a stored 0 means "not set"."""
    scale, computed = keys.number("attention.scale", 0.0), scalar**-0.5
    if scale != 0.0 and not isclose(scale, computed, rel_tol=1e-6):
        raise ValueError(
            f"{keys.prefix}.attention.scale is {scale:.7g}, which is not supported; expected {computed:.7g}"
        )


def _as_gemma3(config: ModelConfig, keys: GGUFKeys) -> ModelConfig:
    """Add the features that Gemma 3 has and Llama lacks.

    Gemma's norm weights need no change: GGUF files store them as they are used, not minus one.
    """
    return replace(
        _with_windows(config, keys),
        query_pre_attn_scalar=_query_scalar(config),
        hidden_act=GELU,
        sandwich_norm=True,
        scale_embeddings=True,
    )


def _query_scalar(config: ModelConfig) -> int:
    """The number whose inverse square root is the attention scale."""
    if config.architecture == "gemma3" and config.num_hidden_layers == _GEMMA3_27B_LAYERS:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def _with_windows(config: ModelConfig, keys: GGUFKeys) -> ModelConfig:
    """Add Gemma 3's sliding windows; if the window is 0 or missing, all layers have full attention."""
    window = keys.integer("attention.sliding_window", 0)
    if window == 0:
        return config
    return replace(
        config,
        sliding_window=window,
        layer_types=_layer_types(keys, config.num_hidden_layers),
        rope_local_theta=keys.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA),
    )


def _layer_types(keys: GGUFKeys, num_layers: int) -> tuple[str, ...]:
    """Each layer's type: from one flag per layer, or with full attention in every `period`-th layer."""
    key = "attention.sliding_window_pattern"
    flags = keys.value(key)
    if not isinstance(flags, list):
        period = keys.integer(key, _GEMMA3_PERIOD)
        if period < 1:
            raise ValueError(f"{keys.prefix}.{key} is {period}, expected at least 1")
        flags = [(layer + 1) % period != 0 for layer in range(num_layers)]
    if not all(type(flag) in (bool, int) and flag in (0, 1) for flag in flags):
        raise ValueError(f"{keys.prefix}.{key} is {str(flags)[:60]}, expected true or false for each layer")
    return tuple(SLIDING if flag else FULL for flag in flags)


def _rope_factors(file: GGUFFile, keys: GGUFKeys, config: ModelConfig) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies; None for no scaling.

    Each is the frequency's own divisor (llama 3's scaling; otherwise 1) times the factor of linear scaling.
    """
    linear = _linear_factor(keys)
    if ROPE_FACTORS in file.tensors and config.architecture in WITH_ROPE_FACTORS:
        return tuple(linear * factor for factor in _stored_factors(file, config.head_dim // 2))
    return None if linear == 1.0 else (linear,) * (config.head_dim // 2)


def _linear_factor(keys: GGUFKeys) -> float:
    """The factor of linear scaling, which is the default type of scaling; 1 means no scaling."""
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in _ROPE_SCALING:
        raise ValueError(
            f"{keys.prefix}.rope.scaling.type {kind!r} is not supported; "
            f"supported: {', '.join(_ROPE_SCALING)}"
        )
    key = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    factor = keys.number(key, 0.0)
    if factor < 0.0:
        raise ValueError(f"{keys.prefix}.{key} is {factor}, expected a positive number")
    return 1.0 if kind == "none" or factor == 0.0 else factor


def _stored_factors(file: GGUFFile, count: int) -> list[float]:
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (count,):
        raise ValueError(
            f"tensor {ROPE_FACTORS} is {tensor.type.name} {list(tensor.shape)}, expected F32 [{count}]"
        )
    factors: list[float] = as_array(tensor.read()).view(mx.float32).tolist()  # type: ignore[assignment]
    return factors
