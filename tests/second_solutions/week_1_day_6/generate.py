# A second solution of day 1.6, written only from the docstrings.
"""Greedy generation in its simplest form: recompute the whole sequence for every new token.

"Greedy" means that the most likely token is always chosen. The cost grows with the square of the length,
because each new token recomputes all tokens before it. The KV cache (`kv_cache`) gives the same tokens
without that cost.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import mlx.core as mx

from tiny_llm_checkpoints.tokenizer import Tokenizer

from .grouped_attention import NoCacheContext
from .model import Model


def next_token(model: Model, tokens: Sequence[int]) -> int:
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    context.logit_rows = mx.array([len(tokens) - 1], dtype=mx.int32)
    logits = model(mx.array([list(tokens)], dtype=mx.int32), context)
    return int(mx.argmax(logits[0, 0]).item())


def generate(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    if not tokens:
        raise ValueError("the prompt is empty")
    sequence = list(tokens)
    for _ in range(max_tokens):
        token = next_token(model, sequence)
        yield token
        if token in eos_token_ids:
            return
        sequence.append(token)


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    detokenizer = tokenizer.stream()
    for token in tokens:
        piece = detokenizer.push(token)
        if piece:
            yield piece
    rest = detokenizer.flush()
    if rest:
        yield rest
