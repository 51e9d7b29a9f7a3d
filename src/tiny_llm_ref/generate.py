"""Text from a model, the plainest way: the whole sequence again for every token, the likeliest one each time.

Costs grow with the square of the length: each token pays for all before it. What keeps keys and values
instead (`kv_cache`) gives the same tokens.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import mlx.core as mx

from tiny_llm_checkpoints.tokenizer import Tokenizer

from .grouped_attention import NoCacheContext
from .model import Model


def next_token(model: Model, tokens: Sequence[int]) -> int:
    """The likeliest token after `tokens` (one or more), computed from nothing.

    Only the last token's logits are computed. Of tokens with the same logit, the one with the lowest id.
    """
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    context.logit_rows = mx.array([len(tokens) - 1])
    logits = model(mx.array([list(tokens)], mx.int32), context)  # [1, 1, V]
    return int(mx.argmax(logits[0, 0]))


def generate(
    model: Model, tokens: Sequence[int], max_tokens: int, eos_token_ids: Collection[int]
) -> Iterator[int]:
    """Continue `tokens` greedily, token by token as they come, at most `max_tokens` of them.

    A token of `eos_token_ids` is the last one and is yielded too. Raises ValueError for an empty prompt,
    when the first token is asked for.
    """
    if not tokens:
        raise ValueError("an empty prompt: there is nothing to continue")
    known = list(tokens)
    for _ in range(max_tokens):
        known.append(next_token(model, known))
        yield known[-1]
        if known[-1] in eos_token_ids:
            return


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of token ids that arrive one by one, in pieces that are final; no piece is empty.

    A character may be spread over several tokens, so a piece comes when it is whole. What is left when the
    tokens end comes last.
    """
    detokenizer = tokenizer.stream()
    for token in tokens:
        if piece := detokenizer.push(token):
            yield piece
    if rest := detokenizer.flush():
        yield rest
