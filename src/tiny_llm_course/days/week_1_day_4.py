"""Day 1.4: what `pdm run try` shows and `pdm run compare` times."""

import mlx.core as mx

from .shared import CAPITAL, Lines, Work, random_array


def show() -> Lines:
    """Print how the residual stream grows from layer to layer, while each layer reads a normalized copy."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model
    from tiny_llm.norm import rms_norm

    loaded = load_model(None)
    model, tokens = loaded.model, loaded.tokenizer.encode(CAPITAL)
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    x = model.embed_tokens.rows(mx.array([tokens], mx.int32))
    ones = mx.ones(x.shape[-1])
    yield "root mean square of the residual stream: at the input of a layer, and after RMSNorm"
    for layer, block in enumerate(model.layers):
        if layer % 5 == 0 or layer == len(model.layers) - 1:
            normed = rms_norm(x, ones, model.config.rms_norm_eps)
            yield f"  layer {layer:2}   {_size(x):10.2f}   {_size(normed):6.3f}"
        x = block(x, context)
    config = model.config
    mlp = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    share = mlp / config.num_parameters
    yield f"the MLPs hold {mlp:,} of the model's {config.num_parameters:,} parameters: {share:.0%}"


def _size(x: mx.array) -> float:
    return float(mx.sqrt(mx.mean(x * x)))


def work() -> Work:
    """RMSNorm and SwiGLU of 512 tokens, 576 wide."""
    from tiny_llm.mlp import swiglu
    from tiny_llm.norm import rms_norm

    x, weight = random_array(1, 512, 576), random_array(576)
    return lambda: swiglu(rms_norm(x, weight, 1e-5), x)
