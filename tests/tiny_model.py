"""A tiny random model, built in the test: small enough for thousands of steps, real enough for the kernels.

Its matrices are quantized and go through `quantized_linear`, so that the packed matmul and the
compiled attention run wherever they are built. Everything is a function of explicit seeds.
"""

import os
from functools import cache

import mlx.core as mx
from tiny_llm.config import ModelConfig
from tiny_llm.linear import Linear, LinearLike, quantized_linear
from tiny_llm.model import Model, build_model
from tiny_llm.paged_attention import BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_kernel import PagedContext, Span, pack_batch

VOCAB = 160
CONTEXT = 128
EOS = 7


def examples(ci: int) -> int:
    """How many examples a property gets: `ci`, or twenty times as many under HYPOTHESIS_PROFILE=deep."""
    return ci * 20 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else ci


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, four query heads on two key-value heads of 32, a vocabulary of 160, a context of 128."""
    options: dict[str, object] = {
        "architecture": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "eos_token_ids": (EOS,),
    }
    return ModelConfig(**{**options, **changes})  # type: ignore[arg-type]


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix of a model by its checkpoint name, with [outputs, inputs]."""
    E, D = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    block = {
        "self_attn.q_proj": (q, E),
        "self_attn.k_proj": (kv, E),
        "self_attn.v_proj": (kv, E),
        "self_attn.o_proj": (E, q),
        "mlp.gate_proj": (config.intermediate_size, E),
        "mlp.up_proj": (config.intermediate_size, E),
        "mlp.down_proj": (E, config.intermediate_size),
    }
    shapes = {"model.embed_tokens": (config.vocab_size, E)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, E)
    return shapes


def random_weights(config: ModelConfig, seed: int) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Matrices and vectors by checkpoint name; the logits' spread leaves every token a chance."""
    keys = iter(mx.random.split(mx.random.key(seed), 200))
    spread = {"model.embed_tokens": 1.0, "lm_head": 2.0 * config.hidden_size**-0.5}
    matrices = {
        name: mx.random.normal(shape, key=next(keys)) * spread.get(name, shape[1] ** -0.5)
        for name, shape in matrix_shapes(config).items()
    }
    norms = ["model.norm"]
    for layer in range(config.num_hidden_layers):
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    vectors = {name: 1 + 0.1 * mx.random.normal((config.hidden_size,), key=next(keys)) for name in norms}
    mx.eval(matrices, vectors)
    return matrices, vectors


def quantized(matrix: mx.array, bits: int) -> LinearLike:
    """A matrix quantized in groups of 32, in the form that this device runs best."""
    weight, scales, biases = mx.quantize(matrix.astype(mx.float16), group_size=32, bits=bits)
    return quantized_linear(weight, scales, biases, 32, bits)


@cache
def tiny_model(seed: int = 0, **changes: object) -> Model:
    """A quantized tiny model: 4 bits, and 8 for the embedding, as in the embedded model's file."""
    config = tiny_config(**changes)
    matrices, vectors = random_weights(config, seed)
    linears = {name: quantized(matrix, 8 if "embed" in name else 4) for name, matrix in matrices.items()}
    return build_model(config, linears, vectors)


@cache
def dense_model(seed: int = 0, **changes: object) -> Model:
    """The same shape with plain float32 matrices, for oracles that know nothing of quantization."""
    config = tiny_config(**changes)
    matrices, vectors = random_weights(config, seed)
    return build_model(config, {name: Linear(matrix) for name, matrix in matrices.items()}, vectors)


def random_prompt(length: int, seed: int) -> list[int]:
    """`length` token ids, none of them the end-of-sequence token."""
    ids = mx.random.randint(EOS + 1, VOCAB, (length,), key=mx.random.key(seed))
    return [int(token) for token in ids.tolist()]


def logits_through_pages(
    model: Model,
    tokens: list[int],
    chunks: list[int],
    *,
    block_size: int = 16,
    num_blocks: int | None = None,
    kv_dtype: mx.Dtype = mx.float16,
) -> mx.array:
    """The logits [L, vocab_size] after each token, computed in chunks of the given sizes; they sum to L."""
    pages = num_blocks or -(-len(tokens) // block_size)
    manager = PagedBatchManager(pages, block_size, 1, model=model, kv_dtype=kv_dtype)
    assert manager.pool is not None
    table, rows, start = BlockTable(manager.allocator, block_size), [], 0
    for chunk in chunks:
        table.append_tokens(chunk)
        batch = pack_batch([Span(table, start, start + chunk)])
        context = PagedContext(manager.pool, batch, model.config.head_dim**-0.5, None)
        rows.append(model(mx.array([tokens[start : start + chunk]], mx.int32), context)[0])
        manager.pool.evaluate(rows[-1])
        start += chunk
    assert start == len(tokens)
    return mx.concatenate(rows)
