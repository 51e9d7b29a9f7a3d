"""Turns Hugging Face's config.json into a `ModelConfig`, and rejects what the engine does not compute.

Every field that changes the computation is checked: a model that computes something slightly different
would run and give plausible but wrong answers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .model_config import FULL, GELU, SILU, SLIDING, ModelConfig
from .rope_scaling import llama3_factors

Json = Mapping[str, Any]


class _Architecture(NamedTuple):
    """Differences between architectures: transformers' defaults, and what its code fixes."""

    qkv_bias: bool = False  # True: always, whatever attention_bias says
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_theta: float = 10_000.0
    hidden_act: str = SILU
    gemma: bool = False  # Gemma's norms, scaled embedding, and a rotation per layer type


ARCHITECTURES = {
    "llama": _Architecture(),
    "mistral": _Architecture(),
    "qwen2": _Architecture(qkv_bias=True),
    "qwen3": _Architecture(qk_norm=True, head_dim=128),
    "gemma3_text": _Architecture(
        qk_norm=True, head_dim=256, rope_theta=1_000_000.0, hidden_act=GELU, gemma=True
    ),
}
_ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU}
_QWEN = ("qwen2", "qwen3")
_WITHOUT_LAYER_TYPES = ("llama", "mistral")  # transformers uses one mask for all their layers
MAX_NUMBER = 1e30  # largest number in a configuration, far beyond any known one
# transformers' defaults for fields that a configuration leaves out.
_WINDOW = 4096
_QWEN_FULL_LAYERS = 28  # the first layers, which have full attention
_GEMMA3_PERIOD = 6  # every sixth layer has full attention
_GEMMA3_LOCAL_THETA = 10_000.0


def model_config(config: Json, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """Convert a parsed config.json.

    Raises a ValueError that names the field, the value found and the value expected.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        raise ValueError(
            "model_type 'gemma3' also takes images, which is not supported; supported: the text model "
            "('gemma3_text'), in a folder or as a GGUF file"
        )
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    _reject_unsupported(config)
    hidden_size, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    head_dim = _integer(config, "head_dim", architecture.head_dim or hidden_size // max(1, heads))
    rope = _gemma_rope(config) if architecture.gemma else _rope_parameters(config)
    bias = _flag(config, "attention_bias")
    checked = ModelConfig(
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
        rope_theta=_number(rope, "rope_theta", architecture.rope_theta),
        rope_local_theta=_gemma_local_theta(config) if architecture.gemma else None,
        query_pre_attn_scalar=_number(config, "query_pre_attn_scalar", 256) if architecture.gemma else None,
        hidden_act=_hidden_act(config, architecture),
        sandwich_norm=architecture.gemma,
        scale_embeddings=architecture.gemma,
        tie_word_embeddings=_flag(config, "tie_word_embeddings", architecture.gemma),
        qkv_bias=architecture.qkv_bias or bias,
        output_bias=bias and not architecture.qkv_bias,
        mlp_bias=_flag(config, "mlp_bias"),
        qk_norm=architecture.qk_norm,
        eos_token_ids=eos_token_ids,
    )
    checked = replace(checked, rope_factors=_rope_factors(rope, head_dim, checked.rope_theta))
    return _with_windows(checked, config)


def _reject_unsupported(config: Json) -> None:
    """Raise ValueError for the first field that asks for a computation that the engine does not have."""
    expected = {
        "partial_rotary_factor": 1.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "is_causal": True,
    }
    for name, wanted in expected.items():
        value = config.get(name)
        if value is not None and value != wanted:
            raise ValueError(f"{name} {value!r} is not supported; expected {wanted!r}")


def _hidden_act(config: Json, architecture: _Architecture) -> str:
    name = "hidden_activation" if architecture.gemma else "hidden_act"
    value = config.get(name) or architecture.hidden_act
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(f"{name} {value!r} is not supported; expected {SILU!r} or {GELU!r}")
    return _ACTIVATIONS[value]


def _with_windows(checked: ModelConfig, config: Json) -> ModelConfig:
    """Add sliding windows to the layers that have one in transformers."""
    window = _window(config, checked.architecture)
    by_default = _default_layer_types(checked, config, window)
    named = config.get("layer_types")
    if named is None and SLIDING not in by_default:
        return checked
    types = by_default if named is None else named
    if not isinstance(types, list):
        raise ValueError(f"layer_types is {str(types)[:60]!r}, expected a list of names")
    if checked.architecture in _WITHOUT_LAYER_TYPES and types != by_default:
        other = next((kind for kind in types if kind not in by_default), len(types))
        raise ValueError(
            f"layer_types {other!r} is not supported in a {checked.architecture} model; expected "
            f"{by_default[0]!r} for each of {checked.num_hidden_layers} layers"
        )
    return replace(checked, layer_types=tuple(types), sliding_window=window if SLIDING in types else None)


def _window(config: Json, model_type: str) -> int | None:
    """The window of the windowed layers, or the default if the field is missing; None if no layer has one."""
    uses = _flag(config, "use_sliding_window")
    if model_type == "llama" and uses:
        raise ValueError("use_sliding_window True is not supported in a llama model; expected False")
    never = model_type == "llama" or (model_type in _QWEN and not uses)
    if never or config.get("sliding_window", _WINDOW) is None:
        return None
    return _integer(config, "sliding_window", _WINDOW)


def _default_layer_types(checked: ModelConfig, config: Json, window: int | None) -> list[str]:
    """The type of each layer if the configuration has no `layer_types`."""
    layers = range(checked.num_hidden_layers)
    if checked.architecture == "gemma3_text":
        period = _integer(config, "sliding_window_pattern", _GEMMA3_PERIOD)
        if period < 1:
            raise ValueError(f"sliding_window_pattern is {period}, expected at least 1")
        return [SLIDING if (layer + 1) % period else FULL for layer in layers]
    first = _integer(config, "max_window_layers", _QWEN_FULL_LAYERS) if checked.architecture in _QWEN else 0
    return [FULL if window is None or layer < first else SLIDING for layer in layers]


def _gemma_rope(config: Json) -> dict[str, Any]:
    """The rotary settings of full-attention layers; older files do not separate them by layer type."""
    by_type = _by_layer_type(config)
    settings = {**_object(by_type, FULL), **_object(config, "rope_scaling")}
    return _rope_parameters({"rope_parameters": settings, "rope_theta": config.get("rope_theta")})


def _gemma_local_theta(config: Json) -> float:
    """The rotary base of sliding-window layers, to which no scaling applies."""
    theta = _number(config, "rope_local_base_freq", _GEMMA3_LOCAL_THETA)
    local = _rope_parameters(
        {"rope_parameters": _object(_by_layer_type(config), SLIDING), "rope_theta": theta}
    )
    if local["rope_type"] != "default":
        raise ValueError(
            f"rope_type {local['rope_type']!r} of {SLIDING} is not supported; expected 'default'"
        )
    return _number(local, "rope_theta")


def _by_layer_type(config: Json) -> Json:
    by_type = _object(config, "rope_parameters")
    other = sorted(by_type.keys() - {FULL, SLIDING})
    if other:
        raise ValueError(f"rope_parameters has {other[0]!r}, expected {FULL!r} and {SLIDING!r}")
    return by_type


def _rope_parameters(config: Json) -> dict[str, Any]:
    """All rotary settings in one dictionary: from `rope_parameters`, or from the fields of older files."""
    parameters, scaling = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    if parameters and scaling and parameters != scaling:
        raise ValueError("rope_parameters and rope_scaling differ, expected equal values or only one of them")
    nested = parameters or scaling
    other = next((name for name, value in nested.items() if isinstance(value, dict)), None)
    if other is not None:
        source = "rope_parameters" if parameters else "rope_scaling"
        raise ValueError(f"{source} has {other!r}, expected one rotation for all layers")
    _reject_unsupported(nested)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default" and _number(nested, "factor", 1.0) != 1.0:
        raise ValueError(f"rope_scaling has factor {nested['factor']}, expected a rope_type that uses it")
    theta = config.get("rope_theta") if nested.get("rope_theta") is None else nested["rope_theta"]
    return {**nested, **_original_context(config, nested, kind), "rope_type": kind, "rope_theta": theta}


def _original_context(config: Json, nested: Json, kind: Any) -> dict[str, Any]:
    """The original context of Llama 3's scaling, which may be next to the other rotary settings."""
    name = "original_max_position_embeddings"
    outside, inside = config.get(name), nested.get(name)
    if kind != "llama3" or outside is None:
        return {}
    if inside is not None and inside != outside:
        raise ValueError(f"{name} is {outside!r}, and {inside!r} in the rotary settings, expected one value")
    return {name: outside}


def _rope_factors(rope: Json, head_dim: int, theta: float) -> tuple[float, ...] | None:
    """The divisor of each rotary frequency; None if none is scaled."""
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


def _object(config: Json, name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {str(value)[:60]!r}, expected an object")
    return value


def _integer(config: Json, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not abs(value) < 1 << 63:
        raise ValueError(
            f"{name} is {'missing' if value is None else repr(value)[:60]}, expected a whole number"
        )
    return value


def _number(config: Json, name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or not is_number or not abs(value) <= MAX_NUMBER:
        raise ValueError(f"{name} is {'missing' if value is None else repr(value)[:60]}, expected a number")
    return float(value)


def _flag(config: Json, name: str, default: bool = False) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")
    return default if value is None else value
