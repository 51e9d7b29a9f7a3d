"""Day 1.1: what `pdm run try` shows."""

from types import SimpleNamespace

import mlx.core as mx

from .shared import Lines


def show() -> Lines:
    """Show which earlier tokens the last token attends to."""
    from tiny_llm.attention import causal_mask, softmax
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    text = "Mrs Dursley had never liked Harry Potter. That evening she went out to look for Harry"
    tokens = loaded.tokenizer.encode(text)
    length, scale = len(tokens), loaded.model.config.attention_scale
    seen: list[mx.array] = []

    def watch(layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        shared = mx.repeat(k, q.shape[1] // k.shape[1], axis=1)
        scores = (q @ shared.swapaxes(-1, -2)) * scale
        seen.append(softmax(scores + causal_mask(length, length))[0])
        output: mx.array = context.attend(layer, q, k, v)
        return output

    context = NoCacheContext(length, scale)
    watching = SimpleNamespace(positions=context.positions, logit_rows=None, attend=watch)
    loaded.model(mx.array([tokens], mx.int32), watching)
    weights = mx.stack(seen)  # [layers, H, L, L]
    after_last_time = tokens.index(tokens[-1]) + 1
    layer, head = divmod(int(mx.argmax(weights[:, :, -1, after_last_time])), weights.shape[1])
    yield f"layer {layer}, head {head}: the attention weight of each token for the last token's query"
    for position, token in enumerate(tokens):
        weight = float(weights[layer, head, -1, position])
        yield f"  {loaded.tokenizer.token_text(token):>10}  {weight:6.3f}  {'#' * round(40 * weight)}"
    error = float(mx.max(mx.abs(mx.sum(weights, axis=-1) - 1)))
    found = loaded.tokenizer.token_text(tokens[after_last_time])
    yield (
        f"it attends to {found!r}, which followed the last token's earlier occurrence: this is an induction "
        "head, with which a model repeats what it has read"
    )
    layers, heads = weights.shape[:2]
    yield (
        f"{layers} layers x {heads} heads x {length} tokens = {layers * heads * length:,} rows of weights; "
        f"each sums to 1 within {error:.1e}"
    )
