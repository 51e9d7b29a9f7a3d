"""Tiny random checkpoints of every architecture, written as a Hugging Face folder or a GGUF file.

Weights depend only on the tensor's name (NumPy's RandomState never changes), so the same checkpoint can be
made here and where transformers computed its logits (tests/goldens/make_checkpoints.py). This module does not
use tiny_llm, so that its files are independent tests of the readers.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

Weights = Mapping[str, np.ndarray]

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_TOKENS = 257  # every byte, and "ab"; then come the control tokens, then rows without a token
BOS, EOS = TEXT_TOKENS + 1, TEXT_TOKENS + 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "head_dim": 16},
    "llama-tied-bias": {
        **_COMMON,
        "model_type": "llama",
        "head_dim": 20,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama3-scaling": {
        **_COMMON,
        "model_type": "llama",
        "head_dim": 32,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {**_COMMON, "model_type": "qwen2", "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {**_COMMON, "model_type": "qwen3", "head_dim": 32, "attention_bias": False},
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA3 = {
    **{key: value for key, value in _COMMON.items() if key not in ("hidden_act", "rope_theta")},
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 7,
    "head_dim": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
# Models with layers that have a window of 8 tokens. A folder can express all of them, GGUF only the first
# (and llama.cpp computes the same for it). They use the field names of old files or of new ones.
WINDOWED_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        **_GEMMA3,
        "query_pre_attn_scalar": 16,
        "rope_theta": 100000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    },
    "gemma3-linear": {
        **_GEMMA3,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "mistral": {**_COMMON, "model_type": "mistral", "head_dim": 16, "sliding_window": 8},
    "qwen3-window": {
        **_COMMON,
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
}


def head_dim(config: Mapping[str, Any]) -> int:
    """The size of a head; qwen2's configuration does not contain it."""
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, written down from transformers' models."""
    E, I = config["hidden_size"], config["intermediate_size"]  # noqa: E741
    q = config["num_attention_heads"] * head_dim(config)
    kv = config["num_key_value_heads"] * head_dim(config)
    projections = {
        "self_attn.q_proj": (q, E),
        "self_attn.k_proj": (kv, E),
        "self_attn.v_proj": (kv, E),
        "self_attn.o_proj": (E, q),
        "mlp.gate_proj": (I, E),
        "mlp.up_proj": (I, E),
        "mlp.down_proj": (E, I),
    }
    biased = {name for name in projections if config.get("mlp_bias" if "mlp" in name else "attention_bias")}
    if config["model_type"] == "qwen2":
        biased = {f"self_attn.{name}_proj" for name in "qkv"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], E)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"{prefix}{name}.bias": shape[:1] for name, shape in projections.items() if name in biased}
        gemma = ("pre_feedforward", "post_feedforward") if config["model_type"] == "gemma3_text" else ()
        shapes |= {f"{prefix}{name}_layernorm.weight": (E,) for name in ("input", "post_attention", *gemma)}
        if config["model_type"] in ("qwen3", "gemma3_text"):
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (head_dim(config),) for name in "qk"}
    shapes["model.norm.weight"] = (E,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], E)
    return shapes


def random_weights(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Float32 weights by name. Norms are around one, and biases are too large to be left out unnoticed.

    Gemma's norms are stored minus one, and its embedding is multiplied by sqrt(hidden_size).
    """
    weights, gemma = {}, config["model_type"] == "gemma3_text"
    for name, shape in weight_shapes(config).items():
        noise = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
        if name.endswith("norm.weight"):
            noise = (0 if gemma else 1) + 0.3 * noise
        elif name.endswith(".bias"):
            noise = 0.3 * noise
        elif gemma or "embed_tokens" not in name:
            noise = noise * shape[-1] ** -0.5
        weights[name] = noise.astype(np.float32)
    return weights


def text_tokens() -> list[str]:
    """The character of every byte in byte-level BPE (GPT-2's table), and one merged token: "ab"."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)] + ["ab"]


# Hugging Face's layout.


def write_folder(path: Path, config: Mapping[str, Any], weights: Weights, **parts: Any) -> Path:
    """Write config.json, one safetensors file and a tokenizer; `parts` go to `write_safetensors`."""
    path.mkdir(parents=True, exist_ok=True)
    architectures = [_CLASSES.get(config.get("model_type", ""), "Unknown")]
    (path / "config.json").write_text(json.dumps({"architectures": architectures, **config}))
    write_safetensors(path / "model.safetensors", weights, **parts)
    write_tokenizer(path)
    return path


def write_safetensors(path: Path, weights: Weights, dtype: str = "F32") -> None:
    """Write a safetensors file as its specification says. bfloat16 arrays are passed as uint16."""
    header, data = {}, b""
    for name, array in weights.items():
        kind = {"uint32": "U32", "float16": "F16", "uint16": "BF16"}.get(array.dtype.name, dtype)
        blob = to_bytes(array, kind)
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(blob)],
        }
        data += blob
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def to_bytes(array: np.ndarray, kind: str) -> bytes:
    """An array's bytes as float32, float16 or bfloat16 (truncated: the tests' weights have no low bits)."""
    if kind == "BF16" and array.dtype == np.float32:
        return (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2", "U32": "<u4", "BF16": "<u2"}[kind]).tobytes()


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Make float32 numbers that bfloat16 represents exactly, by clearing the low bits."""
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json (byte-level BPE, one merge), and tokenizer_config.json with the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(text_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


# GGUF.

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA3_NAMES = {
    **_GGUF_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str = "llama") -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    names = _GEMMA3_NAMES if architecture == "gemma3" else _GGUF_NAMES
    stem, _, part = name.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{part}"
    layer, _, tensor = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[tensor]}.{part}"


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of llama's query and key rows: rows i and i + D/2 of each head are adjacent."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    weights: Weights,
    kind: Callable[[str], str] | str = "F32",
    raw: Mapping[str, tuple[np.ndarray, str]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    other: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write a GGUF file with ggml's own writer, laid out as by its converter.

    kind: the type of every matrix, or a function from its checkpoint name to the type; vectors are F32.
    raw: blocks and their type, written instead of a tensor's values. extra: further tensors, by their names
    in the file. other: further keys, with their full names. metadata: keys in the architecture's namespace,
    such as `llama.`, that replace or extend those of the configuration; None removes a key.
    """
    import gguf

    architecture = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(str(path), architecture)
    own = {f"{architecture}.{key}": value for key, value in {**_gguf_metadata(config), **metadata}.items()}
    for key, value in {**own, **(other or {})}.items():
        if value is not None:
            _add_gguf_value(writer, key, value)
    _add_gguf_tokenizer(writer, config["vocab_size"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, array in weights.items():
        projection = name.split(".")[-2]
        reordered = architecture == "llama" and projection in heads
        ordered = interleaved(array, heads[projection]) if reordered else array
        if architecture == "gemma3" and name.endswith("norm.weight"):
            ordered = 1 + array
        if raw and name in raw:
            blocks, block_kind = raw[name]
            writer.add_tensor(
                gguf_name(name, architecture), blocks, raw_dtype=gguf.GGMLQuantizationType[block_kind]
            )
            continue
        wanted = kind if isinstance(kind, str) else kind(name)
        _add_gguf_tensor(writer, gguf_name(name, architecture), ordered, wanted if array.ndim > 1 else "F32")
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    if "rope_scaling" in config:
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_value(writer: Any, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def _gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    window = {"attention.sliding_window": config["sliding_window"]} if "sliding_window" in config else {}
    return {
        **window,
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": head_dim(config),
    }


def _add_gguf_tokenizer(writer: Any, vocab_size: int) -> None:
    """Write the same tokenizer. Rows without a token get an unused one, as from ggml's converter."""
    tokens = [*text_tokens(), *CONTROL_TOKENS]
    padding = [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([1] * TEXT_TOKENS + [3] * len(CONTROL_TOKENS) + [5] * len(padding))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(EOS)
    writer.add_bos_token_id(BOS)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_gguf_tensor(writer: Any, name: str, array: np.ndarray, kind: str) -> None:
    import gguf

    if kind == "F32":
        writer.add_tensor(name, array.astype(np.float32))
        return
    raw_type = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, raw_type), raw_dtype=raw_type)


def dequantized(array: np.ndarray, kind: str) -> np.ndarray:
    """An array after ggml has quantized it to this type and dequantized it."""
    import gguf

    raw_type = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(array, raw_type), raw_type).astype(np.float32)


def llama3_factors(config: Mapping[str, Any]) -> np.ndarray:
    """ggml's tensor of rotary factors for llama 3's scaling, from wavelengths as in its converter."""
    scaling, dim = config["rope_scaling"], head_dim(config)
    frequencies = 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    context = scaling["original_max_position_embeddings"]
    longest, shortest = context / scaling["low_freq_factor"], context / scaling["high_freq_factor"]
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < shortest:
            factors.append(1.0)
        elif wavelength > longest:
            factors.append(scaling["factor"])
        else:
            span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
            smooth = (context / wavelength - scaling["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
