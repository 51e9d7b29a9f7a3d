"""Day 1.4: what `pdm run try` shows and `pdm run compare` times."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from .shared import CAPITAL, Lines, Work, random_array

LAYERS = (0, 1, 5, 10, 15, 20, 25, 29)
TEXT = (
    "The capital of France is Paris. It is the largest city of the country, and lies on the river Seine. "
    "Water boils at a temperature of 100 degrees Celsius, and freezes at zero. A dog is an animal that "
    "people keep as a pet. In the morning the children went to school, and in the evening they came home "
    "and had dinner with their parents."
)
REPETITIONS = 30
Norm = Callable[[mx.array, mx.array, float], mx.array]


def show() -> Lines:
    """Print the size of the residual stream, what another norm costs, and what stacking saves."""
    from tiny_llm.loader import load_model
    from tiny_llm.norm import rms_norm

    loaded = load_model(None)
    model, tokenizer = loaded.model, loaded.tokenizer
    yield from _stream(model, tokenizer.encode(CAPITAL), rms_norm)
    yield ""
    yield from _perplexities(model, tokenizer.encode(TEXT), rms_norm)
    yield from _stacking(loaded.path, model.config)


def _stream(model: Any, tokens: list[int], norm: Norm) -> Lines:
    """The size of each token's vector at the input of some layers, and of the normalized copy."""
    from tiny_llm.grouped_attention import NoCacheContext

    context = NoCacheContext(len(tokens), model.config.attention_scale)
    x = model.embed_tokens.rows(mx.array([tokens], mx.int32))
    ones = mx.ones(x.shape[-1])
    yield f"{CAPITAL!r}: root mean square of the tokens' vectors at the input of a layer"
    yield "  layer   first token   other tokens   largest number   after RMSNorm"
    for layer, block in enumerate(model.layers):
        if layer in LAYERS:
            sizes, normed = _sizes(x), _sizes(norm(x, ones, model.config.rms_norm_eps))
            others = sum(sizes[1:]) / (len(sizes) - 1)
            yield (
                f"  {layer:5} {sizes[0]:13.2f} {others:14.2f} {float(mx.max(mx.abs(x))):16,.1f}"
                f"   {min(normed):.3f} to {max(normed):.3f}"
            )
        x = block(x, context)


def _sizes(x: mx.array) -> list[float]:
    """The root mean square of each token's vector: x [1, L, E]."""
    sizes: list[float] = mx.sqrt(mx.mean(x * x, axis=-1))[0].tolist()  # type: ignore[assignment]
    return sizes


def _perplexities(model: Any, tokens: list[int], norm: Norm) -> Lines:
    """How well the model predicts a text, with the norm that it was trained with and with another one."""

    def centred(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return norm(x - mx.mean(x, axis=-1, keepdims=True), weight, eps)

    for name, one in (("with rms_norm", norm), ("if each vector's mean is subtracted first", centred)):
        yield f"perplexity of a text of {len(tokens)} tokens {name}: {_perplexity(model, tokens, one):.1f}"


def _perplexity(model: Any, tokens: list[int], norm: Norm) -> float:
    """The exponential of the mean negative log-probability of the tokens after the first."""
    from tiny_llm.grouped_attention import NoCacheContext

    context, eps = NoCacheContext(len(tokens), model.config.attention_scale), model.config.rms_norm_eps
    x = model.embed_tokens.rows(mx.array([tokens], mx.int32))
    for block in model.layers:
        x = x + block.self_attn(norm(x, block.input_layernorm, eps), context)
        x = x + block.mlp(norm(x, block.post_attention_layernorm, eps))
    logits = model.lm_head(norm(x, model.norm, eps))[0, :-1]
    chosen = mx.take_along_axis(logits, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    return float(mx.exp(mx.mean(mx.logsumexp(logits, axis=-1) - chosen)))


def _stacking(path: Path, config: Any) -> Lines:
    """Time the stacked matrices of all layers, and their parts."""
    from tiny_llm.linear import LinearLike, quantized_linear
    from tiny_llm.stacked_linear import stack

    from tiny_llm_checkpoints.readers import read_checkpoint

    tensors = read_checkpoint(path).tensors

    def matrix(name: str) -> LinearLike:
        return quantized_linear(*tensors[f"{name}_proj.weight"].load())

    groups = [
        [matrix(f"model.layers.{layer}.{name}") for name in names]
        for layer in range(config.num_hidden_layers)
        for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"))
    ]
    x, stacks = random_array(1, 1, config.hidden_size), [stack(group) for group in groups]
    apart = [part for group in groups for part in group]
    yield (
        f"one token through q, k, v, gate and up of all layers: {len(apart)} matrices "
        f"{_fastest(apart, x):.2f} ms, {len(stacks)} stacked ones {_fastest(stacks, x):.2f} ms"
    )


def _fastest(matrices: list[Any], x: mx.array) -> float:
    """Milliseconds of the fastest of some runs of x through each matrix."""
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        mx.eval([matrix(x) for matrix in matrices])
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def work() -> Work:
    """RMSNorm and SwiGLU of 512 tokens, 576 wide."""
    from tiny_llm.mlp import swiglu
    from tiny_llm.norm import rms_norm

    x, weight = random_array(1, 512, 576), random_array(576)
    return lambda: swiglu(rms_norm(x, weight, 1e-5), x)
