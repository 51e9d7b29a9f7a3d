"""Hugging Face's config.json becomes a `ModelConfig`; what the engine does not compute is refused by name.

A configuration says in many words what the model computes. Words that change the computation are checked
one by one, because a model that runs slightly wrong looks like one that runs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .model_config import ModelConfig
from .rope import llama3_factors

Json = Mapping[str, Any]


class _Architecture(NamedTuple):
    """Where architectures differ: transformers' defaults, and what is fixed in its code."""

    qkv_bias: bool = False  # whatever attention_bias says
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads


ARCHITECTURES = {
    "llama": _Architecture(),
    "qwen2": _Architecture(qkv_bias=True),
    "qwen3": _Architecture(qk_norm=True, head_dim=128),
}


def model_config(config: Json, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json.

    Raises ValueError naming the field, what was found and what was expected.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    _refuse_other_computations(config)
    hidden_size, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    head_dim = _integer(config, "head_dim", architecture.head_dim or hidden_size // max(1, heads))
    rope = _rope_parameters(config)
    rope_theta = _number(rope, "rope_theta", 10_000.0)
    bias = _flag(config, "attention_bias")
    return ModelConfig(
        architecture=model_type,
        hidden_size=hidden_size,
        num_hidden_layers=_integer(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_integer(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=_integer(config, "intermediate_size"),
        vocab_size=_integer(config, "vocab_size"),
        max_position_embeddings=_integer(config, "max_position_embeddings"),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_factors=_rope_factors(rope, head_dim, rope_theta),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias or bias,
        output_bias=bias and not architecture.qkv_bias,
        mlp_bias=_flag(config, "mlp_bias"),
        qk_norm=architecture.qk_norm,
        eos_token_ids=eos_token_ids,
    )


def token_ids(config: Json, name: str) -> tuple[int, ...]:
    """A field that is a token id, a list of them, or absent."""
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"{name} is {str(value)[:60]!r}, expected a token id or a list of them")
    return tuple(ids)


def _refuse_other_computations(config: Json) -> None:
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (1.0,),
        "use_sliding_window": (False,),
    }
    for name, allowed in expected.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} {value!r} is not supported; expected {allowed[0]!r}")
    layer_types = config.get("layer_types") or []
    other = sorted({str(kind) for kind in layer_types} - {"full_attention"})
    if other:
        raise ValueError(f"layer_types {other[0]!r} is not supported; expected 'full_attention'")


def _rope_parameters(config: Json) -> dict[str, Any]:
    """The rotary settings under one roof: `rope_parameters` has them all, older files spread them."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"rope_scaling is {str(nested)[:60]!r}, expected an object")
    kind = nested.get("rope_type", nested.get("type", "default"))
    theta = nested.get("rope_theta", config.get("rope_theta"))
    return {**nested, "rope_type": kind, "rope_theta": theta}


def _rope_factors(rope: Json, head_dim: int, theta: float) -> tuple[float, ...] | None:
    """What each rotary frequency is divided by; None for nothing."""
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind == "linear":
        return (_number(rope, "factor"),) * (head_dim // 2)
    if kind == "llama3":
        return llama3_factors(
            head_dim,
            theta,
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_context=_integer(rope, "original_max_position_embeddings"),
        )
    raise ValueError(f"rope_type {kind!r} is not supported; supported: default, linear, llama3")


def _integer(config: Json, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise ValueError(
            f"{name} is {'missing' if value is None else repr(value)[:60]}, expected a whole number"
        )
    return value


def _number(config: Json, name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {'missing' if value is None else repr(value)[:60]}, expected a number")
    return float(value)


def _flag(config: Json, name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")
    return bool(value)
