"""An engine with the alphabet core, and a real core with a small model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from tiny_llm.engine import Engine
from tiny_llm.engine_config import EngineConfig
from tiny_llm.engine_core import EngineCore
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model
from tiny_llm.paged_batch import PagedBatchManager

from tiny_llm_checkpoints.model_config import ModelConfig
from week_3_day_7.alphabet import ALPHABET, TOKENIZER, AlphabetCore
from week_3_day_7.timeouts import background, with_timeout


@contextmanager
def serving(core: Any = None, vocab_size: int = len(ALPHABET), **options: Any) -> Iterator[Engine]:
    """An engine that stops with the test; fails and abandons its thread if that does not end."""
    core = core or AlphabetCore()
    config = EngineConfig(**{"max_num_seqs": 8, **options})
    engine = with_timeout(Engine, lambda: core, TOKENIZER, vocab_size, config)
    try:
        yield engine
    except BaseException:
        allow_all_steps(core)
        background(engine.stop)
        raise
    allow_all_steps(core)
    with_timeout(engine.stop)


def allow_all_steps(core: Any) -> None:
    """Allow all steps of an alphabet core."""
    if isinstance(core, AlphabetCore):
        core.allow_all_steps()


@cache
def small_model() -> Model:
    """One layer, 26 tokens, random weights."""
    config = ModelConfig(
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        vocab_size=len(ALPHABET),
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    rng, linears, vectors = np.random.default_rng(0), {}, {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            vectors[name.removesuffix(".weight")] = mx.array(1 + 0.1 * noise)
        else:
            gain = 1.0 if "embed" in name else 2.0 * shape[1] ** -0.5
            linears[name.removesuffix(".weight")] = Linear(mx.array(gain * noise))
    model = build_model(config, linears, vectors)
    # A lazy array belongs to the thread that made it, and the engine runs in another thread.
    mx.eval(list(vectors.values()), [layer.self_attn.inv_freq for layer in model.layers])
    return model


def small_core() -> EngineCore:
    """A real core with the small model, for at most four sequences."""
    return EngineCore(PagedBatchManager(40, 4, 4, model=small_model(), max_batched_tokens=12), ())


def free_blocks(core: EngineCore) -> int:
    """The number of available blocks: free or cached and idle."""
    return core.manager.capacity.num_free + core.manager.capacity.num_cached
