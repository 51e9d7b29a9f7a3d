"""A tiny random model, built in the test: small enough for thousands of steps, realistic enough for the
kernels.

Its matrices are quantized and go through `quantized_linear`, so that the packed matmul and the compiled
attention run if they are built. Everything is a function of explicit seeds.
"""

import os
from collections.abc import Callable
from functools import cache

import mlx.core as mx
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import group_layers
from tiny_llm.linear import BiasedLinear, Linear, LinearLike, quantized_linear
from tiny_llm.model import Model, build_model
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator

from tiny_llm_checkpoints.model_config import ModelConfig

VOCAB = 160
CONTEXT = 128
EOS = 7


def examples(many: int, quick: int | None = None) -> int:
    """The number of examples of a property.

    By default `quick`, or a quarter of `many`; half of `many` in CI, but not fewer; 20 times `many` with the
    profile `deep`.
    """
    profile = os.environ.get("HYPOTHESIS_PROFILE", "quick")
    few = quick or -(-many // 4)
    return {"quick": few, "ci": max(few, -(-many // 2)), "deep": 20 * many}[profile]


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


def random_weights(config: ModelConfig, seed: int) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Matrices and vectors by checkpoint name, without `.weight`; logits that give every token a chance."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in config.parameter_shapes.items()}
    keys = iter(mx.random.split(mx.random.key(seed), len(shapes)))
    noise = {name: mx.random.normal(shape, key=next(keys)) for name, shape in shapes.items()}
    spread = {"model.embed_tokens": 1.0, "lm_head": 2.0 * config.hidden_size**-0.5}
    matrices = {
        name: array * spread.get(name, array.shape[1] ** -0.5)
        for name, array in noise.items()
        if array.ndim == 2
    }
    vectors = {
        name: 0.1 * array + (0 if name.endswith(".bias") else 1)
        for name, array in noise.items()
        if array.ndim == 1
    }
    mx.eval(matrices, vectors)
    return matrices, vectors


def quantized(matrix: mx.array, bits: int, activation_bits: int = 16) -> LinearLike:
    """A matrix quantized in groups of 32, in the format that this device runs best."""
    weight, scales, biases = mx.quantize(matrix.astype(mx.float16), group_size=32, bits=bits)
    return quantized_linear(weight, scales, biases, 32, bits, activation_bits=activation_bits)


def assemble(
    config: ModelConfig, seed: int, store: Callable[[str, mx.array], LinearLike] = lambda _, m: Linear(m)
) -> Model:
    """A model of random weights; `store` converts each matrix to its format."""
    matrices, vectors = random_weights(config, seed)
    linears = {name: store(name, matrix) for name, matrix in matrices.items()}
    biases = {name.removesuffix(".bias"): v for name, v in vectors.items() if name.endswith(".bias")}
    return build_model(
        config, linears | {name: BiasedLinear(linears[name], bias) for name, bias in biases.items()}, vectors
    )


@cache
def tiny_model(seed: int = 0, **changes: object) -> Model:
    """A quantized tiny model: 4 bits, and 8 for the embedding, as in the embedded model's file."""
    return assemble(
        tiny_config(**changes), seed, lambda name, matrix: quantized(matrix, 8 if "embed" in name else 4)
    )


@cache
def eight_bit_model() -> Model:
    """The tiny model with activations rounded to 8 bits, q/k norm, and biases in q, k and v projections."""
    config = tiny_config(architecture="qwen3", qk_norm=True, qkv_bias=True)
    return assemble(config, 4, lambda name, matrix: quantized(matrix, 8 if "down" in name else 4, 8))


@cache
def dense_model(seed: int = 0, **changes: object) -> Model:
    """The same shape with plain float32 matrices, for oracles without quantization."""
    return assemble(tiny_config(**changes), seed)


@cache
def qwen_model() -> Model:
    """Everything that the quantized one lacks: bfloat16 matrices, biases, q/k norm, heads of 20."""
    config = tiny_config(architecture="qwen3", head_dim=20, qkv_bias=True, mlp_bias=True, qk_norm=True)
    return assemble(config, 1, lambda _, matrix: Linear(matrix.astype(mx.bfloat16)))


@cache
def gemma_model() -> Model:
    """Windows of 6 tokens in two of three layers, four norms per block, GELU, scaled embeddings."""
    config = tiny_config(
        architecture="gemma3_text",
        num_hidden_layers=3,
        sliding_window=6,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        rope_local_theta=500.0,
        query_pre_attn_scalar=40.0,
        hidden_act="gelu_pytorch_tanh",
        sandwich_norm=True,
        scale_embeddings=True,
        qk_norm=True,
        tie_word_embeddings=False,
    )
    return assemble(config, 2, lambda name, matrix: quantized(matrix, 8 if "embed" in name else 4))


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
    """The logits [L, vocab_size] after each token, computed in chunks of the given sizes, which sum to L."""
    layout = PageLayout(group_layers(model.config.windows), block_size, len(tokens))
    pages = num_blocks or layout.max_blocks(len(tokens))
    allocator, pool = BlockAllocator(pages), KVPool.for_model(model.config, pages, block_size, kv_dtype)
    tables, rows, start = layout.tables(allocator), [], 0
    for chunk in chunks:
        for table in tables:
            table.append_tokens(chunk)
        spans = [(tables, start, start + chunk)]
        context = layout.context(pool, spans, model.config.attention_scale, None)
        rows.append(model(mx.array([tokens[start : start + chunk]], mx.int32), context)[0])
        pool.evaluate(rows[-1])
        start += chunk
        layout.release_passed(tables, start)
    assert start == len(tokens)
    return mx.concatenate(rows)
