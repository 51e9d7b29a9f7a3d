"""The engine's configuration: sizes, limits and policies. Frozen; an unknown option is an error."""

import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Self

from tiny_llm_checkpoints.errors import ConfigError, shown
from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_llm_checkpoints.sizes import shown_apart, shown_bytes
from tiny_llm_checkpoints.suggestions import check_fields, suggests_fields

from .errors import is_integer
from .layer_groups import group_layers, layers_per_block
from .speculative_config import SpeculativeConfig

GIB = 1024**3
KV_CACHE_DTYPES = ("float32", "float16", "bfloat16")
COMPUTE_DTYPES = ("auto", "float32")
ACTIVATION_BITS = (8, 16)
PREEMPTION_MODES = ("recompute", "swap", "none")
BATCHING = ("paged", "dense")
MAX_NUMBER = 2**62  # the limit of each number, so that counts in the kernels fit into 64 bits
_OPTIONAL = (
    "num_blocks",
    "min_num_blocks",
    "kv_cache_memory",
    "swap_space",
    "max_num_waiting",
    "max_model_len",
)
_COUNTS = (
    "block_size",
    "num_blocks",
    "min_num_blocks",
    "kv_cache_memory",
    "swap_space",
    "max_num_seqs",
    "max_num_waiting",
    "max_num_batched_tokens",
    "max_model_len",
)
_NAMES = ("dtype", "kv_cache_dtype", "preemption_mode", "batching")


@suggests_fields
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes, limits and policies. Every field has a default that works.

    Numbers are integers (numpy's too); sizes are in bytes. Raises `ConfigError` for any other value.

    block_size: tokens in one block of the KV pool.
    num_blocks: blocks in the pool; None: derived from `kv_cache_memory`.
    kv_cache_memory: bytes for the pool if `num_blocks` is None; None: 512 MiB, or less if `max_num_seqs`
        sequences of the longest context need less.
    max_num_seqs: sequences that run in one step; each of a request's `n` completions counts.
    max_num_waiting: requests that may wait before further ones are rejected; None: any number.
    max_num_batched_tokens: tokens in one step, prefill chunks and decodes together.
    max_model_len: longest prompt + output in tokens; None: the model's own limit, or the capacity of the pool
        if that is less.
    dtype: the type in which the model computes; "auto" is "float32", the only choice. Weights stay in the
        type that their file has, and `kv_cache_dtype` is the type of the KV pool.
    kv_cache_dtype: the type in which keys and values are stored.
    activation_bits: the bits that the compiled kernels round activations to if weights are quantized. 16
        gives the accuracy of float32; 8, which other engines use, loses some accuracy and computes prompts
        and batches up to twice as fast. benches/RESULTS.md has figures for both.
    min_num_blocks: the initial number of blocks. The pool doubles when pages run short, and halves when less
        than a quarter of it is in use, which frees the memory. None: all blocks are allocated at the start.
    enable_prefix_caching: keep full blocks of sequences that have ended, so that requests that share a prefix
        reuse its KV blocks. When pages run short, the least recently used blocks are evicted.
    preemption_mode: what happens when pages run out. The newest sequence (with priorities: the one that is
        served last) is preempted, and its KV cache is restored later: "recompute" computes it again; "swap"
        copies it to host memory and back, and recomputes it if the host memory is full. "none" never
        preempts: it admits a request only when its longest possible output fits.
    swap_space: bytes of host memory for preemption_mode="swap"; None: as many as the pool has.
    batching: how keys and values are stored. "paged": in blocks, which sequences allocate as they grow, and
        share. "dense", the baseline: one contiguous cache of `max_model_len` tokens for each sequence, as
        many as fit into the same bytes.
    seed: the source of seeds for requests that have none.
    generation_config: the source of the sampling parameters that a caller leaves out. "auto": the model's
        recommendation (generation_config.json, general.sampling of a GGUF file, or a table for the packaged
        models); "vllm": the engine's own defaults; otherwise a folder with a generation_config.json.
    speculative_config: speculative decoding, which guesses tokens and computes several of them in one step if
        that is faster. It never changes an answer. A `SpeculativeConfig` or a mapping of its fields, such as
        {"method": "ngram", "num_speculative_tokens": 4}; None: no speculation.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    max_num_seqs: int = 64
    max_num_waiting: int | None = None
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "float16"
    activation_bits: int = 16
    min_num_blocks: int | None = None
    enable_prefix_caching: bool = True
    preemption_mode: str = "recompute"
    swap_space: int | None = None
    batching: str = "paged"
    seed: int = 0
    generation_config: str = "auto"
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise ConfigError(
                f"generation_config must be 'auto', 'vllm' or a folder, not {shown(self.generation_config)}"
            )
        for name in _COUNTS:
            self._check_number(name, least=1)
        self._check_number("seed", least=0)
        self._check_number("activation_bits", least=1)
        for name in _NAMES:
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a string, not {shown(getattr(self, name))}")
        if not isinstance(self.enable_prefix_caching, bool):
            value = shown(self.enable_prefix_caching)
            raise ConfigError(f"enable_prefix_caching must be True or False, not {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )
        self._check_min_num_blocks()
        if self.swap_space is not None and self.preemption_mode != "swap":
            raise ConfigError(f"swap_space ({shown_bytes(self.swap_space)}) needs preemption_mode='swap'")
        _one_of("dtype", self.dtype, COMPUTE_DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("activation_bits", self.activation_bits, ACTIVATION_BITS)
        _one_of("preemption_mode", self.preemption_mode, PREEMPTION_MODES)
        _one_of("batching", self.batching, BATCHING)
        self._check_speculation()

    def _check_speculation(self) -> None:
        """Make `speculative_config` a `SpeculativeConfig`, unless it is None. Raises `ConfigError`."""
        if self.speculative_config is None:
            return
        object.__setattr__(self, "speculative_config", SpeculativeConfig.of(self.speculative_config))
        if self.batching == "dense":
            raise ConfigError(
                "speculative_config needs batching='paged': batching='dense' cannot take back tokens "
                "that were guessed wrong"
            )

    def _check_number(self, name: str, least: int) -> None:
        """Raise `ConfigError` unless a field is an integer in range; convert numpy's integers to int."""
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if not is_integer(value):
            none = " or None" if name in _OPTIONAL else ""
            raise ConfigError(f"{name} must be a whole number{none}, not {shown(value)}")
        number = index(value)
        if not least <= number <= MAX_NUMBER:
            limit = f"at least {least}" if number < least else f"at most {MAX_NUMBER}"
            raise ConfigError(f"{name} must be {limit}, not {shown(value)}")
        object.__setattr__(self, name, number)

    def _check_min_num_blocks(self) -> None:
        """Raise `ConfigError` if `min_num_blocks` exceeds `num_blocks`, or if the pool cannot grow."""
        least, most = self.min_num_blocks, self.num_blocks
        if least is not None and self.batching == "dense":
            raise ConfigError(
                f"min_num_blocks ({least}) needs batching='paged': batching='dense' has no pool of blocks"
            )
        if least is not None and most is not None and least > most:
            raise ConfigError(f"min_num_blocks ({least}) exceeds num_blocks ({most})")

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Make a configuration from keyword options. Raises `ConfigError` for an unknown name."""
        check_fields(cls, options, "engine option", ConfigError)
        return cls(**options)

    def pool_blocks(self, model: ModelConfig, bytes_per_value: int) -> int:
        """The number of blocks of the pool for `model`, from `num_blocks` or from its size in bytes.

        Raises `ConfigError` for a pool that is larger than the machine's memory, and for a `kv_cache_memory`
        that is smaller than one block.
        """
        block_bytes = self._block_bytes(model, bytes_per_value)
        blocks = self._wanted_blocks(model, block_bytes)
        if blocks * block_bytes > _memory_bytes():
            needed, memory = shown_apart(blocks * block_bytes, _memory_bytes())
            raise ConfigError(
                f"a pool of {blocks} blocks takes {needed}; this machine has {memory}: lower num_blocks or "
                "kv_cache_memory"
            )
        return blocks

    def pool_bytes(self, model: ModelConfig, bytes_per_value: int) -> int:
        """The size of the pool for `model`, in bytes."""
        return self.pool_blocks(model, bytes_per_value) * self._block_bytes(model, bytes_per_value)

    def swap_blocks(self, model: ModelConfig, bytes_per_value: int) -> int:
        """Blocks in host memory for swapped-out sequences; 0 unless preemption_mode is "swap".

        Raises `ConfigError` for a `swap_space` that is smaller than one block or larger than the machine's
        memory.
        """
        if self.preemption_mode != "swap":
            return 0
        if self.swap_space is None:
            return self.pool_blocks(model, bytes_per_value)
        block_bytes = self._block_bytes(model, bytes_per_value)
        if self.swap_space < block_bytes or self.swap_space > _memory_bytes():
            wanted, block, memory = shown_apart(self.swap_space, block_bytes, _memory_bytes())
            raise ConfigError(
                f"swap_space ({wanted}) must be at least one block ({block}) and at most this machine's "
                f"memory ({memory})"
            )
        return self.swap_space // block_bytes

    def dense_slots(self, model: ModelConfig, bytes_per_value: int) -> int:
        """The number of caches of `max_model_len` tokens that the pool's bytes hold, up to `max_num_seqs`."""
        tokens = self.pool_blocks(model, bytes_per_value) * self.block_size
        return min(tokens // self.model_len(model, bytes_per_value), self.max_num_seqs)

    def wanted_len(self, model: ModelConfig) -> int:
        """`max_model_len`, or the model's own limit if that is None; the pool may hold fewer tokens.

        Raises `ConfigError` if `max_model_len` exceeds the model's own limit.
        """
        limit = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len ({self.max_model_len}) exceeds the model's context of {limit} tokens"
            )
        return self.max_model_len or limit

    def model_len(self, model: ModelConfig, bytes_per_value: int) -> int:
        """The longest prompt + output in tokens that the pool can hold.

        Raises `ConfigError` if `max_model_len` exceeds the model's own limit or the pool's capacity.
        """
        wanted, blocks = self.wanted_len(model), self.pool_blocks(model, bytes_per_value)
        fits = bisect_right(range(1, wanted + 1), blocks, key=partial(self._most_blocks, model))
        if fits == 0 or fits < (self.max_model_len or 0):
            least = self.max_model_len or 1
            raise ConfigError(
                f"a sequence of {least} tokens needs {self._most_blocks(model, least)} blocks of "
                f"{self.block_size}; the pool has {blocks}, for {fits} tokens: raise num_blocks or "
                "kv_cache_memory, or lower max_model_len"
            )
        return fits

    def _block_bytes(self, model: ModelConfig, bytes_per_value: int) -> int:
        layer_bytes = self.block_size * model.kv_bytes_per_token(bytes_per_value) // model.num_hidden_layers
        return layer_bytes * layers_per_block(group_layers(model.windows))

    def _wanted_blocks(self, model: ModelConfig, block_bytes: int) -> int:
        if self.num_blocks is not None:
            return self.num_blocks
        if self.kv_cache_memory is not None:
            blocks = self.kv_cache_memory // block_bytes
            if blocks < 1:
                wanted, block = shown_apart(self.kv_cache_memory, block_bytes)
                raise ConfigError(
                    f"kv_cache_memory ({wanted}) is less than one block of {self.block_size} tokens, "
                    f"which takes {block}"
                )
            return blocks
        of_longest = self._most_blocks(model, self.wanted_len(model))
        return max(1, min(GIB // 2 // block_bytes, self.max_num_seqs * of_longest))

    def _most_blocks(self, model: ModelConfig, num_tokens: int) -> int:
        """The maximum number of blocks that a sequence holds while it grows to `num_tokens` tokens."""
        groups = group_layers(model.windows)
        return sum(g.max_blocks(num_tokens, self.block_size, self.max_num_batched_tokens) for g in groups)


def _memory_bytes() -> int:
    """The size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _one_of(name: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, not {shown(value)}")
