"""What a model is (`ModelConfig`) and how the engine runs it (`EngineConfig`).

Both are frozen: results are returned, never written back, and a misspelled option is an error.
"""

import os
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Self

from .errors import TinyLLMError

GIB = 1024**3
KV_CACHE_DTYPES = ("float32", "float16", "bfloat16")
PREEMPTION_MODES = ("recompute", "none")

# What a model may have; far beyond any that is known, and small enough that checking it takes no time.
_MOST = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 512,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": (1 << 31) - 1,
}


class ConfigError(TinyLLMError, ValueError):
    """An option is unknown or has a value that cannot work; the message names both."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters of a decoder, under the names of Hugging Face's config.json.

    One description for every architecture that the engine runs; they differ only in the switches.

    max_position_embeddings: the longest context in tokens.
    rope_factors: what each of the head_dim / 2 rotary frequencies is divided by (llama 3's scaling, linear
        scaling); None leaves them alone.
    tie_word_embeddings: the output projection is the embedding.
    qkv_bias, output_bias, mlp_bias: which projections have a bias: queries, keys and values; the one after
        attention; those of the MLP.
    qk_norm: each head's queries and keys are normalised before they are rotated.
    eos_token_ids: tokens that end a generation.
    """

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] | None = None
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, not {self.head_dim}: its values are rotated in pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if self.rope_factors is not None:
            self._check_rope_factors(self.rope_factors)

    def _check_rope_factors(self, factors: tuple[float, ...]) -> None:
        if len(factors) != self.head_dim // 2 or not all(0.0 < factor < float("inf") for factor in factors):
            raise ConfigError(
                f"rope_factors must be head_dim / 2 = {self.head_dim // 2} positive numbers, not "
                f"{len(factors)} from {min(factors, default=None)} to {max(factors, default=None)}"
            )

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the decoder by its checkpoint name; matrices as [outputs, inputs]."""
        E, D = self.hidden_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, E)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for name, (outputs, inputs, has_bias) in self._projections.items():
                shapes[f"{prefix}.{name}.weight"] = (outputs, inputs)
                if has_bias:
                    shapes[f"{prefix}.{name}.bias"] = (outputs,)
            if self.qk_norm:
                shapes |= {f"{prefix}.self_attn.{x}_norm.weight": (D,) for x in "qk"}
            shapes |= {f"{prefix}.{x}_layernorm.weight": (E,) for x in ("input", "post_attention")}
        shapes["model.norm.weight"] = (E,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, E)
        return shapes

    @property
    def _projections(self) -> dict[str, tuple[int, int, bool]]:
        """The matrices of one layer: outputs, inputs, and whether there is a bias."""
        E, I = self.hidden_size, self.intermediate_size  # noqa: E741 (the legend's letter)
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, E, self.qkv_bias),
            "self_attn.k_proj": (kv, E, self.qkv_bias),
            "self_attn.v_proj": (kv, E, self.qkv_bias),
            "self_attn.o_proj": (E, q, self.output_bias),
            "mlp.gate_proj": (I, E, self.mlp_bias),
            "mlp.up_proj": (I, E, self.mlp_bias),
            "mlp.down_proj": (E, I, self.mlp_bias),
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the decoder that these numbers describe, a tied embedding counted once."""
        return sum(map(prod, self.parameter_shapes.values()))

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by: 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to serve: sizes, limits and policies. Every field has a default that works.

    block_size: tokens in one block of the KV pool.
    num_blocks: blocks in the pool; None derives it from `kv_cache_memory`.
    kv_cache_memory: bytes for the pool when `num_blocks` is None; None means half a gibibyte, or
        less where `max_num_seqs` sequences of `max_model_len` tokens need less.
    max_num_seqs: sequences that run in one step (each of `n` counts).
    max_num_batched_tokens: tokens in one step, prefill chunks and decodes together.
    max_model_len: longest prompt + output in tokens; None means the model's own limit.
    kv_cache_dtype: how keys and values are stored.
    preemption_mode: what happens when pages run out: "recompute" gives up the newest sequence's
        pages and computes them again later; "none" admits a request only when its whole life fits.
    seed: source of the seeds of requests that bring none.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    kv_cache_dtype: str = "float16"
    preemption_mode: str = "recompute"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "kv_cache_memory", "max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("preemption_mode", self.preemption_mode, PREEMPTION_MODES)

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build from keyword options; an unknown one raises `ConfigError` with the known names."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown engine option {name!r}; known: {', '.join(known)}")
        return cls(**options)

    def pool_blocks(self, model: ModelConfig, bytes_per_value: int) -> int:
        """Blocks of the pool for `model`, from `num_blocks`, or from the bytes allowed for it.

        Refuses a pool larger than the machine's memory, which no allocation would survive.
        """
        block_bytes = self.block_size * model.kv_bytes_per_token(bytes_per_value)
        blocks = self._wanted_blocks(model, block_bytes)
        if blocks * block_bytes > _memory_bytes():
            raise ConfigError(
                f"a pool of {blocks} blocks takes {blocks * block_bytes} bytes; "
                f"this machine has {_memory_bytes()}"
            )
        return blocks

    def _wanted_blocks(self, model: ModelConfig, block_bytes: int) -> int:
        if self.num_blocks is not None:
            return self.num_blocks
        if self.kv_cache_memory is not None:
            blocks = self.kv_cache_memory // block_bytes
            if blocks < 1:
                raise ConfigError(
                    f"kv_cache_memory of {self.kv_cache_memory} bytes holds no block: "
                    f"one block of {self.block_size} tokens takes {block_bytes} bytes"
                )
            return blocks
        longest = self.model_len(model)
        useful = self.max_num_seqs * -(-longest // self.block_size)
        return max(1, min(GIB // 2 // block_bytes, useful))

    def model_len(self, model: ModelConfig) -> int:
        """The longest prompt + output in tokens; refuses more than the model's own limit."""
        limit = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len ({self.max_model_len}) exceeds the model's context of {limit} tokens"
            )
        return self.max_model_len or limit


def _memory_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
