"""A model's hyper-parameters: validated once, then immutable."""

from dataclasses import dataclass
from math import prod

from .errors import ConfigError

# Upper limits: far beyond any known model, and small enough that later checks take no time.
_LIMITS = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 512,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": (1 << 31) - 1,
}
FULL, SLIDING = "full_attention", "sliding_attention"
SILU, GELU = "silu", "gelu_pytorch_tanh"
ACTIVATIONS = (SILU, GELU)
_POSITIVE = ("rms_norm_eps", "rope_theta", "rope_local_theta", "query_pre_attn_scalar")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters of a decoder, with the names of Hugging Face's config.json.

    One description covers every supported architecture; they differ only in the values. Raises `ConfigError`
    for a value that is out of range or does not fit the others.

    hidden_size: the size E of a token's vector.
    max_position_embeddings: the longest context in tokens.
    rms_norm_eps: added to the mean square in each norm.
    layer_types: for each layer "full_attention", where a query attends to its own and all earlier tokens, or
        "sliding_attention", where it attends to the last `sliding_window` of these. None: all are full.
    rope_factors: divisors of the head_dim / 2 rotary frequencies (llama 3's scaling, linear scaling); None
        for no scaling.
    rope_local_theta: the rotary base of sliding-window layers, to which `rope_factors` then do not apply;
        None: they rotate as other layers do.
    query_pre_attn_scalar: `attention_scale` is its inverse square root; None: head_dim.
    hidden_act: the activation in the MLP, one of `ACTIVATIONS`.
    sandwich_norm: norms before and after both attention and MLP, four in each block (Gemma).
    scale_embeddings: multiply the embedding's rows by sqrt(hidden_size) (Gemma).
    tie_word_embeddings: the output projection is the embedding.
    qkv_bias, output_bias, mlp_bias: whether there are biases on the query, key and value projections; on the
        attention's output projection; on the projections of the MLP.
    qk_norm: normalize each head's queries and keys before the rotation.
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
    rope_local_theta: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    query_pre_attn_scalar: float | None = None
    hidden_act: str = SILU
    sandwich_norm: bool = False
    scale_embeddings: bool = False
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ConfigError(f"{name} must be a whole number from 1 to {limit}, not {value!r}")
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim must be even, not {self.head_dim}, because values are rotated in pairs"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        outside = next((token for token in self.eos_token_ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise ConfigError(f"eos_token_ids must be from 0 to {self.vocab_size - 1}, not {outside}")
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, not {self.hidden_act!r}")
        self._check_windows()
        if self.rope_factors is not None:
            self._check_rope_factors(self.rope_factors)

    def _check_windows(self) -> None:
        window, types = self.sliding_window, self.layer_types
        if window is not None and (type(window) is not int or window < 1):
            raise ConfigError(f"sliding_window must be a whole number of at least 1 token, not {window!r}")
        if types is None:
            if window is not None:
                raise ConfigError(
                    f"sliding_window ({window}) needs layer_types, not None: "
                    f"{FULL} or {SLIDING} for each layer"
                )
            return
        if len(types) != self.num_hidden_layers:
            raise ConfigError(f"layer_types must name {self.num_hidden_layers} layers, not {len(types)}")
        unknown = next((kind for kind in types if kind not in (FULL, SLIDING)), None)
        if unknown is not None:
            raise ConfigError(f"layer_types {unknown!r} is not supported; supported: {FULL}, {SLIDING}")
        if window is None and SLIDING in types:
            raise ConfigError(
                f"layer_types has {SLIDING!r}, so sliding_window must be a number of tokens, not None"
            )

    def _check_rope_factors(self, factors: tuple[float, ...]) -> None:
        if len(factors) != self.head_dim // 2 or not all(0.0 < factor < float("inf") for factor in factors):
            raise ConfigError(
                f"rope_factors must be head_dim / 2 = {self.head_dim // 2} positive numbers, not "
                f"{len(factors)} numbers from {min(factors, default=None)} to {max(factors, default=None)}"
            )

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by checkpoint name; matrices are [outputs, inputs]."""
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
            shapes |= {f"{prefix}.{x}_layernorm.weight": (E,) for x in self.layer_norms}
        shapes["model.norm.weight"] = (E,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, E)
        return shapes

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms over hidden_size in each layer: their checkpoint names without `_layernorm`."""
        around_mlp = ("pre_feedforward", "post_feedforward") if self.sandwich_norm else ()
        return ("input", "post_attention", *around_mlp)

    @property
    def _projections(self) -> dict[str, tuple[int, int, bool]]:
        """The matrices of one layer: (outputs, inputs, has_bias) by name."""
        E, I = self.hidden_size, self.intermediate_size  # noqa: E741 (letters of the shape notation)
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
        """The number of parameters of the decoder; a tied embedding counts once."""
        return sum(map(prod, self.parameter_shapes.values()))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the number of tokens that a query attends to, itself included; None for no limit."""
        types = self.layer_types or (FULL,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == SLIDING else None for kind in types)

    @property
    def attention_scale(self) -> float:
        """The factor of query-key products: 1 / sqrt(query_pre_attn_scalar or head_dim)."""
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value
