"""Text from a model: a prompt that is replaced, and pieces that are filtered."""

from collections.abc import Collection, Iterable, Iterator, Sequence

import mlx.core as mx

from tiny_llm_checkpoints.tokenizer import Tokenizer

from .grouped_attention import NoCacheContext
from .model import Model


def next_token(model: Model, tokens: Sequence[int]) -> int:
    """The least id of those with the largest logit."""
    context = NoCacheContext(length := len(tokens), model.config.attention_scale)
    context.logit_rows = mx.arange(length - 1, length)
    row = model(mx.array(tokens, mx.int32)[None], context).flatten().tolist()
    return row.index(max(row))


def generate(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """The prompt is a tuple that is replaced each time."""
    if len(tokens) == 0:
        raise ValueError("no prompt")
    left, seen, last = max_tokens, tuple(tokens), None
    while left > 0 and last not in eos_token_ids:
        last = next_token(model, seen)
        seen, left = (*seen, last), left - 1
        yield last


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """All pieces, the empty ones left out."""
    stream = tokenizer.stream()

    def pieces() -> Iterator[str]:
        yield from map(stream.push, tokens)
        yield stream.flush()

    yield from filter(None, pieces())
